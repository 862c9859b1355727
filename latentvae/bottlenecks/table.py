"""The table of all bottlenecks. A new bottleneck needs a file and an entry in this table."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Discriminator, Tag
from torch import nn

from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.bottlenecks.flow import FlowBottleneck, FlowConfig
from latentvae.bottlenecks.fsq import FiniteScalarQuantizer, FSQConfig
from latentvae.bottlenecks.gaussian import GaussianBottleneck, GaussianConfig
from latentvae.bottlenecks.gumbel import GumbelConfig, GumbelQuantizer
from latentvae.bottlenecks.lfq import LFQConfig, LookupFreeQuantizer
from latentvae.bottlenecks.quantized import Quantizer
from latentvae.bottlenecks.residual import ResidualConfig, ResidualQuantizer
from latentvae.bottlenecks.simvq import SimVQ, SimVQConfig
from latentvae.bottlenecks.vector import VectorConfig, VectorQuantizer
from latentvae.errors import UserError, nearest
from latentvae.option_marks import tag_in


@dataclass(frozen=True)
class Bottleneck:
    """The module class and the options class of one kind of bottleneck.

    Attributes:
        module: class of the module that turns encoder features into a latent. Its arguments are
            `config.arguments()`.
        config: class of the module's options, with properties such as `has_kl` that a training
            reads.
    """

    module: type[nn.Module]
    config: type[BottleneckConfig]

    @property
    def discrete(self) -> bool:
        """Whether the module is a `Quantizer`, so that each latent has indices of codes."""
        return issubclass(self.module, Quantizer)

    def build(self, arguments: dict[str, Any]) -> Any:
        """Return a newly initialised module. An argument named `type` has no effect."""
        return self.module(**{name: v for name, v in arguments.items() if name != "type"})


BOTTLENECKS: dict[str, Bottleneck] = {
    "gaussian": Bottleneck(GaussianBottleneck, GaussianConfig),
    "flow": Bottleneck(FlowBottleneck, FlowConfig),
    "vq": Bottleneck(VectorQuantizer, VectorConfig),
    "residual": Bottleneck(ResidualQuantizer, ResidualConfig),
    "fsq": Bottleneck(FiniteScalarQuantizer, FSQConfig),
    "lfq": Bottleneck(LookupFreeQuantizer, LFQConfig),
    "gumbel": Bottleneck(GumbelQuantizer, GumbelConfig),
    "simvq": Bottleneck(SimVQ, SimVQConfig),
}
QUANTIZERS = {name: entry for name, entry in BOTTLENECKS.items() if entry.discrete}

if TYPE_CHECKING:
    AnyQuantizerConfig = BottleneckConfig
else:  # the union of all options classes of quantisers. The option `type` chooses one of them
    AnyQuantizerConfig = Annotated[
        reduce(
            operator.or_, (Annotated[entry.config, Tag(name)] for name, entry in QUANTIZERS.items())
        ),
        Discriminator(tag_in("type", "vq")),
    ]


def build_quantizer(type: str, **arguments: Any) -> Quantizer:
    """Return a newly initialised quantiser.

    Args:
        type: a key of `QUANTIZERS`.
        arguments: arguments of the quantiser's class.

    Raises:
        UserError: the type is unknown, or the quantiser's class refuses an argument.
    """
    if type not in QUANTIZERS:
        allowed = ", ".join(QUANTIZERS)
        raise UserError(
            f"The quantiser's type must be one of {allowed} (got {type!r})"
            f"{nearest(type, QUANTIZERS)}"
        )
    return QUANTIZERS[type].build(arguments)


@torch.no_grad()
def rebuilt_quantizer(old: Quantizer, arguments: Mapping[str, Any]) -> Quantizer:
    """Return a quantiser with the codes of `old`, but with other training options.

    The new quantiser is in the same mode (train or eval) as `old`.

    Args:
        old: the quantiser to replace.
        arguments: `type` and arguments of the new quantiser. Its codes must have the same number
            and width as those of `old`.
    """
    values, new = old.state_dict(), build_quantizer(**arguments)
    new.load_state_dict(values, strict=False)
    for name, part in new.named_modules():
        averages: Any = getattr(part, "embed_sum", None)
        if averages is not None and f"{name}.embed_sum".lstrip(".") not in values:
            averages.copy_(part.weight)  # as if one vector, equal to the code, had chosen each code
        # Reset the averages of how often codes are used, which depend on `restart_threshold`.
        usage: Any = getattr(part, "usage", None)
        if (start_usage := getattr(part, "start_usage", None)) is not None:
            usage.fill_(start_usage)
    return new.train(old.training)
