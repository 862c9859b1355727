"""Replace a network by a faster one at inference.

    optimized = optimize_network(net, mode="fast")
    z = encode(optimized.net, images)
    print(optimized)  # fast, 52.3 dB against exact

There are three modes. `"exact"` gives the results of the original network up to rounding. `"fast"`
computes in bfloat16 where bfloat16 is faster than float32. The module `inference` builds the
networks of the modes `"exact"` and `"fast"`. `"openvino"` runs the network in OpenVINO (module
`openvino`). The given network does not change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from latentvae.compute.inference import build_exact, build_fast
from latentvae.compute.memory import keep_freed_memory
from latentvae.compute.precision import full_float32, multiplies_bfloat16
from latentvae.errors import UserError, nearest
from latentvae.models import calls

Optimize = Literal["exact", "fast", "openvino"]
MIN_PSNR = 45.0  # "fast" is used only if its PSNR against "exact" is at least this number of dB.
MIN_PSNR_OPENVINO = 40.0  # The same limit for OpenVINO, which keeps no part in float32.
PROBE = 128  # Side in pixels of the test image on which the PSNR is measured.


@dataclass(frozen=True)
class Optimized:
    """A network that computes the results of another network faster.

    Attributes:
        net: the optimized network, for inference only, with the methods of the original network.
            Some weights share their storage with the original network, others are converted copies
            (see the module `inference`). So later changes of the original's weights may have no
            effect on this network.
        mode: how `net` computes: `"stock"` (the network is not optimized) or one of `Optimize`.
        psnr: PSNR in dB between the reconstructions of a test image by `net` and by the network of
            mode `"exact"`. `psnr` is None in the modes `"stock"` and `"exact"`.
        why: a clause that says why `mode` is not the requested mode, or why OpenVINO computes in
            float32 instead of bfloat16. Otherwise "".
        bfloat16: whether some or all parts of `net` multiply in bfloat16.
    """

    net: Any
    mode: str
    psnr: float | None = None
    why: str = ""
    bfloat16: bool = False

    def __str__(self) -> str:
        psnr = "" if self.psnr is None else f", {self.psnr:.1f} dB against exact"
        return f"{self.mode}{psnr}{self.why and f' ({self.why})'}"


def optimize_network(net: Any, *, mode: Optimize) -> Optimized:
    """Return a faster network with the results of `net`, in `mode` if possible.

    If `Optimized.mode` is another mode, `Optimized.why` says why.

    On the CPU, this call also changes the C library's settings for the whole process, so that freed
    memory is kept for later tensors (see `latentvae.compute.memory`).

    Args:
        net: a diffusers autoencoder of images, in eval mode, on its device.
        mode: how to compute: `"exact"`, `"fast"` or `"openvino"`.

    Raises:
        UserError: the mode is unknown, or `net` is not float32 and `mode` is not `"exact"`. The
            error also occurs if OpenVINO is missing or does not support the network or its device,
            or if OpenVINO's results differ too much from the results of `net`.
    """
    check_mode(mode)
    if mode != "exact" and net.dtype != torch.float32:
        given = str(net.dtype).removeprefix("torch.")
        raise UserError(
            f"optimize='{mode}' chooses the precision by itself (got dtype {given}). "
            "Leave out dtype."
        )

    if not _has_halves(net):
        return Optimized(net, "stock", why=f"{type(net).__name__} is not optimised")
    keep_freed_memory(net.device)
    return _MODES[mode](net)


def check_mode(mode: str) -> None:
    """Check that a mode is one of `Optimize`.

    Raises:
        UserError: the mode is unknown. The message suggests the mode with the most similar name.
    """
    allowed = get_args(Optimize)
    if mode not in allowed:
        names = ", ".join(map(repr, allowed))
        hint = nearest(mode, allowed)
        raise UserError(f"optimize must be one of {names} (got {mode!r}){hint}")


@full_float32()
@torch.inference_mode()
def measure_psnr(net: Any, exact: Any) -> float:
    """Return the PSNR in dB between the reconstructions of a test image by `net` and `exact`."""
    images = probe(exact, side=PROBE)
    ours, theirs = (calls.decode(n, calls.encode(n, images)).float() for n in (net, exact))
    error = (ours.clamp(-1, 1) - theirs.clamp(-1, 1)).cpu().double().square().mean()
    return (10 * torch.log10(4 / error.clamp(min=1e-20))).item()


def probe(net: Any, *, side: int) -> Tensor:
    """Return a fixed test image (1, C, side, side) in [-1, 1] with slopes, edges and noise."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    rings = torch.sin(20 * (x**2 + y**2))
    maps = torch.stack([0.8 * x, 0.5 * rings, 0.6 * (x * y > 0.1).float()])
    maps = maps + 0.1 * torch.randn(3, side, side, generator=generator)
    chosen = [i % 3 for i in range(calls.image_channels(net))]
    return maps[chosen][None].clamp(-1, 1).to(net.device, net.dtype)


def _has_halves(net: Any) -> bool:
    """Return whether `net` has an encoder and a decoder that each map a tensor to a tensor."""
    halves = (getattr(net, "encoder", None), getattr(net, "decoder", None))
    return type(net).__name__ != "AutoencoderRAE" and all(isinstance(h, nn.Module) for h in halves)


def _exact(net: Any) -> Optimized:
    return Optimized(build_exact(net), "exact")


def _fast(net: Any) -> Optimized:
    exact = build_exact(net)
    if not multiplies_bfloat16(net.device):
        return Optimized(exact, "exact", why="this machine does not multiply in bfloat16")
    fast = build_fast(net)
    psnr = measure_psnr(fast, exact)
    if not psnr >= MIN_PSNR:
        why = f"the PSNR of bfloat16 against float32 is {psnr:.1f} dB, less than {MIN_PSNR:.0f}"
        return Optimized(exact, "exact", why=why)
    return Optimized(fast, "fast", psnr, bfloat16=True)


def _openvino(net: Any) -> Optimized:
    from latentvae.compute.openvino import build_openvino

    exact, psnr, why = build_exact(net), 0.0, ""
    for precision in ("bf16", "f32") if multiplies_bfloat16(net.device) else ("f32",):
        built = build_openvino(net, precision=precision)
        psnr = measure_psnr(built, exact)
        if psnr >= MIN_PSNR_OPENVINO:
            return Optimized(built, "openvino", psnr, why, bfloat16=precision == "bf16")
        why = (
            f"in float32, because bfloat16 has a PSNR of {psnr:.1f} dB against float32, less than "
            f"{MIN_PSNR_OPENVINO:.0f}"
        )
    raise UserError(
        f"the reconstructions by OpenVINO of this {type(net).__name__} have a PSNR of "
        f"{psnr:.1f} dB against optimize='exact', less than {MIN_PSNR_OPENVINO:.0f}. Use "
        "optimize='exact' or 'fast'."
    )


_MODES: dict[str, Callable[[Any], Optimized]] = {
    "exact": _exact,
    "fast": _fast,
    "openvino": _openvino,
}
