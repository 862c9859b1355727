"""Define the plan of an evaluation: what it measures, and with which settings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from latentvae.errors import UserError, nearest
from latentvae.losses.lpips_weights import Net

KERNEL_IMAGES = 2000  # largest number of images for a kernel distance, evenly spread
QUICK_IMAGES = 8  # images that `--quick` measures by default

LatentKind = Literal["mode", "sample"]
Section = Literal["distortion", "rate", "latent", "passport", "tiling", "speed"]
SECTIONS: tuple[Section, ...] = get_args(Section)


@dataclass(frozen=True)
class Plan:
    """What an evaluation measures (its sections), and the settings of each section.

    To skip a measurement, set `lpips_nets`, `qualities`, `noise_psnr` or `speed_sizes` to an empty
    tuple, or `passport_images` to 0.

    Args:
        sections: names of the sections to measure. There are six sections, here in the order of
            `SECTIONS`: metrics of reconstructions, rates of models and codecs, statistics of
            latents or tokens, half precision, tiles, and speed.
        lpips_nets: backbones of LPIPS. With `"vgg"`, the report also has distances between the sets
            of originals and reconstructions (`fd_vgg`, `kd_vgg`).
        qualities: quality settings of each image codec, 1 to 100.
        noise_psnr: PSNRs in dB of the noise that rounding the latent adds to the image. Each value
            gives one quantiser step for each channel, and so one point of the rate curve (see
            `coding.latent_codec`).
        prior_images: largest number of images that an entropy model is fitted on. Each half of the
            images has its own entropy model.
        gain_images: number of images, among the `prior_images`, on which the decoder's gains are
            measured. A gain says how strongly an error in a latent channel changes the image.
        passport_images: number of images for the checks of half precision and tiles.
        passport_side: largest side in pixels to which images are cropped for the precision check.
        tiling_size: limits in pixels to which images are cropped for the tiling check: one limit
            for the shorter side, and one for the longer side. Most published networks decode in
            tiles of 512 pixels, so a larger image has borders between tiles.
        speed_sizes: sides in pixels of the images for the speed measurement.
        speed_budget: largest time in seconds of encoding or decoding one image. Image sizes that
            need more time are skipped.
        latent: which latent is decoded: the mode of the posterior, or a sample.
        resolution: pixels on a side after resize and centre crop, or (height, width). None keeps
            each image's size.
        buckets: largest number of shapes, each with about as many pixels as an image of
            `resolution`. Each image gets the shape nearest to its own, as in training with
            `aspect_ratio_buckets`. With 0, all images get the shape `resolution`.
        ignore_icc: use the stored pixel values of files with an embedded colour profile. By default
            these files are converted to sRGB.
    """

    sections: tuple[Section, ...] = SECTIONS

    lpips_nets: tuple[Net, ...] = ("alex", "vgg")
    qualities: tuple[int, ...] = (1, 5, 10, 20, 35, 50, 70, 85, 95)
    noise_psnr: tuple[float, ...] = (15, 22, 29, 36)
    prior_images: int = 16
    gain_images: int = 2
    passport_images: int = 2
    passport_side: int = 512
    tiling_size: tuple[int, int] = (768, 768)
    speed_sizes: tuple[int, ...] = (256, 512, 1024)
    speed_budget: float = 60.0
    latent: LatentKind = "mode"
    resolution: int | tuple[int, int] | None = None
    buckets: int = 0
    ignore_icc: bool = False

    def __post_init__(self) -> None:
        for section in self.sections:
            if section not in SECTIONS:
                raise UserError(
                    f"sections must be some of {', '.join(SECTIONS)} (got '{section}')"
                    f"{nearest(section, SECTIONS)}"
                )
        if not self.sections:
            raise UserError(f"sections must name at least one of {', '.join(SECTIONS)}.")
        if self.latent not in ("mode", "sample"):
            raise UserError(f"latent must be 'mode' or 'sample' (got '{self.latent}').")
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"resolution must be at least 1 (got {self.resolution}).")
        if self.buckets < 0 or (self.buckets and self.resolution is None):
            raise UserError(
                f"aspect_ratio_buckets must be at least 0 (got {self.buckets}) and needs a "
                f"resolution (got {self.resolution}), such as 256."
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that images are resized to, or None for their own sizes."""
        if isinstance(self.resolution, int):
            return self.resolution, self.resolution
        return self.resolution

    @property
    def measures_images(self) -> bool:
        """Whether a section of the plan needs the models' results on every image."""
        return bool({"distortion", "rate", "latent"} & set(self.sections))

    def only(self, sections: Sequence[str]) -> "Plan":
        """Return a plan with only the given `sections` and the settings that they need.

        Raises:
            UserError: a section has an unknown name, or `sections` is empty.
        """
        known = [section for section in SECTIONS if section in sections]
        unknown = [section for section in sections if section not in SECTIONS]
        nets = self.lpips_nets if "distortion" in sections else ()
        rate = "rate" in sections
        return replace(
            self,
            sections=(*known, *unknown),
            lpips_nets=nets or (("alex",) if rate else ()),
            qualities=self.qualities if rate else (),
            noise_psnr=self.noise_psnr if rate else (),
            speed_sizes=self.speed_sizes if "speed" in sections else (),
        )


FULL = Plan()
QUICK = Plan(
    lpips_nets=("alex",),
    qualities=(10, 50, 90),
    noise_psnr=(30,),
    prior_images=4,
    gain_images=1,
    passport_images=1,
    passport_side=256,
    tiling_size=(256, 768),
    speed_sizes=(256,),
    speed_budget=10.0,
)
METRICS_ONLY = Plan(qualities=(), noise_psnr=(), passport_images=0, speed_sizes=())
