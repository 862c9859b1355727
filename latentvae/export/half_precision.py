"""Does an autoencoder survive float16? Measured, because diffusers' `force_upcast` asks for it.

Stable Diffusion XL's autoencoder overflows in float16 and gives black pictures
(https://huggingface.co/madebyollin/sdxl-vae-fp16-fix). Float16 is emulated: weights and the output
of every module are rounded to it, sums are kept in float32, as GPUs do. That takes about the time
of float32 and gives the same answer on every machine; real float16 is a hundred times slower on
most CPUs.

`B` batch, `C` channels, `H W` space.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

FLOAT16_MAX = 65504.0
MARGIN = 4.0  # the largest activation stays this far below the maximum: other images go higher
MIN_PSNR = 40.0  # dB, float16 against float32


@dataclass(frozen=True)
class HalfPrecision:
    """What float16 does to an autoencoder on some images.

    Args:
        max_activation: largest absolute value of any module's output, in float32.
        psnr: of the float16 reconstruction against the float32 one, dB, peak 2; NaN if it is not
            finite, infinity if both are equal.
    """

    max_activation: float
    psnr: float

    @property
    def safe(self) -> bool:
        """Whether pipelines may run it in float16: `force_upcast` is the opposite."""
        return self.max_activation * MARGIN <= FLOAT16_MAX and self.psnr >= MIN_PSNR

    def __str__(self) -> str:
        close = "not finite" if math.isnan(self.psnr) else f"{self.psnr:.1f} dB from float32's"
        return f"largest activation {self.max_activation:.4g}, reconstruction {close}"


@torch.no_grad()
def check_half_precision(net: AutoencoderKL, images: Tensor) -> HalfPrecision:
    """Reconstruct `images` in both precisions, from the posterior's mode.

    Args:
        net: float32; it is not changed.
        images: (B, C, H, W) in [-1, 1], float32, on the network's device.
    """
    peaks: list[Tensor] = []

    def record(output: Tensor) -> Tensor:
        peaks.append(output.abs().amax())
        return output

    exact = _reconstruct(copy.deepcopy(net), images, record)
    rounded_net = copy.deepcopy(net)
    for value in rounded_net.parameters():
        value.copy_(_to_half(value))
    rounded = _reconstruct(rounded_net, _to_half(images), _to_half)
    if not exact.isfinite().all():
        raise ValueError("the network's float32 reconstructions are not finite")
    return HalfPrecision(max(peak.item() for peak in peaks), _psnr(exact, rounded))


def _reconstruct(net: Any, images: Tensor, watch: Callable[[Tensor], Tensor]) -> Tensor:
    """Encode and decode with `watch` in the way of every module's output."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        return watch(output) if isinstance(output, Tensor) else output

    net.eval()
    for module in net.modules():
        module.register_forward_hook(hook)
    z = net.encode(images).latent_dist.mode()
    return net.decode(z).sample


def _to_half(values: Tensor) -> Tensor:
    return values.to(torch.float16).to(torch.float32)


def _psnr(exact: Tensor, rounded: Tensor) -> float:
    error = (rounded - exact).square().mean(dtype=torch.float64).item()
    if not math.isfinite(error):
        return math.nan
    return 10 * math.log10(4 / error) if error else math.inf
