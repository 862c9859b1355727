"""Convert pictures of Pillow, NumPy and PyTorch to tensors and back, and draw grids of pictures.

    PIL image, list of PIL images    any mode in, 8-bit L, RGB or RGBA out
    NumPy (H, W, C), (B, H, W, C)    uint8, uint16, or float in [0, 1]
    torch (B, C, H, W)               float in [-1, 1]

C is the network's number of image channels: 1 (grey), 3 (RGB) or 4 (RGBA).

Inside the package images are float32 in [-1, 1], (B, C, H, W).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from latentvae.errors import UserError, nearest

Images = Image.Image | Sequence[Image.Image] | np.ndarray | Tensor
OutputType = Literal["pt", "np", "pil"]
OUTPUT_TYPES: tuple[OutputType, ...] = get_args(OutputType)

CELL = 64  # a grid enlarges smaller images to at least this many pixels on a side
GAP, LABEL_WIDTH = 2, 110  # width of a grid's gaps and of its labels, in pixels


@dataclass(frozen=True)
class Kind:
    """The form in which a user gave images, so that results have the same form.

    Attributes:
        output_type: `"pt"` for a tensor, `"np"` for an array, `"pil"` for PIL images.
        single: whether the user gave one picture without a batch axis.
        tensor_dtype: dtype of the tensor, if the user gave a tensor.
        array_dtype: dtype of the array, if the user gave an array.
    """

    output_type: OutputType
    single: bool = False
    tensor_dtype: torch.dtype | None = None
    array_dtype: np.dtype | None = None

    def restore(self, images: Tensor) -> Images:
        """Convert images (B, C, H, W) to the form in which the user gave images."""
        if self.output_type == "pt":
            return images.to(self.tensor_dtype)
        if self.output_type == "pil":
            pictures = to_pil(images)
            return pictures[0] if self.single else pictures
        if self.array_dtype == np.uint8:
            array = to_uint8(images)
        elif self.array_dtype == np.uint16:
            array = to_uint16(images)
        else:
            array = to_unit_array(images)
        array = array.astype(self.array_dtype, copy=False)
        return array[0] if self.single else array


def read_pictures(images: Images, *, channels: int = 3) -> tuple[Tensor, Kind]:
    """Convert images to float32 (B, C, H, W) in [-1, 1]. Return the tensor and the input's form.

    Args:
        images: images in one of the forms that the module's docstring lists.
        channels: number of channels C. PIL images are converted to C channels. Arrays must have C
            channels. The channels of tensors are not checked.

    Raises:
        UserError: `images` are not images, or their shape or range is wrong.
    """
    if isinstance(images, Tensor):
        return _from_tensor(images), Kind("pt", tensor_dtype=images.dtype)
    if isinstance(images, np.ndarray):
        kind = Kind("np", single=images.ndim == 3, array_dtype=images.dtype)
        return _from_array(images, channels), kind
    if isinstance(images, Image.Image):
        return _from_pil([images], channels), Kind("pil", single=True)
    if not isinstance(images, Sequence) or not all(isinstance(i, Image.Image) for i in images):
        raise UserError(
            f"images must be PIL images, a NumPy array or a tensor, not {type(images).__name__}"
        )
    return _from_pil(images, channels), Kind("pil")


def convert(images: Tensor, output_type: OutputType) -> Images:
    """Convert images (B, C, H, W) in [-1, 1] to the form that `output_type` names.

    `"pt"` returns the tensor unchanged, `"np"` an array (B, H, W, C) in [0, 1], and `"pil"` a list
    of PIL images.

    Raises:
        UserError: `output_type` is unknown.
    """
    if output_type not in OUTPUT_TYPES:
        hint = nearest(output_type, OUTPUT_TYPES)
        raise UserError(f"output_type must be pt, np or pil (got '{output_type}'){hint}")
    if output_type == "pt":
        return images
    return to_pil(images) if output_type == "pil" else to_unit_array(images)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert (B, C, H, W) in [-1, 1] to 8-bit pictures of mode L, RGB or RGBA."""
    arrays = to_uint8(images)
    return [
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels) for pixels in arrays
    ]


def save_grid(images: Tensor, path: Path, *, labels: Sequence[str] | None = None) -> None:
    """Write images (B, C, H, W) in [-1, 1] as one PNG.

    With labels, the grid has one row for each label, and shows the first 16 letters of each label
    on the left. Without labels, the grid is about square. Images with a side below 64 pixels are
    enlarged.
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


def to_unit_array(images: Tensor) -> np.ndarray:
    """Convert (B, C, H, W) in [-1, 1] to (B, H, W, C) in [0, 1], float32."""
    return (images.float().permute(0, 2, 3, 1).clamp(-1, 1) / 2 + 0.5).cpu().numpy()


def to_uint8(images: Tensor) -> np.ndarray:
    """Convert (B, C, H, W) in [-1, 1] to (B, H, W, C) in 0..255, rounded to nearest."""
    levels = (images.float().clamp(-1, 1) + 1).mul(127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_uint16(images: Tensor) -> np.ndarray:
    """Convert (B, C, H, W) in [-1, 1] to (B, H, W, C) in 0..65535, rounded to nearest."""
    levels = (images.cpu().double().clamp(-1, 1) + 1).mul(32767.5).round()
    return levels.permute(0, 2, 3, 1).numpy().astype(np.uint16)


def _from_tensor(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.numel() == 0:
        raise UserError(f"a tensor of images must be (B, C, H, W), not {tuple(images.shape)}")
    if not images.is_floating_point():
        raise UserError(f"a tensor of images must be float in [-1, 1], not {images.dtype}")
    low, high = (value.item() for value in images.aminmax())
    if not -2.0 <= low <= high <= 2.0:
        raise UserError(f"a tensor of images must lie in [-1, 1], not in [{low:g}, {high:g}]")
    return images.float()


def _from_array(images: np.ndarray, channels: int) -> Tensor:
    if images.ndim not in (3, 4) or images.shape[-1] != channels or images.size == 0:
        raise UserError(
            f"an array of images must be (H, W, {channels}) or (B, H, W, {channels}), not "
            f"{tuple(images.shape)}"
        )
    if images.dtype == np.uint8:
        unit = images.astype(np.float32) / 127.5 - 1
    elif images.dtype == np.uint16:
        unit = images.astype(np.float32) / 32767.5 - 1
    elif np.issubdtype(images.dtype, np.floating):
        low, high = images.min(), images.max()
        if not -1e-3 <= low <= high <= 1 + 1e-3:
            raise UserError(
                f"a float array of images must lie in [0, 1], not in [{low:g}, {high:g}]"
            )
        unit = images.astype(np.float32) * 2 - 1
    else:
        raise UserError(
            f"an array of images must be uint16, uint8 or float in [0, 1], not {images.dtype}"
        )
    batch = torch.from_numpy(unit).reshape(-1, *images.shape[-3:])
    return batch.permute(0, 3, 1, 2).contiguous()


def _from_pil(images: Sequence[Image.Image], channels: int) -> Tensor:
    from latentvae.data import PixelFormat, to_tensor
    from latentvae.data.pixels import BadPixels
    from latentvae.data.reading import in_format

    if not images:
        raise UserError("the list of images is empty")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sizes[:3])
        raise UserError(
            f"all images of a batch must have one size, not {shown}: give them one by one"
        )
    pixels = PixelFormat(channels, keep_depth=channels != 3)
    try:
        return torch.stack([to_tensor(in_format(image, pixels)) for image in images])
    except BadPixels as error:
        raise UserError(
            f"an image cannot be read: {error}. Give a tensor in [-1, 1] instead."
        ) from error
