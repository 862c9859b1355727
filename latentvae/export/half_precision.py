"""Check whether an autoencoder works in 16 bits, which decides diffusers' `force_upcast`.

Stable Diffusion XL's autoencoder overflows in float16 and returns black pictures
(https://huggingface.co/madebyollin/sdxl-vae-fp16-fix). bfloat16 has float32's range, but only 8
bits of precision. float16 and bfloat16 are emulated: weights and the output of every module are
rounded, also where the network itself computes in float32. Sums stay in float32, as on GPUs. The
emulation takes about the time of float32 and has the same result on every machine. On most CPUs,
real float16 is a hundred times slower than the emulation.

`B` batch, `C` channels, `H W` space.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # diffusers registers its output classes there

from latentvae.models import Network
from latentvae.models.calls import decode, encode, num_codes, tokenize

FLOAT16_MAX = 65504.0
MARGIN = 4.0  # factor by which the activations of other images may be larger
MIN_PSNR = 40.0  # dB, float16 against float32

# Largest loss of PSNR against the originals that bfloat16 may cause, in dB. The rounding error adds
# to the network's own error, so the ratio of both errors counts, and not the distance to float32.
# 0.1 dB is 2 % of the error and the last digit of published tables. For a network of 29 dB, the
# PSNR of bfloat16 against float32 is then 45 dB. The same limit holds for float16 if rounding makes
# a tokenizer choose another code. The picture then differs much from the float32 picture, but it is
# as near to the original.
MAX_COST = 0.1

LATENTS, RECONSTRUCTION = "latents", "reconstruction"  # names in `layers` that are not modules
Hook = Callable[[str, Any], Any]  # from (name, output) to the output that replaces it


@dataclass(frozen=True)
class HalfPrecision:
    """The effect of a 16-bit type on an autoencoder, measured on some images.

    Args:
        max_activation: largest absolute value of any of `layers`.
        psnr: PSNR of the 16-bit reconstruction against the float32 reconstruction, in dB, for
            values in [-1, 1], over all images together. NaN if the 16-bit reconstruction is not
            finite, infinity if both reconstructions are equal.
        psnr_cost: PSNR of the float32 reconstruction minus PSNR of the 16-bit reconstruction, in
            dB. Both reconstructions are rounded to 8 bits and compared with the original images.
            NaN if the difference was not measured or if the 16-bit reconstruction is not finite.
        dtype: torch.float16 or torch.bfloat16.
        layers: largest absolute output in float32 by module name, in the order of execution. A
            block comes after its submodules. The latents and the reconstruction have entries too.
        flipped: share of a tokenizer's indices that differ between float32 and the 16-bit type.
            None if the network has no indices.
    """

    max_activation: float
    psnr: float
    psnr_cost: float = math.nan
    dtype: torch.dtype = torch.float16
    layers: dict[str, float] = field(default_factory=dict)
    flipped: float | None = None

    @property
    def safe(self) -> bool:
        """Whether pipelines may use the 16-bit type `dtype`.

        If float16 is not safe, the export sets `force_upcast`.
        """
        as_good = self.psnr_cost <= MAX_COST
        if self.dtype == torch.bfloat16:
            return as_good
        close = self.psnr >= MIN_PSNR if self.flipped is None else as_good
        return self.max_activation * MARGIN <= FLOAT16_MAX and close

    @property
    def largest_layer(self) -> str:
        """Name of the module with the largest output.

        If several modules share the largest output, the name is that of the module computed first.
        Of a block and its submodules, the innermost module is computed first.
        """
        return max(self.layers, key=self.layers.__getitem__)

    def __str__(self) -> str:
        close = (
            "not finite"
            if math.isnan(self.psnr)
            else f"with a PSNR of {self.psnr:.1f} dB against float32"
        )
        if self.flipped and not math.isnan(self.psnr):
            cost = f"{self.psnr_cost:.2f} dB less PSNR against the images"
            close += f", because {self.flipped:.2%} of the indices differ: {cost}"
        return f"largest activation {self.max_activation:.4g}, reconstruction {close}"


def check_half_precision(
    net: Network, images: Tensor | Sequence[Tensor], *, dtype: torch.dtype = torch.float16
) -> HalfPrecision:
    """Compare reconstructions in float32 and in `dtype`.

    The arguments are as in `check_precisions`.
    """
    return check_precisions(net, images, dtypes=(dtype,))[0]


@torch.no_grad()
def check_precisions(
    net: Network, images: Tensor | Sequence[Tensor], *, dtypes: Sequence[torch.dtype]
) -> list[HalfPrecision]:
    """Compare reconstructions in float32 and in each of `dtypes`, from the posterior's mode.

    Args:
        net: any diffusers autoencoder in float32. This function does not change the network.
        images: (B, C, H, W) in [-1, 1], float32, on the network's device, or several such tensors
            of different sizes.

    Raises:
        ValueError: the float32 reconstructions are not finite, or there are no images.
    """
    batches = [images] if isinstance(images, Tensor) else list(images)
    if not batches:
        raise ValueError("the precision check needs at least one image (got none).")

    # float32
    copied = copy.deepcopy(net).eval()  # only one copy, so that large networks fit in memory
    peaks: dict[str, Tensor] = {}
    with _after_every_module(copied, partial(_record, peaks)):
        exact, indices = _reconstruct(copied, batches, partial(_record, peaks))
    if not all(recon.isfinite().all() for recon in exact):
        raise ValueError("the network's float32 reconstructions are not finite.")
    layers = {name: peak.item() for name, peak in peaks.items()}

    # each 16-bit type
    results = []
    for dtype in dtypes:
        rounded, found = _reconstruct_rounded(copied, net, batches, dtype)
        psnr, cost = _psnr(exact, rounded), _psnr_cost(batches, exact, rounded)
        flipped = _share_of_different(indices, found)
        results.append(HalfPrecision(max(layers.values()), psnr, cost, dtype, layers, flipped))
    return results


def _record(peaks: dict[str, Tensor], name: str, output: Any) -> Any:
    for values in pytree.tree_leaves(output):
        # Scalars are losses of a quantiser, not activations.
        if isinstance(values, Tensor) and values.is_floating_point() and values.ndim:
            peak = values.abs().amax().nan_to_num(math.inf, posinf=math.inf)
            peaks[name] = torch.maximum(peaks.get(name, peak), peak)
    return output


def _reconstruct_rounded(
    copied: Network, net: Network, batches: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the reconstructions and indices of `net` with rounded weights and activations.

    The function writes the rounded weights into `copied`, a copy of `net`.
    """
    weights = chain(copied.parameters(), copied.buffers())
    originals = chain(net.parameters(), net.buffers())
    for value, original in zip(weights, originals, strict=True):
        value.copy_(_rounded(original, dtype))

    def hook(_name: str, output: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda values: _rounded(values, dtype), output)

    with _after_every_module(copied, hook):
        return _reconstruct(copied, [_rounded(batch, dtype) for batch in batches], hook)


