"""A gate for every source: nothing that a file holds is run. No pickle, no unsafe YAML, no code
from strings or hubs, no unpacking of archives, no shell."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentvae

ROOT = Path(latentvae.__file__).parents[1]
FOLDERS = ("latentvae", "train", "benchmarks")
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLERS |= {"jsonpickle", "torch.package"}
# The one that reads NumPy arrays and refuses the rest; see tests/losses/test_perceptual.py.
RESTRICTED = "latentvae/losses/lpips_weights.py"
IN_RESTRICTED = {"pickle.Unpickler", "pickle.UnpicklingError"}
# Starts of names that are not called: they run text, programs or pickles, or unpack archives.
RUNNERS = (
    "eval exec compile __import__ builtins.eval builtins.exec os.system os.popen os.exec os.spawn "
    "os.posix_spawn runpy subprocess pty code.interact shutil.unpack_archive tempfile.mktemp "
    "np.loadtxt.converters torch.jit.load torch.hub.load torch.ops.load_library ctypes "
    "importlib.util.spec_from_file_location importlib.machinery"
).split()
METHODS = {  # of whatever object
    "extractall": "unpacks an archive",
    "load_state": "is Accelerate's, which loads pickles",
    "save_state": "is Accelerate's, which writes pickles",
    "register_for_checkpointing": "is Accelerate's, which writes pickles",
    "from_ckpt": "reads pickles",
    "from_single_file": "may read pickles",
}
BARE = {  # functions that are told from others by their module alone
    "torch.load", "torch.hub.load", "yaml.load", "os.system", "numpy.load", "subprocess.run",
    "shutil.unpack_archive", "tempfile.mktemp", "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip
FORBIDDEN_VALUES = (  # keyword, and the one value it may have where it is given
    ("allow_pickle", False),
    ("trust_remote_code", False),
    ("shell", False),
    ("verify", True),
    ("autoescape", True),
    ("pickle_module", None),
    ("weights_only", True),
)
# (file, what is said): the exact places that may, and why.
ALLOWED = {
    (
        "latentvae/proofs/verify_resume/launch.py",
        "calls subprocess.Popen",
    ): "starts this Python anew with a list of arguments, which no shell reads",
    (
        "benchmarks/large_images.py",
        "calls subprocess.run",
    ): "measures memory in a process of its own: this Python and file, as a list of arguments",
    (
        "latentvae/compute/memory.py",
        "calls ctypes.CDLL",
    ): "asks the C library to keep memory or give it back",
}


def faults(source: str, *, path: str = "latentvae/made_up.py") -> list[str]:
    """What ``source`` does that a file from a stranger could turn into running code."""
    tree = ast.parse(source)
    found = [*_imports(tree, path), *_pickle_uses(tree, path), *_calls(tree)]
    return [fault for fault in found if (path, fault) not in ALLOWED]


def _imports(tree: ast.AST, path: str) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            pickler = parts[0] in PICKLERS or ".".join(parts[:2]) in PICKLERS
            if pickler and (path, name) != (RESTRICTED, "pickle"):
                yield f"imports {name}"
            if name in BARE:
                yield f"imports {name} by its bare name"


def _pickle_uses(tree: ast.AST, path: str) -> Iterator[str]:
    """In the one module that may import it, only the class to restrict and its error."""
    if path == RESTRICTED:
        used = {_name(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        yield from (n for n in sorted(used) if n.startswith("pickle.") and n not in IN_RESTRICTED)


def _calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, given = _name(node.func), {k.arg: k.value for k in node.keywords}
        if _runs(name):
            yield f"calls {name}"
        last = name.rpartition(".")[2]
        accelerates = "accelerator" in name or "state" not in last
        if "." in name and last in METHODS and accelerates:
            yield f"calls {name}: it {METHODS[last]}"
        if last == "extract" and ("tar" in name or "zip" in name):
            yield f"calls {name}: it unpacks an archive"
        if name == "torch.load" and not _is(given.get("weights_only"), True):
            yield "calls torch.load without weights_only=True"
        if name.startswith("yaml.") and re.fullmatch(r"(full_|unsafe_)?load(_all)?", last):
            yield f"calls {name}, not yaml.safe_load"
        if last in ("load", "loads") and name.split(".")[0] in PICKLERS:
            continue  # its import is told
        if name in ("np.load", "numpy.load") and "allow_pickle" not in given:
            yield f"calls {name} without allow_pickle=False"
        for keyword, harmless in FORBIDDEN_VALUES:
            told = keyword == "weights_only" and name == "torch.load"
            if keyword in given and not told and not _is(given[keyword], harmless):
                yield f"gives {keyword} to {name}"
        if last == "hf_hub_download" and not _safe_file(given.get("filename")):
            yield f"calls {name} of a file that may be a pickle"
        if last == "load_dataset" and "revision" in given:
            yield f"calls {name} of a revision, where scripts of old may lie"
        if name.endswith(".from_pretrained") and not _is(given.get("use_safetensors"), True):
            yield "calls from_pretrained without use_safetensors=True"


def _name(node: ast.AST) -> str:
    """`a.b.c` of an expression; what is not a name is left empty."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _runs(name: str) -> bool:
    """Whether a name is one of RUNNERS or lies below it; `os.exec` is any of its family."""
    families = ("os.exec", "os.spawn", "os.posix_spawn")
    below = any(name == runner or name.startswith(f"{runner}.") for runner in RUNNERS)
    return below or name.startswith(families)


