"""Draw sheet.png of an evaluation: originals, reconstructions and JPEG pictures side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentvae.autoencoder import Autoencoder
from latentvae.coding.image_codecs import CODECS, bits_per_pixel, encode_at_rate
from latentvae.data import to_tensor
from latentvae.errors import printable
from latentvae.evaluation.model_evaluation import Shown
from latentvae.evaluation.picture_source import to_picture
from latentvae.evaluation.rates import raw_bits
from latentvae.metrics import psnr, to_8bit

CROP = 320  # largest side in pixels of the centre of a picture that a sheet shows
MARGIN, CAPTION_HEIGHT = 8, 40  # pixels


def reconstruct_for_sheet(model: Autoencoder, images: Tensor) -> Shown:
    """Reconstruct an image (1, 3, H, W).

    Return the reconstruction, rounded to 8 bits, and the rate of the latent without entropy coding,
    in bits per pixel.
    """
    z = model.encode(images)
    size = images.shape[2], images.shape[3]
    decoded: Any = model.decode(z, size=size)
    return Shown(to_8bit(decoded).cpu(), raw_bits(model, z) / (size[0] * size[1]))


def sheet_row(shown: Mapping[str, Shown], name: str, images: Tensor) -> list["Tile"]:
    """Return one row of the sheet: tiles of the original, all reconstructions, and JPEG pictures.

    For each raw rate of the models, there is a JPEG picture of the lowest quality that reaches this
    rate, or of quality 100 if no quality does. The raw rate is the size of the latent in bits per
    pixel without entropy coding.

    Args:
        shown: the models' reconstructions, by the models' names in the captions.
        name: name of the image.
        images: (1, 3, H, W) in [-1, 1], rounded to 8 bits.
    """
    # original
    source = to_picture(images)
    caption = f"{printable(Path(name).name)}\n{source.width} x {source.height}"
    tiles, rates = [Tile(source, caption)], set()

    # models
    for label, own in shown.items():
        decibel = psnr(images, own.recon.to(images)).item()
        caption = f"{label}\n{own.bpp:.2f} bpp raw, {decibel:.1f} dB"
        tiles.append(Tile(to_picture(own.recon), caption))
        rates.add(own.bpp)

    # JPEG at the models' rates
    for rate in sorted(rates):
        content, quality = encode_at_rate(CODECS["jpeg"], source, bpp=rate)
        decoded = CODECS["jpeg"].decode(content)
        decibel = psnr(images.cpu(), to_tensor(decoded)[None]).item()
        caption = f"JPEG, quality {quality}\n{bits_per_pixel(content, source):.2f} bpp, "
        tiles.append(Tile(decoded, f"{caption}{decibel:.1f} dB"))
    return tiles


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet, and one or two lines of text above the picture."""

    picture: Image.Image
    caption: str


def sheet(rows: Sequence[Sequence[Tile]], path: Path) -> None:
    """Draw rows of tiles into one picture, and write this picture to the file `path`.

    Each tile shows the centre of its picture.

    Pictures with a side above 320 pixels are cropped. Pictures with sides of at most 160 pixels are
    enlarged by an integer factor, without interpolation. The pictures of a row must have one size,
    so that all tiles of the row show the same part.
    """
    tiles = [[(_middle(tile.picture), tile.caption) for tile in row] for row in rows]
    width = max(sum(picture.width + MARGIN for picture, _ in row) for row in tiles) + MARGIN
    heights = [max(picture.height for picture, _ in row) + CAPTION_HEIGHT for row in tiles]
    canvas = Image.new("RGB", (width, sum(heights) + MARGIN), "white")
    draw, font, top = ImageDraw.Draw(canvas), ImageFont.load_default(size=13), 0
    for row, height in zip(tiles, heights, strict=True):
        left = MARGIN
        for picture, caption in row:
            draw.multiline_text((left, top + 4), caption, fill="black", font=font)
            canvas.paste(picture, (left, top + CAPTION_HEIGHT))
            left += picture.width + MARGIN
        top += height
    canvas.save(path)


def _middle(picture: Image.Image) -> Image.Image:
    width, height = min(picture.width, CROP), min(picture.height, CROP)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    part = picture.crop((left, top, left + width, top + height))
    factor = max(CROP // max(width, height), 1)
    return part.resize((width * factor, height * factor), Image.Resampling.NEAREST)