def _reconstruct(
    net: Network, batches: Sequence[Tensor], hook: Hook
) -> tuple[list[Tensor], list[Tensor]]:
    """Return reconstructions, and the indices of a tokenizer.

    `hook` replaces the latents and the reconstructions, which are not outputs of a module.
    """
    recons, indices = [], []
    for images in batches:
        z = hook(LATENTS, encode(net, images))
        recons.append(hook(RECONSTRUCTION, decode(net, z)))
        if num_codes(net) is not None:
            indices.append(tokenize(net, z))
    return recons, indices


@contextmanager
def _after_every_module(net: Network, hook: Hook) -> Iterator[None]:
    """Replace each module's output by the result of `hook`, during a `with` block."""

    def register(name: str, module: Any) -> Any:
        return module.register_forward_hook(lambda _module, _inputs, output: hook(name, output))

    handles = [register(name, module) for name, module in net.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).to(values.dtype) if values.is_floating_point() else values


def _share_of_different(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float | None:
    if not ours:
        return None
    different = sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True))
    return different / sum(a.numel() for a in ours)


def _psnr(exact: Sequence[Tensor], rounded: Sequence[Tensor]) -> float:
    error = _mean_square(exact, rounded)
    if not math.isfinite(error):
        return math.nan
    return 10 * math.log10(4 / error) if error else math.inf


def _psnr_cost(
    images: Sequence[Tensor], exact: Sequence[Tensor], rounded: Sequence[Tensor]
) -> float:
    """Return the PSNR of `exact` minus the PSNR of `rounded`, in dB.

    Both reconstructions are rounded to 8 bits and compared with `images`. If only the error of
    `exact` is 0, the result is infinity. If only the error of `rounded` is 0, the result is minus
    infinity. If both errors are equal, the result is 0. If `rounded` is not finite, the result is
    NaN.
    """
    if not all(recon.isfinite().all() for recon in rounded):
        return math.nan
    images, exact, rounded = ([_levels(t) for t in part] for part in (images, exact, rounded))
    before, after = _mean_square(images, exact), _mean_square(images, rounded)
    if before == after:
        return 0.0
    return (
        10 * math.log10(after / before) if before and after else (math.inf if after else -math.inf)
    )


def _levels(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as the levels of an 8-bit picture, 0 to 255."""
    return (images.clamp(-1, 1) + 1).mul(127.5).round()


def _mean_square(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the mean squared difference over all elements of all pairs of tensors."""
    squares = sum((y - x).cpu().double().square().sum().item() for x, y in zip(a, b, strict=True))
    return squares / sum(x.numel() for x in a)
