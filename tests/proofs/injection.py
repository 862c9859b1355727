"""Ways to put a fault into a program from outside: each patches one name until it is undone.

A name is `module:function` or `module:Class.method`, of the module that calls it; one that is not
there any more is an error, so that faults keep up with the code.
"""

from collections.abc import Callable, MutableMapping
from functools import reduce, wraps
from importlib import import_module
from typing import Any

import pytest

Inject = Callable[[pytest.MonkeyPatch], None]


def around(name: str, fault: Callable[..., Any]) -> Inject:
    """`fault(original, *args, **kwargs)` is called where the function was."""
    owner, attribute = _place(name)
    original = getattr(owner, attribute)

    @wraps(original)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        return fault(original, *args, **kwargs)

    return lambda patch: patch.setattr(owner, attribute, faulty)


def instead(name: str, fault: Callable[..., Any]) -> Inject:
    """`fault` takes the function's place."""
    return around(name, lambda _, *args, **kwargs: fault(*args, **kwargs))


def result(name: str, change: Callable[..., Any]) -> Inject:
    """The function returns `change(result, *args, **kwargs)`."""

    def fault(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return change(original(*args, **kwargs), *args, **kwargs)

    return around(name, fault)


def built(kind: type, change: Callable[[Any], None]) -> Inject:
    """Each object of a class goes through `change` when it is made."""

    def fault(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        change(self)

    return around(f"{kind.__module__}:{kind.__name__}.__init__", fault)


def entry(table: MutableMapping[str, Any], key: str, value: Any) -> Inject:
    """Another entry of a table."""
    assert key in table, key
    return lambda patch: patch.setitem(table, key, value)


def both(*faults: Inject) -> Inject:
    """Several at once."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        for fault in faults:
            fault(patch)

    return inject


def _place(name: str) -> tuple[Any, str]:
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    owner = reduce(getattr, owners, import_module(module))
    return owner, attribute
