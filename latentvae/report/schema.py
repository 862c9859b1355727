"""report.json: what a benchmark measured and how. A part that was not measured is absent.

Means are over images. `bpp` is bits per pixel of the source image, of real files; `raw_bpp` counts
the latent's elements at a stated width instead, with no entropy coding.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Mean(_Part):
    """A mean over `images` images with its 95 % bootstrap interval (low, high)."""

    mean: float
    ci95: tuple[float, float]
    images: int = Field(ge=1)


class Metrics(_Part):
    """Distortion and perception; PSNR in dB. Absent where no image was large enough."""

    psnr: Mean | None = None
    ssim: Mean | None = None
    ms_ssim: Mean | None = None
    lpips_alex: Mean | None = None
    lpips_vgg: Mean | None = None


class Point(_Part):
    """One point of a rate curve: means over all images at one setting of the coder."""

    bpp: float = Field(ge=0)
    psnr: float
    lpips_alex: float | None = None
    quality: int | None = None


class Rate(_Part):
    """`raw_bpp` of the latent, and points measured on real bitstreams, if there are any."""

    raw_bpp: float = Field(ge=0)
    points: list[Point] = []


class ModelReport(_Part):
    """All that was measured of one model; `info` is what the model says about itself."""

    metrics: Metrics
    rate: Rate
    info: dict[str, Any] = {}
    latent: dict[str, Any] | None = None
    tokens: dict[str, Any] | None = None
    passport: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None


class Report(_Part):
    """The whole of report.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    protocol: dict[str, Any]
    data: dict[str, Any]
    models: dict[str, ModelReport]
    codecs: dict[str, list[Point]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the absent parts."""
        return self.model_dump(mode="json", exclude_none=True)

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(exclude_none=True, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Report":
        return cls.model_validate_json(path.read_text(encoding="utf-8"))
