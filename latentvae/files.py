"""Small files that say something of others (JSON, YAML), read so that whatever lies in their place
is told in one sentence: a pipe or a device is not waited for, no tag of YAML makes an object, and
an option that is given twice is refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from latentvae.errors import UserError

MAX_NODES = 100_000
SHOWN = 300  # characters of what a parser says


def read_text(path: Path) -> str:
    """A text in UTF-8.

    Raises:
        UserError: it is not there, not a regular file, or something else than text.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise UserError(f"cannot read '{path}': it is not a regular file")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a null byte in the path
        raise UserError(f"cannot read '{path}': {error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file says; of any type.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError too
        raise UserError(f"'{path}' is not valid JSON: {_reason(error)}") from error


def read_yaml(path: Path) -> Any:
    """What a YAML file says; of any type.

    Raises:
        UserError: it cannot be read, is no YAML, asks for objects, or has a key twice.
    """
    text = read_text(path)
    try:
        _check_nodes(yaml.compose(text, Loader=yaml.SafeLoader), {})
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, say
        raise UserError(f"'{path}' is not valid YAML: {_reason(error)}") from error


def _check_nodes(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """How many nodes there are once every alias is written out, of which few can make billions."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = MAX_NODES  # if it is met again on the way down, it holds itself
    below: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        below = node.value
    elif isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key, times in Counter(keys).items() if times > 1]:
            raise ValueError(f"{_cut(twice[0])!r} is given twice")
    sizes[id(node)] = 1 + sum(_check_nodes(part, sizes) for part in below)
    if sizes[id(node)] > MAX_NODES:
        raise ValueError("its aliases stand for too much")
    return sizes[id(node)]


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return _cut(" ".join(str(error).split()))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
