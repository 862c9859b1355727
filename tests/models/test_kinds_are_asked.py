"""Only `models` and `compute` test the kind of a network. Other packages use its family.

`compute` may do so because its algorithms are for certain layers.
"""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import latentvae

PACKAGE = Path(latentvae.__file__).parent
FREE = {"models", "compute"}
MODULES = {
    path.relative_to(PACKAGE).as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in FREE
}


def questions(source: str) -> list[str]:
    """List each test of a network's class, of its class's name or of its architecture."""
    tree = ast.parse(source)
    networks = set(_networks(tree))
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) in ("isinstance", "issubclass"):
            if networks & _names(node.args[1]):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            of_class = any(_is_type(side) for side in sides)
            of_architecture = any(_name(side) == "architecture" for side in sides)
            if (of_class and networks & _names(node)) or of_architecture or _compares_name(sides):
                found.append(ast.unparse(node))
    return found


def _networks(tree: ast.AST) -> Iterator[str]:
    """Yield names of network classes that are imported from diffusers or from models."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        module = node.module
        if module.split(".")[0] == "diffusers" or module.startswith("latentvae.models"):
            for alias in node.names:
                value: Any = getattr(import_module(module), alias.name, None)
                if inspect.isclass(value) and issubclass(value, nn.Module):
                    yield alias.asname or alias.name


def _names(node: ast.AST) -> set[str]:
    return {_name(part) for part in ast.walk(node)}


def _name(node: ast.AST) -> str:
    """Return the name of a name or an attribute, else ""."""
    return getattr(node, "id", getattr(node, "attr", ""))


def _is_type(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) == "type"


def _compares_name(sides: list[ast.expr]) -> bool:
    """Return whether `type(net).__name__` is compared with a text."""
    attributes = [side for side in sides if isinstance(side, ast.Attribute)]
    named = any(side.attr == "__name__" and _is_type(side.value) for side in attributes)
    return named and any(isinstance(side, ast.Constant) for side in sides)


@pytest.mark.parametrize("name", MODULES)
def test_nobody_asks_for_the_kind_of_a_network(name: str) -> None:
    assert questions(MODULES[name].read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from diffusers import VQModel\nisinstance(net, VQModel)",
        "from diffusers import VQModel as V, AutoencoderKL\nisinstance(net, (V, AutoencoderKL))",
        "from latentvae.models import DiscreteAutoencoder as D\nif type(net) is D: pass",
        "from diffusers import AutoencoderKL\ntype(net) in (AutoencoderKL,)",
        "type(net).__name__ == 'AutoencoderRAE'",
        "config.model.architecture in ('kl', 'asymmetric')",
        "architecture != 'dc'",
    ],
)
def test_the_checker_catches(source: str) -> None:
    assert len(questions(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from latentvae.autoencoder import Autoencoder\nisinstance(model, Autoencoder)",
        "from latentvae.models import DiscreteFamily\nassert isinstance(family, DiscreteFamily)",
        "from diffusers import AutoencoderKL\nAutoencoderKL.from_pretrained(folder)",
        "print(type(net).__name__)",
    ],
)
def test_the_checker_lets_pass(source: str) -> None:
    assert questions(source) == []
