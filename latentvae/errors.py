"""Define the errors that commands print in one line, without a traceback.

The message of a `UserError` names the wrong value and, if possible, the allowed values and the
nearest valid choice.
"""

import difflib
import re
from collections.abc import Iterable

_WITH_PASSWORD = re.compile(r"(\w://)[^/\s@]*:[^/\s@]*@")
_IN_A_WORKER = "Original Traceback (most recent call last):"


class UserError(ValueError):
    """An error in the user's input. Commands print the error in one line and exit with code 2."""

    def __init__(self, sentence: str = "") -> None:
        # DataLoader raises the exception of a worker again, with the whole traceback as its text.
        if _IN_A_WORKER in sentence:
            sentence = sentence.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(printable(_WITH_PASSWORD.sub(r"\1***@", sentence)))


class RunError(RuntimeError):
    """An error that the user did not cause: a full disk, no memory left, a process that died.

    Training commands print the error in one line and exit with code 1.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(printable(sentence))


def printable(text: str) -> str:
    """Return the text as one line that every terminal and file can show.

    File names may hold line breaks, escape codes, and bytes that are not UTF-8 (surrogates in
    Python). The returned text has escapes such as ``\\n``, ``\\x1b`` and ``\\udcff`` instead.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_no_password(value: str) -> None:
    """Check that a URL holds no password. `https://name:password@host` holds one.

    Without this check, logs and model cards would show the password.

    Raises:
        UserError: the URL holds a password. The error message does not show the password.
    """
    if _WITH_PASSWORD.search(value):
        raise UserError(
            f"'{value}' holds a password, which would be written into files. Remove the password "
            "from the URL, and log in with `hf auth login` or an environment variable."
        )


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"``, where x is the allowed text that is most like ``value``.

    If no allowed text is similar to ``value``, return ``""``.
    """
    matches = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
