"""What can be wrong with a file: its bytes, what lies in its place, and what JSON or YAML says."""

import copy
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RAN = "LATENTVAE_TEST_PAYLOAD"  # names the file that a payload would write


def payload() -> bytes:
    """A pickle that writes the file that the environment names, when it is loaded.

    Written by hand, so that nothing here needs to pickle: it calls `builtins.exec` with a text.
    """
    code = f"import os; open(os.environ['{RAN}'], 'w').close()".encode()
    return b"c__builtin__\nexec\n(V" + code + b"\ntR."


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: min(int(len(content) * share), len(content) - 1)]


def flipped(content: bytes, place: int | None = None) -> bytes:
    place = len(content) // 2 if place is None else place
    return content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :]


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut at 50 %": _cut(0.5),
    "cut at 99 %": _cut(0.99),
    "html": lambda content: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "pickle": lambda content: payload(),
    "zeros": lambda content: bytes(len(content)),
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "null bytes": lambda content: b"\0" * 9 + content,
}
JSON: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "deep mappings": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "a text": b'"text"',
    "an empty mapping": b"{}",
    "NaN": b"NaN",
    "digits": b"9" * 10_000,
    "lone surrogate": b'{"model": "\\ud800"}',
}
YAML: dict[str, bytes] = {
    "deep": b"[" * 3_000,
    "a list": b"- a\n- b",
    "a number": b"3",
    "a text": b"text",
    "NaN": b".nan",
    "digits": b"model: " + b"9" * 10_000,
    "a date that is none": b"model: 2001-99-99",
    "apply": f'model: !!python/object/apply:builtins.exec [\'import os; open(os.environ["{RAN}"], '
    '"w")\']'.encode(),
    "new": b"model: !!python/object/new:os.system ['true']",
    "name": b"model: !!python/name:os.system",
    "laughs": b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + b"".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n".encode() for n in range(1, 9))
    + b"model: *a8",
    "itself": b"model: &a [*a]",
    "list as a key": b"? [1]\n: 2",
    "number as a key": b"1: 2",
    "null as a key": b"~: 2\nmodel: {~: 3}",
    "twice": b"run: {}\nrun: {}",
    "twice inside": b"run: {seed: 1, seed: 2}",
    "escape codes": b'model: {"\\e[31mred\\nline": 1}',
}


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _linked(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target.format(name=path.name))

    return link


IN_ITS_PLACE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "a named pipe": _pipe,
    "a folder": _folder,
    "a link to nothing": _linked("nowhere"),
    "a link to itself": _linked("{name}"),
    "a link to a device": _linked("/dev/zero"),
    "no permission": lambda path: path.chmod(0),
}

VALUES: tuple[Any, ...] = (
    *(None, [], {}, "", "text", "../../x", True, -1, 0.5, float("nan"), float("inf"), 10**30),
    *([[]], {"a": []}, "\x1b[31m\n\0"),
)


def wrong_values(tree: Any, *, count: int, seed: int = 0) -> Iterator[Any]:
    """The tree with one entry gone, or of another value; `count` of all there are, drawn."""
    places = list(_places(tree))
    every = [(place, value) for place in places for value in (..., *VALUES)]
    for place, value in random.Random(seed).sample(every, min(count, len(every))):
        changed = copy.deepcopy(tree)
        inside = changed
        for key in place[:-1]:
            inside = inside[key]
        if value is ...:
            del inside[place[-1]]
        else:
            inside[place[-1]] = copy.deepcopy(value)
        yield changed


def _places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree[:3])
    for key, value in entries:
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*above, key))
