"""What may compute in a network's place at inference.

    optimized = optimize_network(net, mode="fast")
    z = encode(optimized.net, images)
    print(optimized)  # fast, 52.3 dB against exact

`"exact"` gives the same numbers to rounding, `"fast"` bfloat16 where it wins (both in `inference`),
`"openvino"` what OpenVINO makes of it. The network itself is not changed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from latentvae.compute.inference import build_exact, build_fast, multiplies_bfloat16
from latentvae.compute.memory import keep_freed_memory
from latentvae.errors import UserError, nearest
from latentvae.models import calls

Optimize = Literal["exact", "fast", "openvino"]
MIN_PSNR = 45.0  # dB against exact, below which `fast` is not used
MIN_PSNR_OPENVINO = 40.0  # below which OpenVINO is not: its bfloat16 has no islands of float32
PROBE = 128  # pixels a side of the picture that it is measured on


@dataclass(frozen=True)
class Optimized:
    """A network that computes what another one does.

    Attributes:
        net: with the same calls, for inference alone; made of the other's weights as they were,
            whose storage it shares where it converts nothing (`inference`).
        mode: what it does: `"stock"` or one of `Optimize`.
        psnr: dB of its pictures of a probe against those of `exact`; None of plain and exact.
        why: why it is not what was asked for, as a clause; empty if it is.
        bfloat16: whether it multiplies in bfloat16, all or part, of its own accord.
    """

    net: Any
    mode: str
    psnr: float | None = None
    why: str = ""
    bfloat16: bool = False

    def __str__(self) -> str:
        told = "" if self.psnr is None else f", {self.psnr:.1f} dB against exact"
        return f"{self.mode}{told}{self.why and f' ({self.why})'}"


def optimize_network(net: Any, *, mode: Optimize) -> Optimized:
    """What computes as `net` does, by the means of this machine. On the CPU the process keeps the
    memory that a call frees for the next one (`latentvae.compute.memory`).

    Args:
        net: a diffusers autoencoder of images, in eval mode, on its device.

    Raises:
        UserError: another mode; of a lower precision a network that is not float32; OpenVINO that
            is not there, or another device than the CPU, or that does not compute the same.
    """
    check_mode(mode)
    if mode != "exact" and net.dtype != torch.float32:
        given = str(net.dtype).removeprefix("torch.")
        raise UserError(f"optimize='{mode}' chooses the precision: leave out dtype, not {given}")
    if not _has_halves(net):
        return Optimized(net, "stock", why=f"{type(net).__name__} is not optimised")
    keep_freed_memory(net.device)
    return _MODES[mode](net)


def check_mode(mode: str) -> None:
    """Raises a `UserError` with the nearest choice unless it is one of `Optimize`."""
    allowed = get_args(Optimize)
    if mode not in allowed:
        names = ", ".join(map(repr, allowed))
        raise UserError(f"optimize is one of {names}, not {mode!r}{nearest(mode, allowed)}")


@torch.inference_mode()
def measure_psnr(net: Any, exact: Any) -> float:
    """dB of `net`'s reconstruction of a probe against `exact`'s, of pictures in [-1, 1]."""
    images = probe(exact, side=PROBE)
    ours, theirs = (calls.decode(n, calls.encode(n, images)).float() for n in (net, exact))
    error = (ours.clamp(-1, 1) - theirs.clamp(-1, 1)).double().square().mean()
    return (10 * torch.log10(4 / error.clamp(min=1e-20))).item()


def probe(net: Any, *, side: int) -> Tensor:
    """A picture (1, C, side, side) with slopes, edges and noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    rings = torch.sin(20 * (x**2 + y**2))
    maps = torch.stack([0.8 * x, 0.5 * rings, 0.6 * (x * y > 0.1).float()])
    maps = maps + 0.1 * torch.randn(3, side, side, generator=generator)
    chosen = [i % 3 for i in range(calls.image_channels(net))]
    return maps[chosen][None].clamp(-1, 1).to(net.device, net.dtype)


def _has_halves(net: Any) -> bool:
    """Whether an encoder and a decoder, modules that map tensors, do its work."""
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
        why = f"bfloat16 gives {psnr:.1f} dB against it, less than {MIN_PSNR:.0f}"
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
        why = f"in float32: bfloat16 gives {psnr:.1f} dB, less than {MIN_PSNR_OPENVINO:.0f}"
    raise UserError(
        f"OpenVINO's pictures of this {type(net).__name__} are at {psnr:.1f} dB against exact, "
        f"less than {MIN_PSNR_OPENVINO:.0f}: take optimize='exact' or 'fast'"
    )


_MODES: dict[str, Callable[[Any], Optimized]] = {
    "exact": _exact,
    "fast": _fast,
    "openvino": _openvino,
}
