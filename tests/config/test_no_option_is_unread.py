"""No option of the schema is read by nobody."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

import latentvae
from latentvae.bottlenecks import BOTTLENECKS
from latentvae.config.run_config import flat
from latentvae.models import VQVAE2
from latentvae.models.conv.asymmetric import build_asymmetric_kl
from latentvae.models.conv.discrete_autoencoder import DiscreteAutoencoder
from latentvae.models.conv.kl import build_autoencoder_kl
from latentvae.models.dc.dc import build_autoencoder_dc
from latentvae.models.table import MODELS
from latentvae.models.vit.vit_kl import ViTAutoencoderKL
from latentvae.models.vit.vit_vq import ViTTokenizer
from latentvae.tasks.autoencoder.config import TrainConfig

BUILDERS: dict[str, Any] = {
    "kl": build_autoencoder_kl,
    "asymmetric": build_asymmetric_kl,
    "dc": build_autoencoder_dc,
    "vq": DiscreteAutoencoder,
    "vit_kl": ViTAutoencoderKL,
    "vit_vq": ViTTokenizer,
    "vqvae2": VQVAE2,
}
PACKAGE = Path(latentvae.__file__).parent


def test_every_option_is_used() -> None:
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    options = set(flat(TrainConfig())) - set(flat(TrainConfig().model)) - {"config"}
    assert options - read == set()


@pytest.mark.parametrize("architecture", MODELS)
def test_every_option_of_the_model_is_one_of_its_builder(architecture: str) -> None:
    builder = set(inspect.signature(BUILDERS[architecture]).parameters)
    builder -= {"sample_size", "image_channels", "in_channels", "out_channels", "scaling_factor"}
    assert set(MODELS[architecture]().shape()) == builder


@pytest.mark.parametrize("kind", BOTTLENECKS)
def test_every_option_of_a_bottleneck_is_one_of_its_module(kind: str) -> None:
    entry = BOTTLENECKS[kind]
    module = set(inspect.signature(entry.module).parameters) - {"group_bits"}
    arguments = entry.config().arguments()
    assert arguments.pop("type") == kind
    assert set(arguments) == module
