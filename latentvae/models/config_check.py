"""Check that the numbers of layers in a config from a file are within a limit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentvae.errors import UserError

MAX_LAYERS = 1000  # in a block


def check_depth(config: Mapping[str, Any], path: str | Path) -> None:
    """Check that no number of layers in a config is too large to build the network.

    Raises:
        UserError: a number of layers is above `MAX_LAYERS`.
    """
    for name, value in config.items():
        counts = value if isinstance(value, list | tuple) else [value]
        if "layers" in name and any(isinstance(n, int) and n > MAX_LAYERS for n in counts):
            raise UserError(f"{name} must be at most {MAX_LAYERS} (got {value} in '{path}')")
