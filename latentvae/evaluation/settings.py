"""The plan of an evaluation: what it measures, and how finely."""

from dataclasses import dataclass
from typing import Literal

from latentvae.errors import UserError
from latentvae.losses.lpips_weights import Net

KERNEL_IMAGES = 2000  # most images, evenly spread, whose features are kept in memory
QUICK_IMAGES = 8  # images that `--quick` measures by default

LatentKind = Literal["mode", "sample"]


@dataclass(frozen=True)
class Plan:
    """Sections of an evaluation and their settings. An empty tuple or 0 leaves a section out.

    Args:
        lpips_nets: trunks of LPIPS. `"vgg"` is also used for the distribution distances.
        qualities: settings of each image codec, 1 to 100.
        noise_psnr: points of a continuous latent's rate curve in dB, see `coding.latent_codec`.
        prior_images: images that each half's entropy model is fitted on.
        gain_images: number of these images that the decoder's gains are measured on.
        passport_images: images of the precision and tiling checks.
        speed_sizes: pixels on a side.
        speed_budget: seconds. A size that would take longer is skipped.
        latent: the posterior's mode, or a draw from it.
        resolution: pixels on a side after resizing and centre crop. None keeps each image's size.
        ignore_icc: keep the stored numbers of files with an embedded colour profile.
    """

    lpips_nets: tuple[Net, ...] = ("alex", "vgg")
    qualities: tuple[int, ...] = (1, 5, 10, 20, 35, 50, 70, 85, 95)
    noise_psnr: tuple[float, ...] = (15, 20, 25, 30, 35, 42)
    prior_images: int = 16
    gain_images: int = 2
    passport_images: int = 2
    speed_sizes: tuple[int, ...] = (256, 512, 1024)
    speed_budget: float = 60.0
    latent: LatentKind = "mode"
    resolution: int | None = None
    ignore_icc: bool = False

    def __post_init__(self) -> None:
        if self.latent not in ("mode", "sample"):
            raise UserError(f"latent must be 'mode' or 'sample' (got '{self.latent}').")
        if self.resolution is not None and self.resolution < 1:
            raise UserError(f"resolution must be at least 1 (got {self.resolution}).")


FULL = Plan()
QUICK = Plan(
    lpips_nets=("alex",),
    qualities=(5, 20, 50, 80, 95),
    noise_psnr=(18, 25, 34),
    prior_images=4,
    gain_images=1,
    passport_images=1,
    speed_sizes=(256,),
    speed_budget=10.0,
)
METRICS_ONLY = Plan(qualities=(), noise_psnr=(), passport_images=0, speed_sizes=())
