from importlib import import_module

import numpy as np
import pytest
from PIL import Image
from skimage import data

from latentvae.data import UnreadableImage
from latentvae.losses.perceptual import PerceptualLoss, load_lpips


def photo(width: int = 64, height: int = 48, *, left: int = 100) -> Image.Image:
    """A photograph without black or white, so that a shift is not clamped."""
    part = data.chelsea()[100 : 100 + height, left : left + width]
    return Image.fromarray(np.clip(part, 40, 215))


class Photos:
    """An image source of a few pictures in memory; None stands for an unreadable one."""

    def __init__(self, *pictures: Image.Image | None) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int, /) -> str:
        return f"{index}.png"

    def read(self, index: int, /, *, at_least: int | None = None) -> Image.Image:
        picture = self.pictures[index]
        if picture is None:
            raise UnreadableImage(self.name(index), "it is broken")
        return picture

    def size(self, index: int, /) -> tuple[int, int]:
        return self.read(index).size


# The function of this name is all that the package shows of the module.
evaluate_module = import_module("latentvae.evaluation.evaluate")


@pytest.fixture(scope="session")
def lpips() -> dict[str, PerceptualLoss]:
    return {"alex": PerceptualLoss(load_lpips("alex"))}
