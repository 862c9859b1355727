"""Define what report.json contains: what was measured and how.

A part that was not measured is absent.

Means are over images. `bpp` is the size of real files in bits per pixel of the image, after the
resizing that the protocol states. `raw_bpp` is the rate without entropy coding, with the number of
bits per element of the latent that the protocol states. PSNR is in dB. Equal images have an
infinite PSNR, which JSON writes as the string "Infinity".

`report.schema.json` in this folder is the JSON Schema of report.json. `make schema` writes it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from latentvae.errors import UserError
from latentvae.files import read_text

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")

Unbounded = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "Infinity"}]})]
"""A float that may be infinite."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Mean(_Part):
    """A mean over `images` images with its 95 % bootstrap interval (low, high).

    `infinite` counts images with an infinite value (PSNR of an exact copy). These images are left
    out of the mean, unless all values are infinite. A single value has no interval.
    """

    mean: Unbounded
    ci95: tuple[Unbounded, Unbounded] | None = None
    images: int = Field(ge=1)
    infinite: int = Field(default=0, ge=0)

    @property
    def num_values(self) -> int:
        """Number of images in the mean."""
        return self.images - self.infinite or self.images


@dataclass(frozen=True)
class Column:
    """The form of a metric in tables: the column's heading, and digits after the point."""

    heading: str
    digits: int = 4


class Metrics(_Part):
    """Distortion and perceptual metrics. A metric is absent if no image was large enough.

    `psnr` is the mean of the images' PSNR values. `psnr_pooled` is the PSNR of the mean squared
    error over the pixels of all images.
    """

    psnr: Annotated[Mean | None, Column("PSNR (dB)", digits=2)] = None
    psnr_pooled: Unbounded | None = None
    ssim: Annotated[Mean | None, Column("SSIM")] = None
    ms_ssim: Annotated[Mean | None, Column("MS-SSIM")] = None
    lpips_alex: Annotated[Mean | None, Column("LPIPS alex")] = None
    lpips_vgg: Annotated[Mean | None, Column("LPIPS vgg")] = None


IMAGE_COLUMNS: dict[str, Column] = {
    name: fact
    for name, field in Metrics.model_fields.items()
    for fact in field.metadata
    if isinstance(fact, Column)
}
"""Metrics with a value for each image, in the order of tables and per_image.csv."""

Metric = Literal["psnr", "lpips_alex"]
"""Metrics that have rate curves."""


class CurvePoint(_Part):
    """Means of bits per pixel and of a metric over the same `images` images.

    An image counts only if every coder that encodes this image has a finite value of the metric at
    every setting. A coder is a model or an image codec.
    """

    images: int = Field(ge=1)
    bpp: float = Field(ge=0)
    value: float


class Point(_Part):
    """One setting of a coder (model or image codec), with means over all images with a value.

    `images` is the number of images in each mean. These numbers can differ between metrics, because
    an exact copy has no finite PSNR and a small image has no LPIPS. `curves` has, for each metric,
    means over images that are the same for every coder that can store all images.

    The setting of a codec is `quality`. The setting of a continuous latent is `noise_psnr`, the
    PSNR in dB that would result if quantising the latent were the only error. Tokens have no
    setting.
    """

    bpp: float = Field(ge=0)
    psnr: Unbounded
    lpips_alex: float | None = None
    images: dict[str, int] = {}
    curves: dict[Metric, CurvePoint] = {}
    quality: int | None = None
    noise_psnr: float | None = None


class Rate(_Part):
    """Raw bits per pixel of the latent. `points` has measurements of real bitstreams, if any."""

    raw_bpp: float = Field(ge=0)
    points: list[Point] = []


class Distribution(_Part):
    """Distances between the sets of originals and reconstructions. Equal sets have distance 0.

    `fd_vgg` is the Frechet distance and `kd_vgg` the kernel distance on features of LPIPS' VGG16.
    `rfid` and `kid` are the Frechet and the kernel distance on features of the original Inception
    network. Frechet distances need at least 2,000 images. Kernel distances use at most 2,000
    images. `images` is the number of images that each distance uses.
    """

    images: dict[str, int]
    fd_vgg: float | None = None
    kd_vgg: float | None = None
    rfid: float | None = None
    kid: float | None = None


class ModelReport(_Part):
    """All measurements of one model. `info` describes the model.

    `codecs_at_rate` has each image codec at the lowest quality that reaches this model's raw rate,
    or at quality 100 if no quality does. The quality is chosen for each image.

    If the values of a model overflow, there are no metrics, and a warning says so.
    """

    metrics: Metrics = Metrics()
    rate: Rate | None = None
    codecs_at_rate: dict[str, Point] = {}
    distribution: Distribution | None = None
    info: dict[str, Any] = {}
    latent: dict[str, Any] | None = None
    tokens: dict[str, Any] | None = None
    passport: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    warnings: list[str] = []


class BDRate(_Part):
    """Extra bits at equal quality in percent of JPEG's bits. Negative means fewer bits than JPEG.

    BD-rates are computed from the `curves` of points, see `metrics.rate`. A BD-rate is absent if
    the qualities of the curve and of JPEG's curve do not overlap, or if the two curves are means
    over different images.
    """

    psnr: float | None = None
    lpips_alex: float | None = None


class Report(_Part):
    """The content of report.json. `bd_rate` is relative to JPEG, by names of models and codecs."""

    schema_version: Literal[1] = SCHEMA_VERSION
    protocol: dict[str, Any]
    data: dict[str, Any]
    models: dict[str, ModelReport]
    codecs: dict[str, list[Point]]
    bd_rate: dict[str, BDRate] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the absent parts."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        return self.model_dump_json(exclude_none=True, indent=2)

    def write(self, path: Path) -> None:
        path.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read a report.json. Raise UserError if the file is not a report of this version."""
        text = read_text(path)
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            lines = str(error).splitlines()
            reason = " ".join(line.strip() for line in lines[1:3]) or lines[0]
            raise UserError(
                f"'{path}' is not a report of this version of latentvae: {reason}. Measure again "
                "with `latentvae evaluate`."
            ) from error


def json_schema() -> str:
    """Return the JSON Schema of report.json (draft 2020-12)."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema | Report.model_json_schema(), indent=2) + "\n"
