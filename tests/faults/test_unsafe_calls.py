"""Nothing that a file holds is run: calls that are safe or not by their arguments or their object.

Whatever is unsafe by its name alone is forbidden in pyproject.toml, by ruff's rules S and TID251.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentvae

ROOT = Path(latentvae.__file__).parents[1]
FOLDERS = ("latentvae", "train", "benchmarks")
NEEDED = {  # call, or method of whatever object: what it must say
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    ".from_pretrained": ("use_safetensors", True),
}
HARMLESS = {  # keyword of any call: the one value it may have
    "allow_pickle": False,
    "pickle_module": None,
    "shell": False,
    "trust_remote_code": False,
    "weights_only": True,
}
RUNNERS = {"compile", "eval", "exec", "__import__"}  # built in, which ruff cannot forbid by name
METHODS = {
    "extractall": "unpacks an archive",
    "extract": "unpacks an archive",
    "from_ckpt": "reads pickles",
    "from_single_file": "may read pickles",
    "register_for_checkpointing": "writes pickles",
}
BARE = {"torch.load", "numpy.load", "subprocess.run", "os.system"}  # are told by their module
SAFE_FILES = (".safetensors", ".json", ".md", ".txt")


def faults(source: str) -> list[str]:
    tree = ast.parse(source)
    found = [f for node in ast.walk(tree) if isinstance(node, ast.Call) for f in _of_call(node)]
    imported = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    return found + [f"imports {name} by its bare name" for name in imported if name in BARE]


def _of_call(node: ast.Call) -> Iterator[str]:
    name, given = _name(node.func), {k.arg: k.value for k in node.keywords if k.arg}
    owner, _, method = name.rpartition(".")
    keyword, value = NEEDED.get(name) or NEEDED.get(f".{method}") or ("", None)
    if keyword and not _is(given.pop(keyword, None), value):
        yield f"{name} without {keyword}={value}"
    for keyword, value in given.items():
        if keyword in HARMLESS and not _is(value, HARMLESS[keyword]):
            yield f"{name} with {keyword}"

    if name in RUNNERS:
        yield f"{name} runs text"
    if method in METHODS and (method != "extract" or "tar" in owner or "zip" in owner):
        yield f"{name} {METHODS[method]}"
    if method in ("load_state", "save_state") and "accelerator" in owner:
        yield f"{name} reads or writes pickles"
    if method == "hf_hub_download" and not _text(given.get("filename")).endswith(SAFE_FILES):
        yield f"{name} of a file that may be a pickle"
    if method == "load_dataset" and "revision" in given:
        yield f"{name} of a revision, where scripts of old may lie"


def _name(node: ast.AST) -> str:
    """`a.b.c` of an expression; what is not a name is left empty."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _is(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _text(node: ast.AST | None) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ""


def test_no_source_calls_what_may_run_a_file() -> None:
    sources = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {path.name: found for path in sources if (found := faults(path.read_text()))}
    assert len(sources) > 100 and not found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=True, pickle_module=dill)",
        "from torch import load",
        "from subprocess import run",
        "other.load('x', weights_only=False)",
        "np.load('x')",
        "np.load('x', allow_pickle=True)",
        "numpy.load('x', allow_pickle=flag)",
        "load_dataset('x', trust_remote_code=True)",
        "load_dataset('x', trust_remote_code=flag)",
        "load_dataset('x', revision='script')",
        "AutoencoderKL.from_pretrained('x')",
        "VQModel.from_pretrained('x', use_safetensors=False)",
        "VQModel.from_pretrained('x', use_safetensors=flag)",
        "AutoencoderKL.from_single_file('x.ckpt')",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "run(command, shell=True)",
        "tar.extract(member)",
        "zipfile.ZipFile(x).extractall(folder)",
        "hf_hub_download('x', filename='pytorch_model.bin')",
        "hf_hub_download('x', filename=name)",
        "accelerator.load_state('x')",
        "accelerator.save_state('x')",
        "accelerator.register_for_checkpointing(model)",
    ],
)
def test_an_unsafe_call_is_found(source: str) -> None:
    assert len(faults(source)) == 1


def test_safe_calls_pass() -> None:
    source = "net.eval()\ntorch.load(p, weights_only=True)\nre.compile(t)\n"
    assert faults(source + "np.load(p, allow_pickle=False)") == []
