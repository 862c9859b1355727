"""The ways to encode and decode that throughput.py compares.

The inputs and outputs of all ways are float32 tensors. The way `stock` is the reference: the
network's own methods in float32, on the whole image.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.compute.inference import sharing_copy
from latentvae.compute.optimization import Optimize, optimize_network
from latentvae.compute.strips import StripComputation, Strips
from latentvae.errors import UserError
from latentvae.evaluation.speed import MIB, peak_memory
from latentvae.models import build_autoencoder_kl, calls, load_network

CALLS = ("encode", "decode", "round trip")
SMALL = 64  # side in pixels of a first image, which is not measured


class Way:
    """One way to encode and decode with a network.

    Args:
        net: the network.
        precision: `"fp32"` or `"bf16"`, the precision of matrix products. The name of each row of
            results contains the precision.
        strips: settings to compute large images in strips. None computes the whole image at once.
        note: text for the user that says how the network is computed on this machine.
        fallback: name of the way that is used instead, if this way is too inexact or not useful on
            this machine. Otherwise "".
    """

    def __init__(
        self,
        net: Any,
        precision: str,
        *,
        strips: StripComputation | None = None,
        note: str = "",
        fallback: str = "",
    ) -> None:
        self.net, self.precision, self.strips = net, precision, strips
        self.note, self.fallback = note, fallback

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images and return their latents."""
        return calls.encode(self.net, images, computation=self.strips)

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents and return the images."""
        return calls.decode(self.net, z, computation=self.strips)


class CastWay(Way):
    """The way that casts the whole network to bfloat16, as users of diffusers do."""

    def encode(self, images: Tensor) -> Tensor:
        """Encode images and return their latents."""
        return super().encode(_cast(images)).float()

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents and return the images."""
        return super().decode(_cast(z)).float()


def network(model: str, device: str) -> Any:
    """Load a network from a folder or from the Hub."""
    return load_network(model).to(device).eval().requires_grad_(False)


def trained(channels: tuple[int, ...], *, updates: int, images: Tensor, device: str) -> Any:
    """Return a new network with the layers of Stable Diffusion's autoencoder, trained on images.

    Random weights are not suitable, because they amplify rounding errors. With random weights,
    bfloat16 would be too inexact, and the mode `fast` would fall back to float32.

    Args:
        channels: number of channels of each level.
        updates: number of updates.
        images: (B, 3, R, R), the batch of every update.
        device: device of the network.
    """
    torch.manual_seed(0)
    net: Any = build_autoencoder_kl(block_out_channels=channels)
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    images = images.to(device)
    for _ in range(updates):
        recon = net.decode(net.encode(images).latent_dist.mode()).sample
        F.l1_loss(recon, images).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return net.eval().requires_grad_(False)


def _optimized(net: Any, *, mode: Optimize) -> Way:
    optimized = optimize_network(net, mode=mode)
    precision = "bf16" if optimized.bfloat16 else "fp32"
    fallback = "" if optimized.mode == mode else optimized.mode
    note = f"falls back to {optimized}" if fallback else str(optimized)
    return Way(optimized.net, precision, note=note, fallback=fallback)


def _tiled(net: Any) -> Way:
    copied = sharing_copy(net)
    copied.enable_tiling()
    return Way(copied, "fp32")


def _cast_to_bfloat16(net: Any) -> Way:
    cast = sharing_copy(net).to(torch.bfloat16, memory_format=torch.channels_last)
    return CastWay(cast, "bf16")


def _compiled(way: Way) -> Way:
    for half in (way.net.encoder, way.net.decoder):
        half.compile()
    return way


WAYS: Mapping[str, Callable[[Any], Way]] = {
    "stock": lambda net: Way(net, "fp32"),
    "exact": partial(_optimized, mode="exact"),
    "fast": partial(_optimized, mode="fast"),
    "openvino": partial(_optimized, mode="openvino"),
    "cast": _cast_to_bfloat16,
    "compiled": lambda net: _compiled(Way(sharing_copy(net), "fp32")),
    "compiled cast": lambda net: _compiled(_cast_to_bfloat16(net)),
    "tiled": _tiled,
    "strips": lambda net: Way(net, "fp32", strips=StripComputation(Strips())),
}


def build(name: str, net: Any) -> Way | None:
    """Return the way with this name.

    If the way does not work on this machine, print why, and return None.
    """
    try:
        return WAYS[name](net)
    # Ways raise different errors if a package, a block or a method is missing.
    except (UserError, ValueError, NotImplementedError, AttributeError) as error:
        print(f"left out {name}: {error}")
        return None


def installed() -> tuple[str, ...]:
    """Return the names of all ways whose packages are installed, except the reference."""
    missing = () if find_spec("openvino") else ("openvino",)
    return tuple(name for name in WAYS if name not in ("stock", *missing))


def peak(
    name: str,
    batch_size: int,
    side: int,
    model: str,
    device: str,
    threads: int | None,
) -> dict[str, float]:
    """Return the peak MiB of encode and decode for a batch, without the network's weights.

    Call this function in a new process. Otherwise, memory that the process has used before would
    hide the memory that this call uses.

    Args:
        name: a key of `WAYS`.
        side: side of the images in pixels.
    """
    # the way, after a first call with a small image
    warnings.simplefilter("ignore")
    if threads is not None:
        torch.set_num_threads(threads)
    way = build(name, network(model, device))
    assert way is not None
    shape = batch_size, calls.image_channels(way.net), side, side
    first = torch.zeros(shape if "compiled" in name else (*shape[:2], SMALL, SMALL))
    z = way.encode(first.to(device))
    way.decode(z)

    # peaks
    f = first.shape[3] // z.shape[3]
    latents = torch.zeros(batch_size, z.shape[1], side // f, side // f)
    inputs = {"encode": torch.zeros(shape), "decode": latents}
    peaks = {}
    for call, tensor in inputs.items():
        tensor = tensor.to(device)
        with peak_memory(torch.device(device)) as found:
            getattr(way, call)(tensor)
        peaks[call] = found[0] / MIB
    return peaks


def _cast(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16, memory_format=torch.channels_last)
