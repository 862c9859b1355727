"""The files of a diffusers folder that hold its weights, and their variants, such as fp16.

diffusion_pytorch_model.safetensors, diffusion_pytorch_model-00001-of-00002.safetensors   plain
diffusion_pytorch_model.fp16.safetensors                                                  fp16

Weights are called plain if the names of their files contain no variant.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import list_repo_files, try_to_load_from_cache

from latentvae.errors import UserError, nearest
from latentvae.models.wrapper_names import say

_SHARD = r"(?:-\d+-of-\d+)?"
_NAME = re.compile(
    rf"diffusion_pytorch_model{_SHARD}(?:\.(?P<variant>[^.]+?))?{_SHARD}\.safetensors"
)
_WITH_CODE = (".bin", ".ckpt", ".pt", ".pth")  # pickles


def is_weights(name: str, *, variant: str | None) -> bool:
    """Return whether the file `name` holds weights of the variant. None means plain weights."""
    match = _NAME.fullmatch(name)
    return match is not None and match["variant"] == variant


def variant_of(name: str) -> str | None:
    """Return the variant in the name of a file, or None."""
    match = _NAME.fullmatch(name)
    return None if match is None else match["variant"]


def names_of(repository: str, subfolder: str | None) -> list[str]:
    """Return the names of the files in a local folder, or in a folder of a repository on the Hub.

    Without an internet connection, the names are those of files that were downloaded before.
    """
    if Path(repository).is_dir():
        return sorted(path.name for path in Path(repository).iterdir())
    inside = f"{subfolder}/" if subfolder else ""
    try:
        files = list_repo_files(repository)
    except Exception:  # without connection or access, the library raises many types of errors
        config = try_to_load_from_cache(repository, f"{inside}config.json")
        if not isinstance(config, str):
            return []
        return sorted(path.name for path in Path(config).parent.iterdir())
    names = (file.removeprefix(inside) for file in files if file.startswith(inside))
    return sorted(name for name in names if "/" not in name)


def choose_variant(names: Iterable[str], variant: str | None, *, path: str | Path) -> str | None:
    """Return the variant of the weights to load. None means the plain weights.

    Args:
        names: names of the files in the folder.
        variant: variant that the user asked for, such as "fp16". None means the plain weights, or
            the only variant if there are no plain weights.
        path: path of the folder, for messages.

    Raises:
        UserError: the folder has no weights or no such variant. If `variant` is None, the error
            also occurs if the folder has several variants but no plain weights.
    """
    names = list(names)
    found = {match["variant"] for name in names if (match := _NAME.fullmatch(name))}
    others = sorted(name for name in found if name is not None)
    if not found:
        raise UserError(f"cannot load the weights in '{path}': {_why_none(names)}")

    if variant in found:
        return variant
    if variant is not None:
        have = ", ".join([*(["the plain weights"] if None in found else []), *map(repr, others)])
        raise UserError(
            f"'{path}' has no variant '{variant}'. It has {have}{nearest(variant, others)}"
        )
    if len(others) > 1:
        raise UserError(
            f"'{path}' has its weights only as the variants {', '.join(map(repr, others))}. "
            f"Choose one, such as --variant {others[0]}."
        )
    say(f"'{path}' has its weights only as the variant '{others[0]}', which is loaded")
    return others[0]


def _why_none(names: Sequence[str]) -> str:
    """Return the reason why none of the files with these names has usable weights."""
    if pickles := [name for name in names if name.endswith(_WITH_CODE)]:
        return (
            f"the weights are only in {pickles[0]}, which is not loaded because a pickle file can "
            "hold code that does harm. If you trust the file, load it once with diffusers "
            "(use_safetensors=False), and save the network with save_pretrained, which writes "
            "safetensors."
        )
    if files := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"the folder has no diffusion_pytorch_model.safetensors, but has {files[0]}. "
            f"Rename {files[0]} to diffusion_pytorch_model.safetensors, or give the path of this "
            "file instead of the folder."
        )
    return "there is no diffusion_pytorch_model.safetensors"
