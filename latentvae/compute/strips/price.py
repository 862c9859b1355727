"""Predict the time and memory of computing an image in strips.

To predict the time, a band of zeros is computed in strips. The band is as wide as the image and
four latent positions high. With downsampling factor 8 and an image of 1,024 x 1,024 pixels, the
band is 3 % of the image. The prediction is the time of the band, multiplied by the work of the
whole image and divided by the work of the band. The work is the number of floating-point
operations, which torch counts on tensors without storage. The work includes attention, whose
operations grow with the square of the number of positions.

`B` batch, `C` image channels, `H W` pixels, `d` latent channels, `h w` latent positions.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentvae.compute.strips.maps import Strips, Workspace
from latentvae.compute.strips.strip_network import decode_in_strips, encode_in_strips

BAND = 4  # height of the band in latent rows


@dataclass(frozen=True)
class Price:
    """The predicted time and memory of encoding or decoding images in strips.

    Args:
        seconds: estimated time in seconds. Other programs that run on the CPU make the time longer.
        map_bytes: largest total size in bytes of the feature maps that exist at the same time. At
            most two feature maps exist at the same time.
        on_disk: whether feature maps above 16 MiB are on the disk.
    """

    seconds: float
    map_bytes: int
    on_disk: bool

    def __str__(self) -> str:
        where = "on disk" if self.on_disk else "of memory"
        return f"about {_duration(self.seconds)} and {self.map_bytes / 2**30:.1f} GiB {where}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@torch.no_grad()
def price_in_strips(
    net: Any,
    call: Literal["encode", "decode"],
    size: tuple[int, int],
    strips: Strips | None = None,
    *,
    batch: int = 1,
) -> Price:
    """Return the predicted time and memory of `encode_in_strips` or `decode_in_strips`.

    To measure the time, a band of zeros is encoded or decoded on the network's device.

    Args:
        net: the network.
        call: the function whose time and memory are predicted.
        size: (H, W) of the images, in pixels.
        strips: options of the strips.
        batch: number of images.

    Raises:
        ValueError: the network has a block that cannot be computed in strips.
    """
    # A band of the image
    strips = strips or Strips()
    f = 2 ** (len(net.encoder.down_blocks) - 1)
    shape = _input_shape(net, call, size, f)
    rows = min(BAND * (f if call == "encode" else 1), shape[2])
    band = torch.zeros(1, shape[1], rows, shape[3], device=net.device, dtype=net.dtype)

    # The time of the band
    start = time.perf_counter()
    if call == "encode":
        encode_in_strips(net, band, strips)
    else:
        decode_in_strips(net, band, strips, force_not_quantize=True)
    if band.device.type == "cuda":
        torch.cuda.synchronize(band.device)
    seconds = time.perf_counter() - start

    # The work of the band and of the whole image
    part = net.encoder if call == "encode" else net.decoder
    whole, map_bytes = _work(part, shape[2:], band.element_size())
    probed, _ = _work(part, band.shape[2:], band.element_size())
    on_disk = Workspace(strips, like=band).on_disk
    return Price(batch * seconds * whole / probed, map_bytes, on_disk)


def _input_shape(net: Any, call: str, size: tuple[int, int], f: int) -> tuple[int, int, int, int]:
    if call == "encode":
        return 1, net.encoder.conv_in.in_channels, *size
    first = net.decoder.conv_in if net.post_quant_conv is None else net.post_quant_conv
    return 1, first.in_channels, -(-size[0] // f), -(-size[1] // f)


def _work(part: Any, size: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Return the FLOPs of a forward pass, and the bytes of the largest block's input and output."""
    largest = 0

    def record(block: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal largest
        largest = max(largest, given[0].numel() + result.numel())

    steps = (ResnetBlock2D, Downsample2D, Upsample2D)
    hooks = [m.register_forward_hook(record) for m in part.modules() if isinstance(m, steps)]
    values = {name: value.to("meta") for name, value in part.state_dict().items()}
    shape = (1, part.conv_in.in_channels, *size)
    image = torch.empty(shape, device="meta", dtype=part.conv_in.weight.dtype)
    try:
        with FlopCounterMode(display=False) as counter:
            torch.func.functional_call(part, values, (image,))
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops(), largest * itemsize
