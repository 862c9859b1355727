"""Draw heat maps: one picture per image, and a sheet of the most anomalous images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from latentvae.errors import printable
from latentvae.losses.colors import to_rgb
from latentvae.pictures import to_uint8

GAP, LINE = 8, 14  # pixels between pictures, and height of a line of text
LEGIBLE = 256  # side of pictures on a sheet, in pixels
OPACITY = 0.55  # opacity of a heat map that is drawn over its image


def heat_picture(heat: Tensor, *, low: float, high: float) -> Image.Image:
    """Return a heat map (H, W) as a picture: dark for `low` and less, bright for `high` and more.

    Args:
        heat: the heat map.
        low, high: ends of the colour scale. Use the same ends for all pictures that you want to
            compare.
    """
    unit = ((heat.float() - low) / max(high - low, 1e-12)).clamp(0, 1).cpu().numpy()
    return Image.fromarray((colormaps["inferno"](unit)[..., :3] * 255).round().astype(np.uint8))


def sheet(
    images: Tensor, maps: Tensor, texts: Sequence[str], *, low: float, high: float
) -> Image.Image:
    """Return a picture with one row per image: image, heat map, and heat map over the image.

    Args:
        images: (N, C, H, W) in [-1, 1].
        maps: heat maps, (N, H, W).
        texts: a line of text for each row of the picture.
        low, high: ends of the colour scale.
    """
    images, maps = legible(images), legible(maps[:, None])[:, 0]
    height, width = images.shape[2:]
    page = Image.new("RGB", (3 * width + 2 * GAP, len(images) * (height + LINE + GAP)), "white")
    draw = ImageDraw.Draw(page)
    rgb = to_rgb(images)

    for i, text in enumerate(texts):
        top = i * (height + LINE + GAP)
        draw.text((2, top), shortened(printable(text), width=3 * width), fill="black")
        picture = Image.fromarray(to_uint8(rgb[i : i + 1])[0])
        heat = heat_picture(maps[i], low=low, high=high)
        both = Image.blend(picture, heat, OPACITY)
        for column, part in enumerate((picture, heat, both)):
            page.paste(part, (column * (width + GAP), top + LINE))
    return page


def legible(pixels: Tensor) -> Tensor:
    """Return images (N, C, H, W). Small images are enlarged, to sides of at most 256 pixels."""
    factor = max(LEGIBLE // max(pixels.shape[2:]), 1)
    return pixels if factor == 1 else F.interpolate(pixels, scale_factor=factor, mode="nearest")


def shortened(text: str, *, width: int) -> str:
    """Return a text, or only its end if the whole text is wider than `width` pixels."""
    letters = max(width // 6, 4)
    return text if len(text) <= letters else f"...{text[3 - letters :]}"


def colour_scale(clean_maps: Tensor, maps: Tensor) -> tuple[float, float]:
    """Return the ends of a colour scale for heat maps.

    The lower end is the median of `clean_maps`. The upper end is the larger of two values: the
    maximum of `clean_maps`, and the 99.5 percent quantile of `maps`.

    Args:
        clean_maps: sorted sample of the heat-map values of clean images, (M,).
        maps: heat maps of the images to show, (N, H, W).
    """
    high = max(float(clean_maps[-1]), float(quantile(maps.flatten(), 0.995)))
    return float(clean_maps[len(clean_maps) // 2]), high


def quantile(values: Tensor, share: float) -> Tensor:
    """Return the quantile of many values at the fraction `share`, from 0 to 1.

    Unlike `torch.quantile`, this function accepts more than 16 million values.
    """
    ordered = values.flatten().sort().values
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def heat_sample(maps: Tensor, number: int = 256) -> Tensor:
    """Return evenly spread quantiles of heat maps, (number,), from 0 to 99.5 percent."""
    shares = torch.linspace(0, 0.995, number).tolist()
    return torch.stack([quantile(maps, share) for share in shares])


def write_heat_map(path: Path, heat: Tensor, *, low: float, high: float) -> None:
    """Write the heat map of one image as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    heat_picture(heat, low=low, high=high).save(path)
