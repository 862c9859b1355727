"""Check the rows and the options of a detector.

Symbols: `N` rows, `F` columns.
"""

import warnings
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.utils.validation import validate_data

from latentvae.errors import UserError


def checked_rows(detector: Any, rows: Any, *, reset: bool, minimum: int = 1) -> np.ndarray:
    """Return rows as a finite float64 array (N, F).

    Args:
        detector: the detector, which stores the names and the number of columns.
        rows: array, list of lists or pandas table.
        reset: whether to store the columns, as in `fit`. If False, the columns of `rows` are
            compared with the stored columns.
        minimum: smallest number of rows.

    Raises:
        ValueError: a value is text, NaN or infinite, the number or the names of the columns are
            wrong, or there are too few rows.
    """
    try:
        checked: Any = validate_data(
            detector, rows, reset=reset, dtype=np.float64, ensure_min_samples=minimum
        )

    except ValueError as error:
        if "could not convert string" not in str(error):
            raise
        value = str(error).partition(":")[2].strip()
        raise UserError(
            f"the rows hold the text {value}, but {type(detector).__name__} needs numbers. Turn "
            "text columns into numbers with latentvae.anomaly.tables.TableEncoder."
        ) from error
    return checked


def check_constant_columns(rows: np.ndarray, names: Any, *, action: str) -> None:
    """Check that no column has the same value in every row.

    Args:
        rows: training rows, (N, F).
        names: names of the columns, or None.
        action: "error" raises an error, and "keep" allows constant columns.

    Raises:
        UserError: a column is constant and `action` is "error", or `action` is unknown.
    """
    check_choice("constant_columns", action, ("error", "keep"))
    constant = np.flatnonzero(np.ptp(rows, axis=0) == 0)
    if len(rows) < 2 or not len(constant) or action == "keep":
        return
    first = constant[0] if names is None else f"'{names[constant[0]]}'"
    more = f" (and {len(constant) - 1} more)" if len(constant) > 1 else ""
    raise UserError(
        f"column {first}{more} has the same value in all {len(rows)} training rows. Remove the "
        "column, or set constant_columns='keep', so that any other value in the column counts as a "
        "deviation."
    )


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Check that an option has one of the allowed values.

    Raises:
        UserError: the option has another value.
    """
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)} (got {value!r}).")


def check_range(
    name: str, value: float, *, low: float, high: float | None = None, open_low: bool = False
) -> None:
    """Check that a number lies in [low, high], or in (low, high] with `open_low`.

    If `high` is None, there is no upper limit.

    Raises:
        UserError: the number lies outside the allowed range, or is not finite.
    """
    below = value <= low if open_low else value < low
    if below or (high is not None and value > high) or not np.isfinite(value):
        least = f"more than {low:g}" if open_low else f"at least {low:g}"
        most = "" if high is None else f" and at most {high:g}"
        raise UserError(f"{name} must be {least}{most} (got {value}).")


def check_count(name: str, value: Any) -> None:
    """Check that an option is a whole number of at least 1.

    Raises:
        UserError: the option has another value.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} must be a whole number of at least 1 (got {value!r}).")
    check_range(name, int(value), low=1)


def warn_if_rate_is_unreachable(num_rows: int, rate: float) -> None:
    """Warn if there are too few clean (normal) rows for a threshold with the false-alarm `rate`."""
    if (num_rows + 1) * rate < 1:
        warnings.warn(
            f"{num_rows} clean rows are too few for a false-alarm rate of {rate:g}: the threshold "
            f"is the score of the least normal of these rows, which gives a rate of "
            f"{1 / (num_rows + 1):.3g}. "
            f"Give at least {int(np.ceil(1 / rate)) - 1} held-out rows.",
            stacklevel=3,  # the caller of `calibrate`
        )
