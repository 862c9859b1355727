"""Draw a grid of pictures with a label beside each row."""

import math
from collections.abc import Sequence
from pathlib import Path

from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from latentvae.pictures import to_pil

CELL = 64  # smaller images are enlarged to at least this many pixels on a side
GAP = 2
LABEL_WIDTH = 110


def save_grid(images: Tensor, path: Path, *, labels: Sequence[str] | None = None) -> None:
    """Write images (B, C, H, W) in [-1, 1] as one PNG.

    With labels, each row has B / len(labels) images and its label on the left. Without labels, the
    grid is about square.
    """
    columns = len(images) // len(labels) if labels else math.ceil(len(images) ** 0.5)
    missing = -len(images) % columns
    white = F.pad(images, (0, GAP, 0, GAP), value=1.0)
    white = F.pad(white, (0, 0, 0, 0, 0, 0, 0, missing), value=1.0)
    joined = rearrange(white, "(row column) c h w -> 1 c (row h) (column w)", column=columns)
    picture = to_pil(joined)[0]

    # enlarge
    factor = math.ceil(CELL / min(images.shape[2:]))
    size = (factor * picture.width, factor * picture.height)
    picture = picture.resize(size, Image.Resampling.NEAREST)

    # labels
    if labels:
        canvas = Image.new(picture.mode, (LABEL_WIDTH + picture.width, picture.height), "white")
        canvas.paste(picture, (LABEL_WIDTH, 0))
        pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
        height = picture.height // len(labels)
        for row, label in enumerate(labels):
            pen.text((6, row * height + 6), label[:16], fill="black", font=font)
        picture = canvas

    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
