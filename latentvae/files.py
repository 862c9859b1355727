"""Read small JSON and YAML files. If a file is wrong, an error says why in one sentence.

Pipes and devices are an error, because opening them could wait forever. YAML tags never create
Python objects. A key that occurs twice in YAML is an error.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from latentvae.errors import UserError

MAX_NODES = 100_000
SHOWN = 300  # number of characters of a parser's message that our message shows


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        UserError: the file does not exist, is not a regular file, or is not text.
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
    """Return the content of a JSON file, of any type.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError too
        raise UserError(f"'{path}' is not valid JSON: {_reason(error)}") from error


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file, of any type.

    Raises:
        UserError: the file cannot be read, is not YAML, asks for Python objects, or has a key
            twice.
    """
    text = read_text(path)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _check_nodes(node, {})
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a wrong date is a ValueError
        raise UserError(f"'{path}' is not valid YAML: {_reason(error)}") from error


def _check_nodes(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Return the number of YAML nodes after expanding all aliases.

    A few nested aliases can expand to billions of nodes.

    Raises:
        ValueError: there are too many nodes, or a key occurs twice.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = MAX_NODES  # a node that contains itself counts as too many nodes

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
        raise ValueError(f"the aliases of the file expand to more than {MAX_NODES:,} values")
    return sizes[id(node)]


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return _cut(" ".join(str(error).split()))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
