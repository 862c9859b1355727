"""Read the pictures of an evaluation, and collect facts about them for the report."""

import hashlib
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentvae.data import EvalTransform, ImageSource, UnreadableImage, spread, to_tensor
from latentvae.errors import printable
from latentvae.metrics import to_8bit
from latentvae.pictures import to_pil, to_uint8

_MODULUS = 1 << 256


class Pictures:
    """Reads chosen images of a source, and resizes them as the evaluation's protocol says.

    Each image is returned as a tensor (1, 3, H, W) in [-1, 1], rounded to 8 bits.

    Args:
        indices: indices of the images in the source, in the order of the evaluation.
        sizes: (height, width) of the shapes that images are resized and cropped to. Each image
            gets the shape of the nearest aspect ratio. Without shapes, each image keeps its size.
    """

    def __init__(
        self, source: ImageSource, indices: Sequence[int], *, sizes: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.source, self.indices = source, list(indices)
        self._transforms = {
            width / height: EvalTransform((height, width)) for height, width in sizes
        }

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, position: int) -> str:
        return self.source.name(self.indices[position])

    def size(self, position: int) -> tuple[int, int]:
        """Return the (width, height) in the image's header. Raise UnreadableImage if unreadable."""
        return self.source.size(self.indices[position])

    def read(self, position: int) -> Tensor:
        """Return the picture (1, 3, H, W). Raise UnreadableImage if the picture is unreadable."""
        picture = self.source.read(self.indices[position])
        assert isinstance(picture, Image.Image)  # the source was opened without a pixel format
        picture = picture.convert("RGB")
        return to_8bit(self._transform(picture.width / picture.height)(picture))[None]

    def _transform(self, aspect: float) -> Callable[[Image.Image], Tensor]:
        """Return the transform to the shape whose width / height is nearest to `aspect`."""
        if not self._transforms:
            return to_tensor
        nearest = min(self._transforms, key=lambda own: abs(math.log(own / aspect)))
        return self._transforms[nearest]

    def some(
        self, at_most: int, *, positions: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield up to `at_most` evenly spread pictures, each with its position.

        If a chosen picture cannot be read, another picture replaces it.

        Args:
            positions: positions to choose from. None takes all positions.
        """
        positions = range(len(self)) if positions is None else positions
        chosen = [positions[i] for i in spread(len(positions), at_most)]
        others = (position for position in positions if position not in chosen)
        found = 0
        for position in itertools.chain(chosen, others):
            if found == at_most:
                return
            try:
                images = self.read(position)
            except UnreadableImage:
                continue
            found += 1
            yield position, images


class Seen:
    """Collects facts about the measured images: number, sizes, hash of all pixels, read errors.

    The hash is the sum of the sha256 of each image, modulo 2 ** 256. So the hash does not depend on
    the order of the images, and it can be continued from a saved state.
    """

    def __init__(self) -> None:
        self.count, self._hash = 0, 0
        self.sizes: Counter[str] = Counter()
        self.unreadable: list[str] = []

    def add(self, images: Tensor) -> None:
        """Add an image (1, 3, H, W) in [-1, 1], rounded to 8 bits."""
        pixels = to_uint8(images)[0]  # (H, W, 3)
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        digest = hashlib.sha256(size.encode() + pixels.tobytes()).digest()
        self._hash = (self._hash + int.from_bytes(digest)) % _MODULUS
        self.sizes[size] += 1
        self.count += 1

    @property
    def mean_pixels(self) -> float:
        """Mean number of pixels of an image, or infinity before the first image."""
        pixels = sum(n * math.prod(map(int, size.split("x"))) for size, n in self.sizes.items())
        return pixels / self.count if self.count else math.inf

    def leave_out(self, name: str, error: UnreadableImage) -> None:
        self.unreadable.append(printable(name))
        tqdm.write(f"left out: {error}", file=sys.stderr)

    def describe(self) -> dict[str, Any]:
        """Return the section of the report that describes the images."""
        return {
            "num_images": self.count,
            "pixels_sha256_sum": f"{self._hash:064x}",
            "commonest_sizes": dict(self.sizes.most_common(10)),
            "unreadable": self.unreadable,
        }

    def state(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "hash": f"{self._hash:x}",
            "sizes": dict(self.sizes),
            "unreadable": self.unreadable,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.count, self._hash = state["count"], int(state["hash"], 16)
        self.sizes, self.unreadable = Counter(state["sizes"]), list(state["unreadable"])


def to_picture(images: Tensor) -> Image.Image:
    """Return an image tensor (1, 3, H, W) in [-1, 1] as an 8-bit PIL image."""
    return to_pil(images)[0]


def center_crop(images: Tensor, *, side: int | tuple[int, int], multiple: int) -> Tensor:
    """Return the centre of a picture (1, 3, H, W). `multiple` divides the sides of the result.

    A picture whose shorter side is less than `multiple` pixels is enlarged first.

    Args:
        side: largest side of the result in pixels. A pair gives two limits: for the shorter side
            and for the longer side.
    """
    height, width = images.shape[2:]
    if min(height, width) < multiple:
        scale = multiple / min(height, width)
        size = (max(round(height * scale), multiple), max(round(width * scale), multiple))
        images = torch.nn.functional.interpolate(images, size, mode="bilinear")
        height, width = size
    shorter, longer = (side, side) if isinstance(side, int) else side
    limits = (shorter, longer) if height <= width else (longer, shorter)
    rows, columns = (
        max(min(length, limit) // multiple, 1) * multiple
        for length, limit in zip((height, width), limits, strict=True)
    )
    top, left = (height - rows) // 2, (width - columns) // 2
    return images[:, :, top : top + rows, left : left + columns]
