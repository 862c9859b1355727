"""No option of the schema is read by nobody."""

import ast
import inspect
from pathlib import Path

import latentvae
from latentvae.models import build_autoencoder_kl
from latentvae.training.config import ModelConfig, TrainConfig, flat

PACKAGE = Path(latentvae.__file__).parent


def test_every_option_is_used() -> None:
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    options = set(flat(TrainConfig())) - set(ModelConfig.model_fields) - {"config"}
    assert options - read == set()


def test_every_option_of_the_model_is_one_of_its_builder() -> None:
    builder = set(inspect.signature(build_autoencoder_kl).parameters)
    assert set(ModelConfig().shape()) == builder - {"sample_size"}
