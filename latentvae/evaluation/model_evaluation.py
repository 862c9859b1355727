"""Measure one model picture by picture: distortion, rate, latents and tokens."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentvae.autoencoder import Autoencoder, NotFiniteError
from latentvae.coding.latent_codec import channel_steps, decode_latent, encode_latent
from latentvae.coding.token_codec import MAX_CODES
from latentvae.evaluation.curves import SIGNS, Curves
from latentvae.evaluation.entropy_models import Posterior, Priors
from latentvae.evaluation.measures import (
    BATCH_PIXELS,
    Judge,
    Means,
    Original,
    PooledError,
    Row,
    row,
)
from latentvae.evaluation.rates import (
    decode_indices,
    encode_indices,
    level_bits_of,
    raw_bits,
)
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

# With fewer images, the covariances lack rank and the Frechet distance is mostly bias.
MIN_FRECHET_IMAGES = 2000
MAX_CORRELATED = 64  # largest number of channels whose correlations a report lists
# Frechet distance and kernel distance of each feature extractor.
DISTANCES = {"vgg": ("fd_vgg", "kd_vgg"), "inception": ("rfid", "kid")}


@dataclass(frozen=True)
class Shown:
    """A reconstruction that sheet.png shows, (1, 3, H, W) rounded to 8 bits, and its raw rate.

    The raw rate is the size of the latent in bits per pixel without entropy coding.
    """

    recon: Tensor
    bpp: float


@dataclass(frozen=True)
class Encoded:
    """A picture in a model's latent space.

    Attributes:
        mean: the posterior's mean, (1, d, h, w), or the latent if there is no posterior.
        z: the latent that is decoded.
        raw_bpp: size of the latent in bits per pixel, without entropy coding.
        seconds: time that `ModelMeasures.encode` took, in seconds.
    """

    mean: Tensor
    z: Tensor
    raw_bpp: float
    seconds: float


class Cost:
    """Measures how many seconds per pixel a model needs to encode and decode a picture."""

    def __init__(self) -> None:
        self.seconds, self.pixels = 0.0, 0

    def update(self, seconds: float, pixels: int) -> None:
        self.seconds += seconds
        self.pixels += pixels

    def of(self, pixels: float) -> float | None:
        """Return the seconds for a picture of `pixels` pixels, or None if nothing was timed."""
        return self.seconds / self.pixels * pixels if self.pixels else None


class ModelMeasures:
    """Measures a model picture by picture, and returns its part of the report.

    Args:
        name: the model's name in the report.
        num_pictures: number of pictures in the evaluation.

    Attributes:
        priors: entropy models of a continuous latent. None if the bitstream of the latent is not
            measured.
        failure: why the model is no longer measured, or None.
        shown: reconstructions for sheet.png by the picture's position. The value is None until the
            picture is measured.
        cost: time of encoding and decoding.
    """

    def __init__(
        self, name: str, model: Autoencoder, *, judge: Judge, plan: Plan, num_pictures: int
    ) -> None:
        self.name, self.model, self.judge, self.plan = name, model, judge, plan
        rate = "rate" in plan.sections and plan.noise_psnr
        self.priors = Priors() if rate and not model.num_codes else None
        # Posteriors by the image's position. They were computed for the fit of the entropy model,
        # and are kept until the image is measured.
        self.encoded: dict[int, Posterior] = {}
        # A kernel distance keeps all features in memory, so it may use only every n-th picture.
        self.kernel_stride = max(1, -(-num_pictures // KERNEL_IMAGES))
        self.failure: str | None = None
        self.shown: dict[int, Shown | None] = {}
        self.cost = Cost()

        # sums over pictures
        self.means, self.codecs, self.pooled = Means(), Means(), PooledError()
        self.distances: dict[str, FrechetDistance | KernelDistance] = {}
        for extractor, width in judge.extractors.items():
            frechet, kernel = DISTANCES[extractor]
            self.distances |= {frechet: FrechetDistance(width), kernel: KernelDistance()}
        health = "latent" in plan.sections and not model.num_codes
        self.latent = LatentHealth(model.latent_channels) if health else None
        codes = calls.codes(model.net)
        if not {"latent", "rate"} & set(plan.sections):
            codes = None
        self.codes = codes
        self.tokens = None if codes is None else TokenUsage(codes.number, codebooks=codes.codebooks)
        self.level_bits = level_bits_of(codes) if self._codes_tokens else None

    def parts(self) -> dict[str, Accumulator]:
        """Return the sums over pictures by name.

        These sums are saved, so that a stopped evaluation can continue.
        """
        kept = {
            "means": self.means,
            "codecs": self.codecs,
            "pooled": self.pooled,
            "latent": self.latent,
            "priors": self.priors,
            "tokens": self.tokens,
            "level_bits": self.level_bits,
            **self.distances,
        }
        return {name: part for name, part in kept.items() if part is not None}

    @torch.no_grad()
    def encode(self, original: Original) -> Encoded:
        """Return the latent of a picture, for `update`.

        Raises:
            NotFiniteError: latents are not finite in the model's dtype.
        """
        start = time.perf_counter()
        mean, logvar = self.encoded.pop(original.position, None) or self.model.encode_posterior(
            original.images
        )
        if not mean.isfinite().all():
            raise NotFiniteError(self.name, mean.dtype)
        z = mean if logvar is None else self._latent(mean, logvar, original.position)
        if self.latent is not None:
            self.latent.update(mean, logvar=logvar)
        raw_bpp = raw_bits(self.model, z) / original.pixels
        return Encoded(mean, z, raw_bpp, time.perf_counter() - start)

    @torch.no_grad()
    def update(self, original: Original, encoded: Encoded) -> list[Row]:
        """Measure one picture and return its rows.

        Raises:
            NotFiniteError: reconstructions are not finite in the model's dtype.
        """
        # reconstruction
        metrics: dict[str, float | None] = {}
        if "distortion" in self.plan.sections:
            start = time.perf_counter()
            recon = self._decode(encoded.z, original)
            seconds = encoded.seconds + time.perf_counter() - start
            self.cost.update(seconds, original.pixels)
            metrics = self._compare(original, recon)
            if original.position in self.shown:
                self.shown[original.position] = Shown(recon.cpu(), encoded.raw_bpp)
        rows = [row(original, "model", self.name, bpp=encoded.raw_bpp, **metrics)]

        # bitstream
        if self.tokens is not None:
            rows += self._token_rows(original, encoded.z, self.tokens)
        elif self.priors is not None:
            rows += self._bitstream_rows(original, encoded.mean, self.priors)
        self.means.update(rows, position=original.position)
        return rows

    def update_codecs(self, rows: Sequence[Row], *, position: int) -> None:
        """Add the metrics of all codecs on one picture, at this model's raw rate, to their means.

        The raw rate is the size of the latent in bits per pixel without entropy coding.

        Rows of different settings have separate means. So the quality setting, which differs
        between pictures, is removed from each row.
        """
        self.codecs.update([replace(entry, setting=None) for entry in rows], position=position)

    def _compare(self, original: Original, recon: Tensor) -> dict[str, float | None]:
        """Return the metrics of `recon`. Update the pooled error and the distribution distances."""
        compared, features = (
            self.judge.compare(original, recon),
            self.judge.features_of(original),
        )
        self.pooled.update(original.images, recon)
        for extractor, values in compared.features.items():
            frechet, kernel = DISTANCES[extractor]
            self.distances[frechet].update(features[extractor], values)
            if original.position % self.kernel_stride == 0:
                self.distances[kernel].update(features[extractor], values)
        return compared.metrics

    @property
    def measured(self) -> bool:
        """Whether any picture was measured."""
        return self._mean("bpp") is not None

    def report(
        self,
        *,
        curves: Curves,
        codecs: Sequence[str],
        passport: Mapping[str, Any] | None,
        speed: Any | None,
    ) -> ModelReport:
        """Return the model's part of the report.

        `passport` (half precision and tiles) and `speed` are None if they were not measured.
        """
        if self.failure is not None:
            return ModelReport(info=self._info(), warnings=[self.failure])

        # parts with warnings
        latent = self._latent_report()
        passport = None if passport is None else dict(passport)
        warnings = [
            *(latent or {}).pop("warnings", []),
            *self._bitstream_warnings(),
            *(passport or {}).pop("warnings", []),
        ]

        # all parts
        metrics = {name: self._mean(name) for name in IMAGE_COLUMNS}
        pooled = self.pooled.psnr if self.pooled.elements else None
        raw = self._mean("bpp")
        return ModelReport(
            metrics=Metrics(**metrics, psnr_pooled=pooled),
            rate=None if raw is None else Rate(raw_bpp=raw.mean, points=self._points(curves)),
            codecs_at_rate=self._codec_points(codecs),
            distribution=self._distribution(),
            info=self._info(),
            latent=latent,
            tokens=self._token_report(),
            passport=passport,
            speed=speed,
            warnings=warnings,
        )

    def _bitstream_warnings(self) -> list[str]:
        warnings = []
        if self.priors is not None and self.priors.own:
            warnings.append(
                "The bitstream's entropy model was fitted on the images that it codes, because "
                "there are no other images. So the measured bits are too few."
            )
        if self._codes_tokens and (self.model.num_codes or 0) > MAX_CODES:
            warnings.append(
                f"No bitstream is measured, because the coder of tokens supports at most "
                f"{MAX_CODES:,} codes (the model has {self.model.num_codes:,})."
            )
        return warnings

    def _info(self) -> dict[str, Any]:
        info = self.model.info()
        if self.model.path is not None:
            info["path"] = self.model.path
        if self.model.optimization.mode != "stock":
            info["optimize"] = self.model.optimization.mode
        return info

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

    @property
    def _codes_tokens(self) -> bool:
        return "rate" in self.plan.sections

    def _token_rows(self, original: Original, z: Tensor, usage: TokenUsage) -> list[Row]:
        """Encode the tokens to bytes, decode the bytes, and measure the decoded picture.

        The returned list is empty if the plan has no section `rate`, or if the model has more than
        MAX_CODES codes.
        """
        assert self.codes is not None
        indices = calls.tokenize(self.model.net, z)
        usage.update(self.codes.by_codebook(indices))
        if not self._codes_tokens or self.codes.number > MAX_CODES:
            return []
        if self.level_bits is not None:
            self.level_bits.update(indices[0], pixels=original.pixels)
        content = encode_indices(indices[0], self.codes)
        decoded = decode_indices(content, self.codes)[None].to(z.device)
        size = original.images.shape[2], original.images.shape[3]
        images: Any = self.model.decode_tokens(decoded, size=size)
        recon = to_8bit(images).to(original.images.device)
        return self._bitstream_row(original, {None: content}, [recon])

    def _bitstream_rows(self, original: Original, mean: Tensor, priors: Priors) -> list[Row]:
        """Encode the latent for each of `plan.noise_psnr`, and measure the decoded pictures.

        Several small latents are decoded in one batch.
        """
        half = priors.other(original.position)
        contents: dict[float | None, bytes] = {}
        for level in self.plan.noise_psnr:
            steps = channel_steps(half.gains, noise_psnr=level, f=self.model.f)
            contents[level] = encode_latent(mean[0].float().cpu(), prior=half.prior, steps=steps)

        decoded = torch.stack([decode_latent(content) for content in contents.values()])
        count = max(1, BATCH_PIXELS // original.pixels)
        recons = [
            recon[None] for part in decoded.split(count) for recon in self._decode(part, original)
        ]
        return self._bitstream_row(original, contents, recons)

    def _bitstream_row(
        self, original: Original, contents: Mapping[float | None, bytes], recons: Sequence[Tensor]
    ) -> list[Row]:
        """Return one row for each encoded file in `contents`. `recons` are the decoded pictures."""
        compared = self.judge.compare_points(original, recons)
        return [
            row(
                original,
                "bitstream",
                self.name,
                setting=setting,
                bpp=8 * len(content) / original.pixels,
                **metrics,
            )
            for (setting, content), metrics in zip(contents.items(), compared, strict=True)
        ]

    def _mean(self, column: str) -> Any:
        return self.means.mean("model", self.name, column)

    def _points(self, curves: Curves) -> list[Point]:
        levels = self.plan.noise_psnr if self.priors is not None else ()
        settings = levels if self.tokens is None else [None]
        return curves.points("bitstream", self.name, settings, means=self.means)

    def _codec_points(self, codecs: Sequence[str]) -> dict[str, Point]:
        """Return for each codec its means over pictures, at this model's raw rate."""
        points = {}
        for codec in codecs:
            found = {
                column: mean
                for column in ("bpp", *SIGNS)
                if (mean := self.codecs.mean("codec_at_rate", f"{codec} at {self.name}", column))
            }
            if found:
                images = {column: mean.num_values for column, mean in found.items()}
                values = {column: mean.mean for column, mean in found.items()}
                points[codec] = Point(images=images, **values)
        return points

    def _distribution(self) -> Distribution | None:
        """Return the distribution distances that have enough images.

        A Frechet distance needs 2,000 images (`MIN_FRECHET_IMAGES`), and a kernel distance needs 2.
        """
        least = {name: 2 for _, name in DISTANCES.values()}
        least |= {name: MIN_FRECHET_IMAGES for name, _ in DISTANCES.values()}
        found = {n: part for n, part in self.distances.items() if part.num_images >= least[n]}
        if not found:
            return None
        return Distribution(
            images={name: part.num_images for name, part in found.items()},
            **{name: part.result() for name, part in found.items()},
        )

    def _token_report(self) -> dict[str, Any] | None:
        """Return how the codes are used.

        If a model has several maps of tokens and their bits are measured, the result also has the
        bits per pixel of each map.
        """
        if self.tokens is None or not self.measured:
            return None
        found: dict[str, Any] = dict(self.tokens.result())
        if self.level_bits is not None:
            for level, bpp in zip(found["levels"], self.level_bits.result(), strict=True):
                level["coded_bpp"] = bpp
        return found

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
