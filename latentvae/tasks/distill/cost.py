"""Measure the cost of a network: multiply-accumulate operations, time, memory and parameters."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latentvae.evaluation.speed import measure_call
from latentvae.models import Network, calls, family_of

SIDE = 512  # pixels
BUDGET = 15.0  # seconds


@dataclass(frozen=True)
class Cost:
    """The cost of encoding or decoding one image.

    Args:
        size: side of the square image, in pixels.
        parameters: number of weights of the encoder or decoder.
        macs: number of multiply-accumulate operations.
        milliseconds: median time of a call.
        peak_mib: peak memory in MiB, without the weights.
    """

    size: int
    parameters: int
    macs: int
    milliseconds: float
    peak_mib: float


@torch.inference_mode()
def measure_cost(net: Network, part: Literal["encoder", "decoder"]) -> Cost:
    """Measure the cost of a network's encoder or decoder for one image of about 512 x 512 px.

    If the network takes images of one size only, the image has this size.

    Args:
        net: network in eval mode and float32, on the device to measure.
        part: which half of the network to measure.
    """
    shape = calls.measure_shape(net)
    multiple = shape.f * family_of(net).normalization(net).fold
    size = shape.fixed_size or max(round(SIDE / multiple), 1) * multiple

    images = torch.zeros(1, calls.image_channels(net), size, size, device=net.device)
    if part == "encoder":
        name, call, inputs = "encode", calls.encode, images
    else:
        side = size // shape.f
        name, call = "decode", calls.decode
        inputs = torch.zeros(1, shape.channels, side, side, device=net.device)
    call(net, inputs)  # a first call, so that one-time setup does not count as memory
    point = measure_call(name, size, partial(call, net, inputs), torch.device(net.device), BUDGET)
    assert point.images_per_second is not None and point.peak_mib is not None
    return Cost(
        size,
        sum(p.numel() for p in _weights(net, part)),
        count_macs(net, part, size=size),
        1000 / point.images_per_second,
        point.peak_mib,
    )


@torch.no_grad()
def count_macs(net: Network, part: Literal["encoder", "decoder"], *, size: int) -> int:
    """Return the multiply-accumulate operations for one image of size x size pixels.

    Convolutions, linear layers and attention are counted. The network runs on torch's meta device,
    without computing values.
    """
    shape: Any = calls.measure_shape(net)
    on_meta: Any = copy.deepcopy(net).to("meta")
    with FlopCounterMode(display=False) as counter:
        if part == "encoder":
            channels = calls.image_channels(net)
            calls.encode(on_meta, torch.zeros(1, channels, size, size, device="meta"))
        else:
            side = size // shape.f
            calls.decode(on_meta, torch.zeros(1, shape.channels, side, side, device="meta"))
    return counter.get_total_flops() // 2  # a multiply-accumulate counts as two operations


def _weights(net: Network, part: Literal["encoder", "decoder"]) -> list[nn.Parameter]:
    family = family_of(net)
    sides = [p for module in family.latent_side(net) for p in module.parameters()]
    if part == "encoder":
        return sides
    known = {id(p) for p in sides}
    return [p for p in net.parameters() if id(p) not in known]