def _safe_file(node: ast.AST | None) -> bool:
    """Whether it is a literal file name that can hold no code."""
    value = node.value if isinstance(node, ast.Constant) else ""
    return isinstance(value, str) and value.endswith((".safetensors", ".json", ".md", ".txt"))


def _is(node: ast.AST | None, value: bool | None) -> bool:
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
        "import os\nos.execv('x', [])",
        "import os\nos.popen('ls')",
        "import cPickle",
        "import joblib",
        "import shelve",
        "import marshal",
        "from torch import package",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.full_load(text)",
        "yaml.load_all(text)",
        "np.load('x')",
        "numpy.load('x', allow_pickle=flag)",
        "subprocess.run(command)",
        "subprocess.Popen(command)",
        "run(command, shell=True)",
        "from subprocess import run",
        "tar.extractall(folder)",
        "zipfile.ZipFile(x).extractall(folder)",
        "tar.extract(member)",
        "shutil.unpack_archive(path)",
        "tempfile.mktemp()",
        "VQModel.from_pretrained('x', use_safetensors=False)",
        "VQModel.from_pretrained('x', use_safetensors=flag)",
        "AutoencoderKL.from_single_file('x.ckpt')",
        "hf_hub_download('x', filename='pytorch_model.bin')",
        "hf_hub_download('x', filename=name)",
        "accelerator.load_state('x')",
        "accelerator.save_state('x')",
        "accelerator.register_for_checkpointing(model)",
        "load_dataset('x', revision='script')",
        "jinja2.Environment(autoescape=False)",
        "requests.get(url, verify=False)",
        "torch.hub.load('a/b', 'c')",
        "torch.jit.load('x')",
        "other.load('x', weights_only=False)",
        "torch.load('x', weights_only=True, pickle_module=dill)",
    ],
)
def test_the_gate_catches(source: str) -> None:
    assert len(faults(source)) == 1


def test_the_gate_holds_in_the_one_module_that_may_import_pickle() -> None:
    assert faults("import pickle\nclass U(pickle.Unpickler): ...", path=RESTRICTED) == []
    assert faults("import pickle\npickle.loads(b)", path=RESTRICTED) == ["pickle.loads"]


def test_the_gate_lets_pass() -> None:
    source = "net.eval()\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)\nre.compile(t)"
    assert faults(source) == []


def test_every_exception_is_still_needed() -> None:
    for path, fault in ALLOWED:
        tree = ast.parse((ROOT / path).read_text())
        assert fault in {*_imports(tree, path), *_pickle_uses(tree, path), *_calls(tree)}, path
