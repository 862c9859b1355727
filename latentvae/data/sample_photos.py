"""Sample photos of this package, scikit-image, scikit-learn and matplotlib, as an image source."""

import importlib.util
from pathlib import Path

from latentvae.data.pixels import Picture, PixelFormat
from latentvae.data.reading import read_image
from latentvae.data.sizes import read_size
from latentvae.errors import UserError, nearest

SAMPLES = "samples"
# Photographs, by the package and the folder in the package that contain them. Both views of the
# motorcycle are for training, so that no scene is in both splits. The grey textures of scikit-image
# (brick, grass, gravel, moon) are left out: without them, a short training does better on new
# colour photos. The photos of this package make it better still (docs/experiments/demo.md).
SAMPLE_PHOTOS = {
    "train": {
        ("latentvae", "data/photos"): (
            "brushes.jpg dandelions.jpg dogs.jpg drum.jpg fig.jpg meadow.jpg mountains.jpg "
            "stream.jpg sunset.jpg"
        ).split(),
        ("skimage", "data"): (
            "astronaut.png camera.png coins.png hubble_deep_field.jpg ihc.png motorcycle_left.png "
            "motorcycle_right.png retina.jpg rocket.jpg"
        ).split(),
        ("sklearn", "datasets/images"): ["china.jpg", "flower.jpg"],
        ("matplotlib", "mpl-data/sample_data"): ["grace_hopper.jpg"],
    },
    "validation": {("skimage", "data"): ["chelsea.png", "coffee.png"]},
}
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}


class SamplePhotos:
    """An image source with the photos of `SAMPLE_PHOTOS`, decoded and kept in memory.

    Args:
        split: ``"train"`` (21 photos) or ``"validation"`` (2 photos of other scenes).
        pixels: the format of every photo. None means 8-bit RGB.

    Raises:
        UserError: there is no such split, or a photo is not installed.
    """

    def __init__(self, split: str, *, pixels: PixelFormat | None = None) -> None:
        if split not in SAMPLE_PHOTOS:
            near = nearest(split, SAMPLE_PHOTOS)
            raise UserError(
                f"the sample photos have no split '{split}', only train and validation{near}"
            )
        found = [
            _folder(package) / folder / name
            for (package, folder), names in SAMPLE_PHOTOS[split].items()
            for name in names
        ]
        self.files = sorted(found, key=lambda file: file.name)
        if missing := [file for file in self.files if not file.is_file()]:
            raise UserError(f"the sample photo '{missing[0]}' is missing. Use images of your own.")
        self.pixels = pixels
        self._decoded: dict[int, Picture] = {}

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int, /) -> str:
        return self.files[index].name

    def read(self, index: int, /, *, at_least: int | None = None) -> Picture:
        """Return the photo at full size. ``at_least`` has no effect."""
        if index not in self._decoded:
            self._decoded[index] = read_image(self.files[index], pixels=self.pixels)
        return self._decoded[index]

    def size(self, index: int, /) -> tuple[int, int]:
        return read_size(self.files[index], name=self.name(index))


def _folder(package: str) -> Path:
    """Return the folder of an installed package, without an import of the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = DISTRIBUTIONS[package]
        raise UserError(
            f"some of the sample photos come with {name}, which is not installed. Run "
            f"`pip install {name}`."
        )
    return Path(spec.origin).parent
