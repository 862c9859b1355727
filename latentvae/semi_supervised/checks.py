"""Check the rows, labels and options of a classifier. Each error is one sentence."""

from typing import Any

import numpy as np

from latentvae.errors import UserError

UNLABELLED = -1


def checked_rows(rows: Any, *, likelihood: str, columns: int | None = None) -> np.ndarray:
    """Return rows as float32, (N, F).

    Args:
        rows: array or table of numbers, (N, F).
        likelihood: "bernoulli" needs values in [0, 1], and "gaussian" takes any finite values.
        columns: expected number of columns F, as in `fit`. None allows any number of columns.

    Raises:
        UserError: the rows are not numbers, have the wrong shape, or a value is out of range.
    """
    try:
        values = np.asarray(rows)
    except ValueError as error:
        raise UserError("X has rows of different lengths; give a table of numbers.") from error
    if values.dtype.kind not in "biuf":
        raise UserError(
            f"X must hold numbers (got values of type {values.dtype}); turn text into "
            "numbers first."
        )
    if values.ndim != 2 or not values.size:
        raise UserError(
            f"X must be a table of rows and columns (got shape {values.shape}); images need "
            "X.reshape(len(X), -1)."
        )
    if columns is not None and values.shape[1] != columns:
        raise UserError(f"X must have {columns} columns as in fit (got {values.shape[1]}).")

    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError("X holds NaN or infinite values; fill or remove these rows.")
    least, most = values.min(), values.max()
    if likelihood == "bernoulli" and (least < 0 or most > 1):
        raise UserError(
            f"X must lie in [0, 1] with likelihood='bernoulli' (got {least:g} to {most:g}); divide "
            "8-bit pixels by 255, or use likelihood='gaussian'."
        )
    return values


def checked_labels(
    labels: Any, *, count: int, classes: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted classes (K,), and for each row the index of its class, (N,).

    The index is -1 for a row without a label.

    Args:
        labels: whole numbers, -1 for a row without a label, (N,).
        count: number of rows N.
        classes: all classes, each of which must have a labelled row. With None, the classes are
            those in `labels`.

    Raises:
        UserError: there are not N labels, a label is not a whole number, there are fewer than two
            classes, a class of `classes` has no labelled row, or a label is not in `classes`.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or len(values) != count:
        raise UserError(f"y must hold one label for each of {count} rows (got {values.shape}).")
    whole = values.dtype.kind in "biu" or (
        values.dtype.kind == "f"
        and bool(np.all(np.isfinite(values) & (values == np.floor(values))))
    )
    if not whole:
        raise UserError(
            f"y must hold whole numbers, and {UNLABELLED} for rows without a label (got values of "
            f"type {values.dtype}); number the classes first."
        )

    values = values.astype(np.int64)
    found = np.unique(values[values != UNLABELLED])
    if classes is not None:
        found = _checked_classes(found, np.unique(np.asarray(classes)))
    if len(found) < 2:
        raise UserError(
            f"y must hold labels of at least 2 classes (got {len(found)}: {found.tolist()})."
        )
    places = np.searchsorted(found, values)
    return found, np.where(values == UNLABELLED, UNLABELLED, places)


def _checked_classes(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    if len(missing := np.setdiff1d(expected, found)):
        raise UserError(
            f"class {missing[0]} has no labelled row; label at least one row of each class, or "
            "remove it from classes."
        )
    if len(more := np.setdiff1d(found, expected)):
        raise UserError(f"y holds class {more[0]}, which is not one of classes.")
    return expected


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Check that an option has one of the allowed values.

    Raises:
        UserError: the option's value is not one of the allowed values.
    """
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)} (got {value!r}).")


def check_above(name: str, value: float, *, low: float) -> None:
    """Check that a number is finite and above `low`.

    Raises:
        UserError: the number is not finite, or not above `low`.
    """
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not (number and low < value < np.inf):
        raise UserError(f"{name} must be a number above {low:g} (got {value!r}).")


def check_counts(**values: Any) -> None:
    """Check that options are whole numbers of at least 1.

    Raises:
        UserError: an option is not a whole number of at least 1.
    """
    for name, value in values.items():
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < 1:
            raise UserError(f"{name} must be a whole number of at least 1 (got {value!r}).")


def seed_of(random_state: Any) -> int:
    """Return a seed from an int (at least 0), a NumPy RandomState, or None (a random seed)."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if not isinstance(random_state, (int, np.integer)) or random_state < 0:
        raise UserError(f"random_state must be at least 0 or None (got {random_state!r}).")
    return int(random_state)
