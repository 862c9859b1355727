"""Remove what training tools add to the names of tensors, such as `_orig_mod.` of torch.compile."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from latentvae.errors import UserError

# Each key is a part of a tensor's name, at the start of the name or after a dot.
_TOOLS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "base_model.model": "PEFT",
    "base_layer": "PEFT",
}
_WRAPPER = re.compile(rf"(?:^|(?<=\.))({'|'.join(map(re.escape, _TOOLS))})\.")
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|modules_to_save|hada_\w+|lokr_\w+|oft_\w+)(\.|$)")


def plain_names(names: Iterable[str], *, path: str | Path) -> dict[str, str]:
    """Map each tensor's name to the same name without the parts that training tools add.

    Args:
        names: names of the tensors.
        path: path of the tensors' file or folder, for the error message.

    Raises:
        UserError: the tensors are adapters that were not merged into the network.
    """
    names = list(names)
    if adapter := next(filter(_ADAPTER.search, names), None):
        raise UserError(
            f"'{path}' holds adapters that are not merged into the network, such as '{adapter}'. "
            "Merge the adapters with PEFT's merge_and_unload() and save the network."
        )
    return {name: _WRAPPER.sub("", name) for name in names}


def say_removed(names: dict[str, str], *, path: str | Path) -> None:
    """Print on stderr which parts `plain_names` removed from the names of tensors."""
    parts = {part: None for name in names for part in _WRAPPER.findall(name)}
    if parts:
        found = " and ".join(f"'{part}.' ({_TOOLS[part]})" for part in parts)
        say(f"the names of the tensors in '{path}' hold {found}, which is removed")


def say(text: str) -> None:
    """Print a note on stderr."""
    print(f"note: {text}", file=sys.stderr)
