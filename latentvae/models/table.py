"""List the kinds of networks that can be trained, and find the `Family` of any network."""

import functools
import operator
from typing import TYPE_CHECKING, Annotated, Any

import diffusers
from pydantic import Discriminator, Tag

from latentvae.models.conv.asymmetric import AsymmetricFamily
from latentvae.models.conv.kl import KLFamily
from latentvae.models.conv.stock_vq import StockVQFamily
from latentvae.models.conv.vq import VQFamily
from latentvae.models.dc.dc import DCFamily
from latentvae.models.family import Family
from latentvae.models.flux2.flux2 import Flux2Family
from latentvae.models.foreign import RAEFamily
from latentvae.models.likelihood_family import LikelihoodFamily
from latentvae.models.likelihood_models import LIKELIHOOD_NETWORKS
from latentvae.models.model_config import ModelConfig
from latentvae.models.network import Network
from latentvae.models.trainable import TrainableFamily
from latentvae.models.vit.vit_kl import ViTKLFamily
from latentvae.models.vit.vit_vq import ViTVQFamily
from latentvae.models.vqvae2.vqvae2 import VQVAE2Family
from latentvae.option_marks import tag_in

# Keys are the values of the option `architecture`.
FAMILIES: dict[str, TrainableFamily] = {
    "kl": KLFamily(),
    "asymmetric": AsymmetricFamily(),
    "dc": DCFamily(),
    "vq": VQFamily(),
    "vit_kl": ViTKLFamily(),
    "vit_vq": ViTVQFamily(),
    "vqvae2": VQVAE2Family(),
}

# Keys are names of classes. Older releases of diffusers do not have all of its classes below.
FOREIGN: dict[str, Family] = {
    **{name: LikelihoodFamily() for name in LIKELIHOOD_NETWORKS},
    "VQModel": StockVQFamily(),
    "AutoencoderKLFlux2": Flux2Family(),
    "AutoencoderRAE": RAEFamily(),
}
ANY = Family()

# Class of the options of each kind of network. The option `architecture` chooses one of them.
MODELS: dict[str, type[ModelConfig]] = {name: kind.options for name, kind in FAMILIES.items()}
if TYPE_CHECKING:
    AnyModelConfig = ModelConfig
else:
    _TAGGED = (Annotated[options, Tag(name)] for name, options in MODELS.items())
    AnyModelConfig = Annotated[
        functools.reduce(operator.or_, _TAGGED), Discriminator(tag_in("architecture", "kl"))
    ]

_BY_CLASS: dict[type[Any], Family] = {kind.network: kind for kind in FAMILIES.values()}


def family_of(net: Network) -> Family:
    """Return the `Family` with the methods for a network, found by its class or base class."""
    for cls in type(net).__mro__:
        if cls in _BY_CLASS:
            return _BY_CLASS[cls]
        if cls.__name__ in FOREIGN:
            return FOREIGN[cls.__name__]
    return ANY


def class_named(name: str) -> Any | None:
    """Return the class called `name` in this package or diffusers, or None."""
    for kind in FAMILIES.values():
        if kind.network.__name__ == name:
            return kind.network
    if name in LIKELIHOOD_NETWORKS:
        return LIKELIHOOD_NETWORKS[name]
    return getattr(diffusers, name, None) if name.isidentifier() else None
