"""Make short and unique names for paths."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from latentvae.errors import UserError


def unique_names(paths: Sequence[str | Path]) -> list[str]:
    """Return the shortest ends of paths that are all different, such as `a/export`, `b/export`."""
    parts = [Path(path).absolute().parts for path in paths]
    if twice := [path for path, n in Counter(map(str, paths)).items() if n > 1]:
        raise UserError(f"'{twice[0]}' is given twice. Give each path once.")
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"two of these paths are the same folder: {', '.join(map(str, paths))}.")
