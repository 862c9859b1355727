"""Imports point downwards only. Read from the source, so that imports inside functions count."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

import latentvae

PACKAGE = Path(latentvae.__file__).parent
ROOT = PACKAGE.parent

# What each part of the package may import of it. `latentvae` itself is the door: it names what it
# offers, and loads it when first used.
BASE = {
    "class_names",
    "errors",
    "distributed",
    "outputs",
    "files",
    "option_marks",
    "moments",
    "text",
    "linear_code",
}
ALLOWED = {
    "errors": set[str](),
    "class_names": {"errors"},
    "distributed": set[str](),
    "outputs": set[str](),
    "files": {"errors"},
    "option_marks": {"errors"},
    "moments": {"distributed"},
    "linear_code": {"moments"},
    "text": {"errors"},
    "bottlenecks": BASE,
    "likelihoods": BASE,
    "models": BASE | {"bottlenecks", "likelihoods"},
    "losses": BASE,
    "metrics": BASE,
    "data": BASE,
    "coding": BASE,
    "pictures": BASE | {"data"},
    "compute": BASE | {"bottlenecks", "likelihoods", "models"},
    "config": BASE | {"bottlenecks", "models", "losses", "data"},
    "autoencoder": BASE | {"models", "compute", "pictures"},
    "latents": BASE
    | {"bottlenecks", "models", "compute", "data", "metrics", "pictures", "coding", "autoencoder"},
    "semi_supervised": BASE | {"likelihoods", "models", "data", "latents"},
    "priors": BASE | {"models", "compute", "pictures", "latents", "autoencoder"},
    "export": BASE | {"bottlenecks", "models", "compute", "latents"},
    "report": {"errors", "files", "text"},  # it reads report.json alone, and measures nothing
    "evaluation": BASE
    | {"losses", "metrics", "data", "pictures", "models", "compute", "coding", "latents", "export"}
    | {"autoencoder", "report"},
    "anomaly": BASE | {"data", "losses", "models", "compute", "pictures", "autoencoder"},
    "reconstruct": BASE
    | {"losses", "metrics", "data", "pictures", "models", "compute", "autoencoder"},
    "engine": BASE | {"data", "config", "compute", "export"},
    "tasks": BASE
    | {"bottlenecks", "likelihoods", "models", "losses", "metrics", "data", "pictures", "latents"}
    | {"compute", "config", "export", "engine", "priors", "evaluation", "autoencoder"},
    "proofs": BASE
    | {"models", "losses", "metrics", "data", "compute", "config", "engine", "priors", "tasks"}
    | {"latents", "autoencoder", "report", "pictures"},
    "cli": BASE
    | {"config", "reconstruct", "report", "evaluation", "latents", "export", "engine", "tasks"}
    | {"proofs", "priors", "autoencoder", "data", "losses", "metrics", "compute", "models"}
    | {"anomaly"},
    "__init__": {"autoencoder", "latents", "tasks"},
}
ACCELERATE = {"engine", "tasks"}
WITHOUT_TORCH = {"class_names", "errors", "files", "option_marks", "text", "report"}
NEVER = {"train", "benchmarks", "tests"}  # top-level folders of the checkout


def part_of(module: str) -> str:
    """``latentvae.engine.loop`` -> ``engine``; ``latentvae`` -> ``__init__``."""
    return [*module.split("."), "__init__"][1]


def imports(source: str, *, module: str) -> Iterable[str]:
    """Full names that ``source``, which is ``module``, imports anywhere; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, *, module: str) -> list[str]:
    """Each import that breaks the layering, as a sentence."""
    part, found = part_of(module), []
    for name in imports(source, module=module):
        top, other = name.split(".")[0], part_of(name)
        if top in NEVER:
            found.append(f"{module} imports {top}")
        elif top == "accelerate" and part not in ACCELERATE:
            found.append(f"{module} imports accelerate")
        elif top == "torch" and part in WITHOUT_TORCH:
            found.append(f"{module} imports torch")
        elif top == "latentvae" and other != part and not (ALLOWED[part] & {other}):
            found.append(f"{module} imports latentvae.{other}")
    return found


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("latentvae", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts)] = path
    return found


def test_every_part_has_its_place() -> None:
    assert {part_of(module) for module in modules()} == set(ALLOWED)


@pytest.mark.parametrize("module", modules())
def test_imports_point_downwards(module: str) -> None:
    assert violations(modules()[module].read_text(), module=module) == []


def test_the_layers_have_an_order() -> None:
    """No part may reach itself, whatever is written into the table."""
    placed: set[str] = set()
    while len(placed) < len(ALLOWED):
        ready = {part for part, below in ALLOWED.items() if below <= placed} - placed
        assert ready, f"a circle among {set(ALLOWED) - placed}"
        placed |= ready
    free = {"losses", "data", "metrics"}
    for part in free:
        assert not ALLOWED[part] & {"models", "compute", "engine"}
    assert not ALLOWED["models"] & free
    assert not any("cli" in below for below in ALLOWED.values())


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("latentvae.models.calls", "from latentvae.tasks import autoencoder", "latentvae.tasks"),
        ("latentvae.models.conv.kl", "import latentvae.losses.objective as o", "latentvae.losses"),
        ("latentvae.models.conv.kl", "from latentvae import cli", "latentvae.cli"),
        ("latentvae.models.calls", "from ..losses import objective", "latentvae.losses"),
        ("latentvae.models.calls", "from .. import engine", "latentvae.engine"),
        ("latentvae.losses.objective", "def f():\n    import latentvae.models", "latentvae.models"),
        ("latentvae.data.dataset", "from accelerate import Accelerator", "accelerate"),
        ("latentvae.export.card", "import accelerate.utils", "accelerate"),
        ("latentvae.engine.loop", "from train.train_kl import main", "train"),
        ("latentvae.report.tables", "from benchmarks import compression", "benchmarks"),
        ("latentvae.report.tables", "from torch import Tensor", "torch"),
        ("latentvae.report.tables", "from latentvae.metrics import psnr", "latentvae.metrics"),
        (
            "latentvae.engine.loop",
            "from latentvae.cli.main import main",
            "latentvae.cli",
        ),
        ("latentvae.errors", "import latentvae", "latentvae.__init__"),
    ],
)
def test_the_checker_catches(module: str, source: str, said: str) -> None:
    assert violations(source, module=module) == [f"{module} imports {said}"]


def test_the_checker_lets_pass() -> None:
    source = "import torch\nfrom latentvae.errors import nearest\nfrom .schedule import x"
    assert violations(source, module="latentvae.engine.loop") == []
