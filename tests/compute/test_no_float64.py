"""Apple's GPUs have no float64, so tensors go to the CPU before they become double."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentvae.coding.latent_codec import channel_gains
from latentvae.compute.optimization import measure_psnr
from latentvae.pictures import to_uint16
from tests.tiny import TINY


class AppleTensor(Tensor):
    """A tensor that refuses float64 until it is on the CPU, as on Apple's GPUs."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = [*args, *(kwargs or {}).values()]
        if func is Tensor.double or any(option is torch.float64 for option in options):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return result.as_subclass(Tensor)
        return result


def apple(values: Tensor) -> Any:
    return values.as_subclass(AppleTensor)  # pyright: ignore[reportArgumentType]


def test_16_bit_pictures() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)
    found = to_uint16(apple(images))
    assert found.dtype == np.uint16 and found.flatten().tolist() == [0, 32768, 65535]


def test_gains_of_channels() -> None:
    """The gain of an output 3 z is 9."""
    z = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    gains = channel_gains(lambda values: 3 * values, apple(z))
    torch.testing.assert_close(gains, torch.full((2,), 9.0, dtype=torch.float64))


def test_psnr_against_exact() -> None:
    net: Any = TINY["kl"]().eval()
    net.decoder.register_forward_hook(lambda _module, _inputs, output: apple(output))
    assert measure_psnr(net, net) > 190  # an error of 0, limited to 1e-20
