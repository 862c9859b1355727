"""Describe how the numbers of a report were measured: the protocol of the report."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from latentvae.coding.image_codecs import Codec
from latentvae.evaluation.measures import Judge
from latentvae.evaluation.settings import KERNEL_IMAGES, Plan
from latentvae.losses.perceptual import weights_id
from latentvae.metrics.bootstrap import NUM_RESAMPLES
from latentvae.metrics.inception import SHA256
from latentvae.metrics.table import IMAGE_METRICS

LATENT_BITS = 16  # bits of one latent element in `raw_bpp`: float16 or bfloat16
PACKAGES = ("latentvae", "torch", "diffusers", "lpips", "pillow", "constriction")


def protocol(
    plan: Plan, *, judge: Judge, codecs: Mapping[str, Codec], device: torch.device
) -> dict[str, Any]:
    """Return all measurement conditions that can differ between two evaluations, as JSON values."""
    # conditions that the plan sets
    size = "own size, padded to a multiple of f inside the model and cropped back"
    if plan.size is not None:
        size = _size(plan.size, plan.buckets)
    latent = "mode of the posterior"
    if plan.latent == "sample":
        latent = "a draw from the posterior, seeded by the image's position"

    return {
        "sections": list(plan.sections),
        "size": size,
        "colours": "stored numbers, embedded profiles ignored"
        if plan.ignore_icc
        else "embedded profiles converted to sRGB",
        "rounding": "originals and reconstructions are rounded to 8 bits before any metric",
        "latent": latent,
        "means": f"over images; 95 % interval by Poisson bootstrap, {NUM_RESAMPLES} resamples",
        **{name: metric.protocol for name, metric in IMAGE_METRICS.items()},
        "lpips": {n: f"0.1, weights {weights_id(loss.lpips)}" for n, loss in judge.lpips.items()},
        "distribution": _distribution(judge),
        "raw_bpp": f"latent elements x {LATENT_BITS} bits (tokens: log2 K) / pixels; no coding",
        "bpp": "bits of the whole file / pixels, per image",
        "curves": "rate and quality over the same images: those where every coder has a finite "
        "value at every setting",
        "bitstream": _bitstream(plan),
        "codecs": {name: codec.describe() for name, codec in codecs.items()},
        "versions": {package: _version(package) for package in PACKAGES},
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _size(size: tuple[int, int], buckets: int) -> str:
    height, width = size
    if buckets:
        return (
            f"resized to cover the nearest of {buckets} shapes of about {height} x {width} "
            "(Lanczos, antialiased), centre crop"
        )
    if height == width:
        return f"shorter side resized to {height} (Lanczos, antialiased), centre crop"
    return f"resized to cover {height} x {width} (Lanczos, antialiased), centre crop"


def _distribution(judge: Judge) -> dict[str, str]:
    """Describe the feature extractors and estimators of the distribution distances, by name."""
    found = {}
    if judge.extractors:
        found["kernel"] = (
            f"unbiased MMD^2 of (x.y / D + 1)^3 over pairs of different images, at most "
            f"{KERNEL_IMAGES}, evenly spread"
        )
        found["frechet"] = "covariances with divisor n - 1, from 2,000 images on"
    if "vgg" in judge.lpips:
        identity = weights_id(judge.lpips["vgg"].lpips)
        found["vgg"] = f"mean over space of relu5_3 of LPIPS' VGG16, weights {identity}"
    if judge.inception is not None:
        found["inception"] = f"pool3 of the TF-ported Inception, sha256 {SHA256}"
    return found


def _bitstream(plan: Plan) -> dict[str, Any]:
    return {
        "latent": "the posterior's mode, a step per channel, range-coded; decoded from the bytes",
        "tokens": "adaptive order-0 range coder; decoded from the bytes",
        "fitted_on": f"at most {plan.prior_images} images of the other half (by position)",
        "noise_psnr": list(plan.noise_psnr),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
