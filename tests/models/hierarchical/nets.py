"""Small hierarchical VAEs for the tests of this folder."""

from typing import Any

import torch
from torch import Tensor, nn

from latentvae.models.hierarchical.config import HierarchicalConfig
from latentvae.models.hierarchical.network import HierarchicalVAE

SMALL: dict[str, Any] = {
    "enc_blocks": "8x1,8d2,4x1,4d4,1x1",
    "dec_blocks": "1x1,4m1,4x1,8m4",
    "width": 8,
    "zdim": 2,
    "likelihood": "bernoulli",
    "bottleneck_multiple": 0.5,
}


def small_net(image_shape: tuple[int, int, int] = (1, 8, 8), **options: Any) -> HierarchicalVAE:
    """Return a network whose weights are random everywhere, so that no part is zero."""
    torch.manual_seed(0)
    net = HierarchicalConfig(**(SMALL | options)).build(image_shape)
    roughen(net)
    return net


@torch.no_grad()
def roughen(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter += 0.1 * torch.randn_like(parameter)


def binary_images(num: int, image_shape: tuple[int, int, int] = (1, 8, 8)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2.0 * torch.randint(0, 2, (num, *image_shape), generator=generator).float() - 1.0
