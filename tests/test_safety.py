"""Nothing that a file holds is run: no pickle, no unsafe YAML, no code from strings or hubs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentvae

ROOT = Path(latentvae.__file__).parents[1]
FOLDERS = ("latentvae", "train", "benchmarks")
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# The one that reads NumPy arrays and refuses the rest; see tests/losses/test_perceptual.py.
RESTRICTED = "latentvae/losses/lpips_weights.py"
IN_RESTRICTED = {"pickle.Unpickler", "pickle.UnpicklingError"}
# Starts this Python anew with a list of arguments, which no shell reads.
LAUNCHER = ("latentvae/training/verify_resume/launch.py", "subprocess.Popen")
RUNNERS = {"eval", "exec", "compile", "os.system", "os.popen", "runpy.run_path", "subprocess"}


def faults(source: str, *, path: str = "latentvae/made_up.py") -> list[str]:
    """What ``source`` does that a file from a stranger could turn into running code."""
    tree = ast.parse(source)
    return [*_imports(tree, path), *_pickle_uses(tree, path), *_calls(tree, path)]


def _imports(tree: ast.AST, path: str) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in PICKLERS and (path, name) != (RESTRICTED, "pickle"):
                yield f"imports {name}"
            if name in {"torch.load", "yaml.load", "os.system", "numpy.load"}:
                yield f"imports {name} by its bare name"


def _pickle_uses(tree: ast.AST, path: str) -> Iterator[str]:
    """In the one module that may import it, only the class to restrict and its error."""
    if path == RESTRICTED:
        used = {_name(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        yield from (n for n in sorted(used) if n.startswith("pickle.") and n not in IN_RESTRICTED)


def _calls(tree: ast.AST, path: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, given = _name(node.func), {k.arg: k.value for k in node.keywords}
        launches = (path, name) == LAUNCHER and "shell" not in given
        if (name in RUNNERS or name.split(".")[0] in RUNNERS) and not launches:
            yield f"calls {name}"
        if name == "torch.load" and not _is(given.get("weights_only"), True):
            yield "calls torch.load without weights_only=True"
        if name.startswith("yaml.") and name.split(".")[1] in ("load", "load_all", "unsafe_load"):
            yield f"calls {name}, not yaml.safe_load"
        for keyword, harmless in (("allow_pickle", False), ("trust_remote_code", False)):
            if keyword in given and not _is(given[keyword], harmless):
                yield f"gives {keyword} to {name}"
        if name.endswith(".from_pretrained") and not _is(given.get("use_safetensors"), True):
            yield "calls from_pretrained without use_safetensors=True"


def _name(node: ast.AST) -> str:
    """`a.b.c` of an expression; what is not a name is left empty."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def sources() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
    )


@pytest.mark.parametrize("path", sources())
def test_nothing_from_a_file_is_run(path: str) -> None:
    assert faults((ROOT / path).read_text(), path=path) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "load_dataset('x', trust_remote_code=True)",
        "load_dataset('x', trust_remote_code=flag)",
        "AutoencoderKL.from_pretrained('x')",
        "import os\nos.system('ls')",
    ],
)
def test_the_gate_catches(source: str) -> None:
    assert len(faults(source)) == 1


def test_the_gate_holds_in_the_one_module_that_may_import_pickle() -> None:
    assert faults("import pickle\nclass U(pickle.Unpickler): ...", path=RESTRICTED) == []
    assert faults("import pickle\npickle.loads(b)", path=RESTRICTED) == ["pickle.loads"]


def test_the_gate_holds_in_the_one_module_that_may_launch() -> None:
    path, popen = LAUNCHER
    assert faults(f"{popen}([a])", path=path) == []
    assert faults(f"{popen}(a, shell=True)", path=path) == [f"calls {popen}"]
    assert faults("subprocess.run([a])", path=path) == ["calls subprocess.run"]


def test_the_gate_lets_pass() -> None:
    source = "net.eval()\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)\nre.compile(t)"
    assert faults(source) == []
