"""Flows that make a Gaussian posterior more flexible: planar, RealNVP and inverse autoregressive.

z_0 ~ N(mean(x), std(x)) -> flow (context h(x)) -> z, ln q(z|x) = ln q(z_0|x) - ln |det dz/dz_0|

Every flow is the identity at the start of training. RealNVP and IAF (inverse autoregressive flow)
come from the package zuko.

Symbols: `U` units, `C` context values (which the encoder predicts for the flow).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform

FlowName = Literal["none", "planar", "realnvp", "iaf"]


class PosteriorFlow(nn.Module):
    """A chain of flow layers.

    Args:
        layers: modules that map (z, context) to the new z and the ln |det| of the map's Jacobian.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return mapped latents (..., U) and the log-determinant of the map's Jacobian, (...,).

        Both are float32.

        Args:
            z: latents of U units, (..., U).
            context: values that the encoder predicts for the flow, (..., C). The leading dimensions
                of `context` are expanded to those of `z`.
        """
        with torch.autocast(z.device.type, enabled=False):
            context = context.float().expand(*z.shape[:-1], -1)
            total = torch.zeros(z.shape[:-1], device=z.device)
            for layer in self.layers:
                z, own = layer(z, context)
                total = total + own
            return z, total


class Planar(nn.Module):
    """A planar layer z + u tanh(w z + b) (Rezende and Mohamed 2015, arXiv:1505.05770).

    u, w and b are linear functions of the context (values that the encoder predicts). The vector u
    is changed so that the layer is invertible, as in the paper's appendix A.1.
    """

    def __init__(self, units: int, context: int) -> None:
        super().__init__()
        self.units = units
        self.parameters_of = nn.Linear(context, 2 * units + 1)
        nn.init.zeros_(self.parameters_of.weight)
        # w must not start at 0, because then neither u nor w would get a gradient.
        nn.init.normal_(self.parameters_of.bias, std=0.1)
        nn.init.zeros_(self.parameters_of.bias[:units])

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        u, w, b = self.parameters_of(context).split([self.units, self.units, 1], dim=-1)
        along = (w * u).sum(-1, keepdim=True)
        # softplus(x) - 1 is at least -1. Its argument is shifted so that it maps 0 to 0.
        allowed = F.softplus(along + INVERSE_SOFTPLUS_1) - 1.0
        u = u + (allowed - along) * w / w.square().sum(-1, keepdim=True).clamp(min=1e-8)

        bent = torch.tanh((w * z).sum(-1, keepdim=True) + b)
        slope = (1.0 - bent.square()).squeeze(-1) * allowed.squeeze(-1)
        return z + u * bent, torch.log1p(slope.clamp(min=-1.0 + 1e-6))


INVERSE_SOFTPLUS_1 = 0.5413248546129181  # softplus of this number is 1


class ZukoLayer(nn.Module):
    """A flow layer of the package zuko, initialised as the identity."""

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform
        last = transform.hyper[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(context).call_and_ladj(z)


def build_flow(
    name: FlowName, *, units: int, context: int, layers: int, width: int
) -> PosteriorFlow | None:
    """Return a flow of `layers` layers, or None if `name` is "none".

    Args:
        name: kind of flow: "none", "planar", "realnvp" or "iaf".
        units: number of latent units U.
        context: number of values that the encoder predicts for the flow.
        layers: number of layers.
        width: number of hidden channels of a layer's network, which has two hidden layers. Planar
            layers have no such network.
    """
    if name == "none":
        return None
    build = {"planar": _planar, "realnvp": _realnvp, "iaf": _iaf}[name]
    return PosteriorFlow([build(i, units, context, width) for i in range(layers)])


def _planar(number: int, units: int, context: int, width: int) -> nn.Module:
    return Planar(units, context)


def _realnvp(number: int, units: int, context: int, width: int) -> nn.Module:
    mask: Any = torch.arange(units) % 2 == number % 2
    return ZukoLayer(
        GeneralCouplingTransform(units, mask=mask, context=context, hidden_features=(width, width))
    )


def _iaf(number: int, units: int, context: int, width: int) -> nn.Module:
    # The order of the units is reversed in every second layer.
    order: Any = torch.arange(units)
    order = order.flip(0) if number % 2 else order
    return ZukoLayer(
        MaskedAutoregressiveTransform(
            units, context=context, order=order, hidden_features=(width, width)
        )
    )
