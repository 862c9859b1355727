"""Errors that a user can mend: one sentence with the value, what is allowed and the nearest valid
choice."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong. Commands print it as one sentence and exit with code 2."""


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``allowed``, or ``""`` if none is
    close."""
    matches = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
