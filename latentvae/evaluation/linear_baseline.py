"""Measure a linear code (principal components of patches) as a baseline of the report.

The linear code has as many numbers as a model's latent. A network that reconstructs worse than
the linear code has learned little. The images are split into two halves: images at even positions
and images at odd positions. A linear code is fitted on each half of the images and measured on the
other half.

`f` side of a patch, `d` numbers per patch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from latentvae.evaluation.measures import Judge, Means, Original, Row, row
from latentvae.evaluation.picture_source import Pictures
from latentvae.evaluation.protocol import LATENT_BITS
from latentvae.evaluation.saved_progress import Arrays
from latentvae.linear_code import LinearCode, PatchMoments
from latentvae.metrics import to_8bit
from latentvae.report.schema import IMAGE_COLUMNS, Metrics, ModelReport, Rate

LINEAR = "linear"  # name of the first linear code in the report
FIT_IMAGES = 256  # largest number of images of each half that the fit uses, evenly spread
MAX_VALUES = 3 * 32 * 32  # largest number of values of a patch
NETS = ("alex",)  # backbones of the LPIPS that is measured for a linear code


class LinearBaseline:
    """Fits linear codes (principal components of patches), and measures their reconstructions.

    One code is fitted on the images at even positions, and one on the images at odd positions (the
    two halves). The images of each half are coded with the linear code of the other half.

    Args:
        name: name of the linear code in the report.
        f: side of a patch in pixels.
        d: numbers per patch.

    Attributes:
        halves: the linear codes that were fitted on the two halves of the images. Empty if both
            halves have too few patches.
        own: whether the images of one half are coded with the linear code of their own half,
            because the other half has too few patches.
    """

    def __init__(self, name: str, *, f: int, d: int, judge: Judge) -> None:
        self.name, self.f, self.d, self.judge = name, f, d, judge
        self.halves: list[LinearCode] = []
        self.own = False
        self.means = Means()

    def fit(self, pictures: Pictures) -> bool:
        """Fit a linear code on each half of the images. Return whether there are enough patches.

        If one half has too few patches, the linear code of the other half codes all images.
        """
        found = [self._fit(pictures, parity) for parity in (0, 1)]
        usable = [code for code in found if code is not None]
        self.own = len(usable) == 1
        self.halves = [code or usable[0] for code in found] if usable else []
        return bool(usable)

    def _fit(self, pictures: Pictures, parity: int) -> LinearCode | None:
        positions = range(parity, len(pictures), 2)
        moments = PatchMoments(self.f)
        if positions:
            for _, images in pictures.some(FIT_IMAGES, positions=positions):
                moments.update(images)
        return moments.linear_code(self.d) if moments.moments.count > self.d else None

    @torch.no_grad()
    def update(self, original: Original) -> list[Row]:
        """Measure one picture and return its row. Return an empty list if no code was fitted."""
        if not self.halves:
            return []
        code = self.halves[1 - original.position % 2].to(original.images.device)
        z = code.encode(original.images)
        size = original.images.shape[2], original.images.shape[3]
        recon = to_8bit(code.decode(z, size=size))

        metrics = self.judge.compare(original, recon, nets=NETS).metrics
        bpp = LATENT_BITS * z.numel() / original.pixels
        rows = [row(original, "model", self.name, bpp=bpp, **metrics)]
        self.means.update(rows, position=original.position)
        return rows

    def report(self) -> ModelReport:
        """Return the linear code's part of the report, in the same form as a model's part."""
        metrics = {name: self.means.mean("model", self.name, name) for name in IMAGE_COLUMNS}
        raw = self.means.mean("model", self.name, "bpp")
        return ModelReport(
            metrics=Metrics(**metrics),
            rate=None if raw is None else Rate(raw_bpp=raw.mean),
            info={"class": "LinearCode", "f": self.f, "latent_channels": self.d},
            warnings=[
                "The linear code was fitted on the images that it codes, because the other "
                "images have too few patches. So the measured errors of the linear code are too "
                "small."
            ]
            if self.own
            else [],
        )

    def state_dict(self) -> Arrays:
        arrays = {f"means.{name}": value for name, value in self.means.state_dict().items()}
        arrays["own"] = np.array(self.own)
        for number, code in enumerate(self.halves):
            arrays |= {f"{number}.{name}": value.numpy() for name, value in vars(code).items()}
        return arrays

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        self.own = bool(state["own"])
        self.halves = [
            LinearCode(
                *(torch.from_numpy(state[f"{n}.{name}"]) for name in ("mean", "basis", "variances"))
            )
            for n in range(2 * ("0.mean" in state))
        ]
        prefix = "means."
        self.means.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )


def baselines(
    shapes: Sequence[tuple[int, int]], *, judge: Judge
) -> dict[tuple[int, int], LinearBaseline]:
    """Return a `LinearBaseline` for each different (patch side f, numbers d) in `shapes`.

    The first baseline is called `linear`. There is no baseline if d is at least the number of
    values of a patch, because a linear code would then be exact. There is also no baseline if a
    patch has more than `MAX_VALUES` values, because the fit would take too long.
    """
    found: dict[tuple[int, int], LinearBaseline] = {}
    for f, d in shapes:
        if (f, d) not in found and d < 3 * f * f <= MAX_VALUES:
            name = f"{LINEAR} f{f} d{d}" if found else LINEAR
            found[f, d] = LinearBaseline(name, f=f, d=d, judge=judge)
    return found


def verdict(model: ModelReport, linear: ModelReport) -> str | None:
    """Return a warning if the model's mean PSNR is below that of the linear code, else None."""
    ours, theirs = model.metrics, linear.metrics
    if ours.psnr is None or theirs.psnr is None or ours.psnr.mean >= theirs.psnr.mean:
        return None
    text = (
        f"PSNR {ours.psnr.mean:.2f} dB is below the {theirs.psnr.mean:.2f} dB of a linear code of "
        f"the same size"
    )
    if ours.lpips_alex is None or theirs.lpips_alex is None:
        return f"{text}."
    lpips = f"LPIPS {ours.lpips_alex.mean:.3f}, linear code {theirs.lpips_alex.mean:.3f}"
    if ours.lpips_alex.mean >= theirs.lpips_alex.mean:
        return f"{text}, and the LPIPS is no better ({lpips}). The network needs more training."
    return f"{text}, but the LPIPS is better ({lpips})."
