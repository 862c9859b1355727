"""Report the checks of `preflight` and `verify-resume` as lines, as JSON and as an exit code."""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentvae.errors import UserError, printable

COLUMNS = 80


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of a check: what was checked, whether the check passed, and what was found.

    Attributes:
        name: what is checked, such as `weights`. Names are unique in a report.
        passed: whether the check passed.
        value: what was found: a number, a text, or a list or dict of these.
        expected: what should be found, in words.
        advice: what to do if the check fails.
    """

    name: str
    passed: bool
    value: Any
    expected: str
    advice: str

    def __str__(self) -> str:
        mark = "ok    " if self.passed else "FAILED"
        value = f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)
        line = f"{mark} {self.name}: {value} (expected: {self.expected})"
        return wrapped(line if self.passed else f"{line}. {self.advice}", indent=len(mark) + 1)


def wrapped(text: str, *, indent: int = 2) -> str:
    """Return a text in lines of at most 80 characters. All lines after the first are indented.

    A word that is longer than a line, such as a path, is not broken.
    """
    return textwrap.fill(
        printable(text),
        width=COLUMNS,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def check_json_file(path: Path | None) -> None:
    """Check that the JSON report can be written to `path`. With None, no report is written.

    Raises:
        UserError: the path is a folder, or the file's folder does not exist.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"json '{path}' is a folder. Give a file, such as {path / 'checks.json'}.")
    if not path.parent.is_dir():
        raise UserError(
            f"json '{path}' cannot be written, because the folder '{path.parent}' does not exist. "
            "Make it first."
        )


def conclude(checks: Sequence[Check], *, json_file: Path | None = None) -> int:
    """Print how many checks passed, and write all results to `json_file`, if it is not None.

    Return the exit code: 0 if all checks passed, 1 if a check failed.
    """
    assert checks and len({check.name for check in checks}) == len(checks)
    failed = [check.name for check in checks if not check.passed]
    if json_file is not None:
        rows = [asdict(check) | {"value": _finite(check.value)} for check in checks]
        json_file.write_text(json.dumps({"checks": rows}, indent=1, allow_nan=False) + "\n")
    num_passed = len(checks) - len(failed)
    summary = f"{num_passed} of {len(checks)} checks hold"
    print(wrapped(summary + (f". {', '.join(failed)} failed" * bool(failed))))
    return 1 if failed else 0


def _finite(value: Any) -> Any:
    """Return the value with NaN and infinities as text, because JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
