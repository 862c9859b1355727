"""All measurements of one model, picture by picture."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentvae.autoencoder import Autoencoder, NotFiniteError
from latentvae.coding.latent_codec import channel_steps, decode_latent, encode_latent
from latentvae.coding.token_codec import MAX_CODES, decode_tokens, encode_tokens
from latentvae.evaluation.curves import Curves
from latentvae.evaluation.entropy_models import Priors
from latentvae.evaluation.measures import Judge, Means, Original, PooledError, Row, row
from latentvae.evaluation.protocol import LATENT_BITS
from latentvae.evaluation.saved_progress import Accumulator
from latentvae.evaluation.settings import KERNEL_IMAGES, Plan
from latentvae.metrics import to_8bit
from latentvae.metrics.distribution import FrechetDistance, KernelDistance
from latentvae.metrics.latent import LatentHealth
from latentvae.metrics.tokens import TokenUsage
from latentvae.models import calls
from latentvae.report.schema import (
    IMAGE_COLUMNS,
    Distribution,
    Metrics,
    ModelReport,
    Point,
    Rate,
)

MIN_FRECHET_IMAGES = 2000  # with fewer, the distance is mostly bias: covariances lack rank
MAX_CORRELATED = 64  # channels whose correlations are listed one by one
DISTANCES = {"vgg": ("fd_vgg", "kd_vgg"), "inception": ("rfid", "kid")}  # Frechet, kernel


class ModelMeasures:
    """Measures a model picture by picture, and gives its part of the report.

    Args:
        name: the model's name in the report.
        num_pictures: number of pictures in the evaluation.

    Attributes:
        priors: for the bitstream of a continuous latent. None if it is not measured.
        failure: why the model is no longer measured, or None.
    """

    def __init__(
        self, name: str, model: Autoencoder, *, judge: Judge, plan: Plan, num_pictures: int
    ) -> None:
        self.name, self.model, self.judge, self.plan = name, model, judge, plan
        self.priors = Priors() if plan.noise_psnr and not model.num_codes else None
        # A kernel distance keeps all features in memory, so it may use only every n-th picture.
        self.kernel_stride = max(1, -(-num_pictures // KERNEL_IMAGES))
        self.failure: str | None = None
        self.means, self.pooled = Means(), PooledError()
        self.distances: dict[str, FrechetDistance | KernelDistance] = {}
        for extractor, width in judge.extractors.items():
            frechet, kernel = DISTANCES[extractor]
            self.distances |= {frechet: FrechetDistance(width), kernel: KernelDistance()}
        self.latent = None if model.num_codes else LatentHealth(model.latent_channels)
        codes = calls.codes(model.net)
        self.tokens = None if codes is None else TokenUsage(codes.number, codebooks=codes.codebooks)

    def parts(self) -> dict[str, Accumulator]:
        """Return the parts that are saved so that an evaluation can continue."""
        kept = {
            "means": self.means,
            "pooled": self.pooled,
            "latent": self.latent,
            "priors": self.priors,
            "tokens": self.tokens,
            **self.distances,
        }
        return {name: part for name, part in kept.items() if part is not None}

    @torch.no_grad()
    def update(self, original: Original) -> list[Row]:
        """Measure one picture and return its rows.

        Raises:
            NotFiniteError: the model overflows in the precision it is measured in.
        """
        # reconstruct and compare
        mean, logvar = self.model.encode_posterior(original.images)
        if not mean.isfinite().all():
            raise NotFiniteError(self.name, mean.dtype)
        z = mean if logvar is None else self._latent(mean, logvar, original.position)
        recon = self._decode(z, original)
        compared = self.judge.compare(original, recon)
        bpp = raw_bits(self.model, z) / original.pixels
        rows = [row(original, "model", self.name, bpp=bpp, **compared.metrics)]

        # bitstream
        if self.tokens is not None:
            rows += self._token_rows(original, z, self.tokens)
        elif self.priors is not None:
            rows += self._bitstream_rows(original, mean, self.priors)

        # sums over pictures
        if self.latent is not None:
            self.latent.update(mean, logvar=logvar)
        self.pooled.update(original.images, recon)
        self.means.update(rows, position=original.position)
        features = self.judge.features_of(original)
        for extractor, values in compared.features.items():
            frechet, kernel = DISTANCES[extractor]
            self.distances[frechet].update(features[extractor], values)
            if original.position % self.kernel_stride == 0:
                self.distances[kernel].update(features[extractor], values)
        return rows

    def report(
        self, *, curves: Curves, passport: Mapping[str, Any] | None, speed: Any | None
    ) -> ModelReport:
        """Return the model's part of the report, with passport and speed if they were measured."""
        if self.failure is not None:
            return ModelReport(info=self._info(), warnings=[self.failure])

        # parts that bring warnings
        latent = self._latent_report()
        passport = None if passport is None else dict(passport)
        warnings = [
            *(latent or {}).pop("warnings", []),
            *self._bitstream_warnings(),
            *(passport or {}).pop("warnings", []),
        ]

        # all parts
        metrics = {name: self._mean(name) for name in IMAGE_COLUMNS}
        return ModelReport(
            metrics=Metrics(**metrics, psnr_pooled=self.pooled.psnr),
            rate=Rate(raw_bpp=self._mean("bpp").mean, points=self._points(curves)),
            distribution=self._distribution(),
            info=self._info(),
            latent=latent,
            tokens=None if self.tokens is None else dict(self.tokens.result()),
            passport=passport,
            speed=speed,
            warnings=warnings,
        )

    def _bitstream_warnings(self) -> list[str]:
        warnings = []
        if self.priors is not None and self.priors.own:
            warnings.append(
                "The bitstream's entropy model was fitted on the images that it codes, because "
                "there are no others. Its bits are too few."
            )
        if (self.model.num_codes or 0) > MAX_CODES:
            warnings.append(
                f"No bitstream is measured: tokens of at most {MAX_CODES:,} codes can be coded "
                f"(the model has {self.model.num_codes:,})."
            )
        return warnings

    def _info(self) -> dict[str, Any]:
        path = {} if self.model.path is None else {"path": self.model.path}
        return self.model.info() | path

    def _latent(self, mean: Tensor, logvar: Tensor, position: int) -> Tensor:
        if self.plan.latent == "mode":
            return mean
        generator = torch.Generator().manual_seed(position)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return mean + (0.5 * logvar).exp() * noise

    def _decode(self, z: Tensor, original: Original) -> Tensor:
        height, width = original.images.shape[2:]
        images: Any = self.model.decode(z, size=(height, width))
        return to_8bit(images).to(original.images.device)

    def _token_rows(self, original: Original, z: Tensor, usage: TokenUsage) -> list[Row]:
        """Code the tokens, decode the bytes, and measure what is decoded.

        There is no row if the model has more than MAX_CODES codes.
        """
        assert self.model.num_codes is not None
        indices = calls.tokenize(self.model.net, z)
        usage.update(indices)
        if self.model.num_codes > MAX_CODES:
            return []
        content = encode_tokens(indices[0].cpu().numpy(), num_codes=self.model.num_codes)
        decoded = torch.from_numpy(decode_tokens(content))[None].to(z.device)
        size = original.images.shape[2], original.images.shape[3]
        images: Any = self.model.decode_tokens(decoded, size=size)
        recon = to_8bit(images).to(original.images.device)
        return [self._bitstream_row(original, content, recon, setting=None)]

    def _bitstream_rows(self, original: Original, mean: Tensor, priors: Priors) -> list[Row]:
        half, rows = priors.other(original.position), []
        for level in self.plan.noise_psnr:
            steps = channel_steps(half.gains, noise_psnr=level, f=self.model.f)
            content = encode_latent(mean[0].float().cpu(), prior=half.prior, steps=steps)
            recon = self._decode(decode_latent(content)[None], original)
            rows.append(self._bitstream_row(original, content, recon, setting=level))
        return rows

    def _bitstream_row(
        self, original: Original, content: bytes, recon: Tensor, *, setting: float | None
    ) -> Row:
        bpp = 8 * len(content) / original.pixels
        metrics = self.judge.compare_point(original, recon)
        return row(original, "bitstream", self.name, setting=setting, bpp=bpp, **metrics)

    def _mean(self, column: str) -> Any:
        return self.means.mean("model", self.name, column)

    def _points(self, curves: Curves) -> list[Point]:
        levels = self.plan.noise_psnr if self.priors is not None else ()
        settings = levels if self.tokens is None else [None]
        return curves.points("bitstream", self.name, settings, means=self.means)

    def _distribution(self) -> Distribution | None:
        """Return the distances that have enough images."""
        least = {name: 2 for _, name in DISTANCES.values()}
        least |= {name: MIN_FRECHET_IMAGES for name, _ in DISTANCES.values()}
        found = {n: part for n, part in self.distances.items() if part.num_images >= least[n]}
        if not found:
            return None
        return Distribution(
            images={name: part.num_images for name, part in found.items()},
            **{name: part.result() for name, part in found.items()},
        )

    def _latent_report(self) -> dict[str, Any] | None:
        if self.latent is None or self.latent.positions < 2:
            return None
        config, normalization = self.model.net.config, self.model.normalization
        known = normalization.fold == 1 and "scaling_factor" in config
        per_channel = {} if normalization.applied else config
        found: dict[str, Any] = dict(
            self.latent.result(
                scaling_factor=normalization.scaling_factor if known else None,
                shift_factor=normalization.shift_factor,
                latents_mean=per_channel.get("latents_mean"),
                latents_std=per_channel.get("latents_std"),
            )
        )
        if self.model.latent_channels > MAX_CORRELATED:
            del found["correlation"]
        return found


def raw_bits(model: Autoencoder, z: Tensor) -> float:
    """Return the bits of one image's latent (1, d, h, w) or tokens without entropy coding."""
    if model.num_codes is None:
        return LATENT_BITS * z.numel()
    tokens = calls.num_levels(model.net) * z.shape[2] * z.shape[3]
    return math.log2(model.num_codes) * tokens
