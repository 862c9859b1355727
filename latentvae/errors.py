"""Errors that a user can mend: one sentence with the value, what is allowed and the nearest valid
choice."""

import difflib
import re
from collections.abc import Iterable

_WITH_PASSWORD = re.compile(r"(\w://)[^/\s@]*:[^/\s@]*@")
_IN_A_WORKER = "Original Traceback (most recent call last):"


class UserError(ValueError):
    """Something the user gave is wrong. Commands print it as one sentence and exit with code 2."""

    def __init__(self, sentence: str = "") -> None:
        if _IN_A_WORKER in sentence:  # DataLoader rebuilds a worker's exception from its traceback
            sentence = sentence.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(printable(_WITH_PASSWORD.sub(r"\1***@", sentence)))


class RunError(RuntimeError):
    """A run that was started rightly cannot go on: the disk is full, memory ran out, another
    process died. Scripts print it as one sentence and exit with code 1."""

    def __init__(self, sentence: str = "") -> None:
        super().__init__(printable(sentence))


def printable(text: str) -> str:
    """One line that every terminal and file takes: file names may hold line breaks, escape codes
    and bytes that are no UTF-8 (surrogates, in Python), which become ``\\n``, ``\\x1b``,
    ``\\udcff``."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def check_no_password(value: str) -> None:
    """Refuse an address such as `https://name:password@host`, which logs and cards would repeat.

    Raises:
        UserError: without the password.
    """
    if _WITH_PASSWORD.search(value):
        raise UserError(
            f"'{value}' holds a password, which would be written into files; leave it out, and log "
            "in by `hf auth login` or the environment"
        )


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``allowed``, or ``""`` if none is
    close."""
    matches = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
