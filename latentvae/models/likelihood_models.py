"""List the networks that `latentvae train-vae` trains by likelihood, and load exported networks."""

import functools
import json
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError

from latentvae.class_names import class_number, number_names
from latentvae.errors import UserError, first_line
from latentvae.models.bound import LikelihoodNet
from latentvae.models.dense.class_network import ClassVAE
from latentvae.models.dense.config import ClassVAEConfig, ConvVAEConfig, DenseVAEConfig
from latentvae.models.dense.network import VectorVAE
from latentvae.models.hierarchical.config import HierarchicalConfig
from latentvae.models.hierarchical.network import HierarchicalVAE
from latentvae.models.vae_config import VAEConfig
from latentvae.option_marks import tag_in

# Keys are the values of the option `architecture`.
LIKELIHOOD_OPTIONS: dict[str, type[VAEConfig]] = {
    "dense": DenseVAEConfig,
    "conv": ConvVAEConfig,
    "hierarchical": HierarchicalConfig,
    "classes": ClassVAEConfig,
}
# Keys are the class names in the config.json of an export.
LIKELIHOOD_NETWORKS: dict[str, Any] = {
    kind.__name__: kind for kind in (VectorVAE, HierarchicalVAE, ClassVAE)
}

if TYPE_CHECKING:
    AnyVAEConfig = VAEConfig
else:
    _TAGGED = (Annotated[options, Tag(name)] for name, options in LIKELIHOOD_OPTIONS.items())
    AnyVAEConfig = Annotated[
        functools.reduce(operator.or_, _TAGGED), Discriminator(tag_in("architecture", "dense"))
    ]

IMAGES_NAME = "images.json"


class ImagesOfModel(BaseModel):
    """The format of images that a network expects.

    An exported network has this format in its file `images.json`.

    Attributes:
        binarize: how pixels become black or white. "none" keeps grey pixels, "static" draws black
            or white with the grey value as the probability of white, and "threshold" rounds to
            black or white.
        image_interpolation_mode: filter that resizes images.
        value_range: pixel values that mean black and white in the image files. None means the usual
            values of the file's data type.
        preset: name of the set of options that the network was trained with, or "".
    """

    model_config = ConfigDict(extra="forbid")

    binarize: Literal["none", "static", "threshold"] = "none"
    image_interpolation_mode: str = "lanczos"
    value_range: tuple[float, float] | None = None
    preset: str = ""


def write_images_file(folder: Path, about: ImagesOfModel) -> None:
    """Write `images.json` into the folder of an exported network."""
    (folder / IMAGES_NAME).write_text(about.model_dump_json(indent=1) + "\n", encoding="utf-8")


def find_likelihood_export(path: Path) -> Path | None:
    """Return the folder of an exported network, given this folder or its training run's folder.

    Return None if there is no exported network with a likelihood.
    """
    for folder in (path, path / "export"):
        if _class_name(folder) in LIKELIHOOD_NETWORKS:
            return folder
    return None


def load_likelihood_net(path: str | Path) -> tuple[LikelihoodNet, ImagesOfModel]:
    """Load an exported network in eval mode, and the format of images that the network expects.

    Args:
        path: folder of the exported network, or of the training run that wrote it.

    Raises:
        UserError: there is no exported network with a likelihood, or a file of it is missing or
            damaged.
    """
    folder = find_likelihood_export(Path(path))
    if folder is None:
        raise UserError(
            f"'{path}' holds no network with a likelihood. Give a finished run of `latentvae "
            "train-vae`, or the folder `export` in it."
        )
    kind = LIKELIHOOD_NETWORKS[_class_name(folder)]
    try:
        net = kind.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"the network in '{folder}' cannot be loaded: {reason}") from error
    return net.eval(), read_images_file(folder)


def read_images_file(folder: Path) -> ImagesOfModel:
    """Return the format of images that the exported network in a folder expects.

    Raises:
        UserError: the file `images.json` is missing or damaged.
    """
    try:
        return ImagesOfModel.model_validate_json((folder / IMAGES_NAME).read_text("utf-8"))
    except (OSError, ValidationError) as error:
        raise UserError(f"'{folder / IMAGES_NAME}' cannot be read ({error}).") from error


def likelihood_net_of(net: Any, *, name: str) -> LikelihoodNet:
    """Return `net`, after a check that this network has a likelihood.

    Args:
        net: any network.
        name: name of the network, for the error message.

    Raises:
        UserError: the network has no likelihood.
    """
    if not isinstance(net, tuple(LIKELIHOOD_NETWORKS.values())):
        raise UserError(
            f"'{name}' is a {type(net).__name__}, which has no likelihood. Give a model that "
            "`latentvae train-vae` trained."
        )
    return net


def number_of_class(net: LikelihoodNet, name: str) -> int:
    """Return the number of a class of images, given its name or its number.

    Raises:
        UserError: the network has no classes, or no such class.
    """
    if not isinstance(net, ClassVAE):
        raise UserError(f"this model has no classes, so it cannot take the class '{name}'.")
    return class_number(name, net.config["class_names"] or number_names(net.num_classes))


def _class_name(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("_class_name", "")) if isinstance(config, dict) else ""
