"""Read tables from files, and turn all columns into columns of numbers.

    table = read_table("machine.csv")
    encoder = TableEncoder().fit(table)
    rows = encoder.transform(table)  # float64, (N, F)

A column of numbers stays one column. A column of text, of categories or of true and false becomes
one column of zeros and ones for each value (one-hot). A value that was not in the table of `fit`
becomes zeros in all one-hot columns of its column. The encoder is stored as JSON.

Symbols: `N` rows, `F` columns of numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.preprocessing import OneHotEncoder
from sklearn.utils.validation import check_is_fitted

from latentvae.errors import UserError, first_line, nearest

SUFFIXES = (".csv", ".parquet", ".npz", ".npy")
MAX_CATEGORIES = 100


def read_table(path: str | Path) -> pd.DataFrame:
    """Return the table in a file.

    Columns of .npy and .npz files are named x0, x1 and so on. In an .npz file, the rows are the
    array `X` with two axes. Without such an array, the rows are the only array with two axes. Each
    array with one axis and one value per row becomes one more column, with the array's name, such
    as `y`.

    Args:
        path: a .csv, .parquet, .npz or .npy file.

    Raises:
        UserError: there is no such file, it holds no table or no rows, or two columns have the same
            name. In a .csv file, equal names are no error: pandas renames the second column `a` to
            `a.1`.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"'{path}' is no table: give a file of type {', '.join(SUFFIXES)}.")
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"there is no file '{path}'{nearest(path.name, siblings)}")

    try:
        table = _READERS[path.suffix.lower()](path)
    except UserError:
        raise
    # pandas, pyarrow and NumPy raise exceptions of many types for damaged files.
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"'{path}' cannot be read as a table: {reason}") from error

    if table.empty:
        raise UserError(f"'{path}' holds no rows.")
    table = table.rename(columns=str)
    names = [str(name) for name in table.columns]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"'{path}' has two columns named '{twice[0]}'. Rename one of them.")
    return table


def _read_npz(path: Path) -> pd.DataFrame:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    name = "X" if "X" in matrices else matrices[0] if len(matrices) == 1 else None
    if name is None:
        found = ", ".join(arrays) or "none"
        raise UserError(f"'{path}' needs an array named X with two axes (found: {found}).")
    table = _numbered(arrays[name])
    for other, array in arrays.items():
        if array.ndim == 1 and len(array) == len(table):
            if other in table:
                raise UserError(
                    f"'{path}' has two columns named '{other}': an array, and a column of '{name}'."
                )
            table[other] = array
    return table


def _read_npy(path: Path) -> pd.DataFrame:
    array = np.load(path, allow_pickle=False)
    if array.ndim != 2:
        raise UserError(f"'{path}' needs an array with two axes, not {array.ndim}.")
    return _numbered(array)


def _numbered(array: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(array, columns=[f"x{i}" for i in range(array.shape[1])])


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": pd.read_csv,
    ".parquet": pd.read_parquet,
    ".npz": _read_npz,
    ".npy": _read_npy,
}


def without(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Return a table without the given columns.

    Raises:
        UserError: one of the given columns is not in the table.
    """
    columns = list(columns)
    for name in columns:
        if name not in table.columns:
            known = list(table.columns)
            near = nearest(name, known) or f", only {_listed(known)}"
            raise UserError(f"the table has no column '{name}'{near}")
    return table.drop(columns=columns)


def labels_of(table: pd.DataFrame, column: str) -> np.ndarray:
    """Return a column of labels as 0 (normal) and 1 (anomaly), (N,).

    Raises:
        UserError: there is no such column, or a label is neither 0 nor 1.
    """
    without(table, [column])
    found: Any = table[column]
    numbers: Any = pd.to_numeric(found, errors="coerce")
    values = numbers.to_numpy(dtype=float, na_value=np.nan)
    if not np.isin(values, (0.0, 1.0)).all():
        wrong = found.to_numpy()[~np.isin(values, (0.0, 1.0))][0]
        raise UserError(
            f"the labels in column '{column}' must be 0 (normal) or 1 (anomaly), not {wrong!r}."
        )
    return values.astype(int)


class TableEncoder(TransformerMixin, BaseEstimator):
    """Turn a table into rows of numbers. A column without numbers becomes one-hot columns.

    Args:
        max_categories: largest number of different values of a column of text. A column with more
            different values is an error, because such a column probably holds names or dates.

    Attributes:
        numbers_: names of the columns of numbers.
        categories_: different values of each column that does not hold numbers.
        names_: names of the columns that `transform` returns. A one-hot column is named
            `column=value`.
    """

    def __init__(self, *, max_categories: int = MAX_CATEGORIES) -> None:
        self.max_categories = max_categories

    def fit(self, X: Any, y: Any = None) -> Self:
        """Store the names of a table's columns, and the values of the columns without numbers.

        Args:
            X: pandas table, or an array of numbers (N, F).
            y: ignored.

        Raises:
            UserError: a column has too many different values, or missing or infinite values.
        """
        table = _as_table(X)
        _check_complete(table)
        kinds = {name: pd.api.types.is_numeric_dtype(table[name]) for name in table.columns}
        flags = {name for name in table.columns if pd.api.types.is_bool_dtype(table[name])}
        self.numbers_ = [name for name, number in kinds.items() if number and name not in flags]
        categories = {}
        for name in table.columns:
            if name not in self.numbers_:
                categories[name] = self._values(table[name])
        return self._prepare(categories)

    def _values(self, column: Any) -> list[str]:
        values = sorted(column.astype(str).unique())
        if len(values) > self.max_categories:
            raise UserError(
                f"column '{column.name}' holds {len(values)} different texts, such as "
                f"'{values[0]}', more than {self.max_categories}. Leave the column out if it "
                "holds names or dates."
            )
        return values

    def _prepare(self, categories: dict[str, list[str]]) -> Self:
        self.categories_ = categories
        self.names_ = [*self.numbers_]
        self.names_ += [f"{name}={v}" for name, values in categories.items() for v in values]
        if categories:
            known: Any = [np.array(values, dtype=object) for values in categories.values()]
            self.encoder_ = OneHotEncoder(
                categories=known,
                handle_unknown="ignore",
                sparse_output=False,
            )
            self.encoder_.fit(np.array([[v[0] for v in categories.values()]], dtype=object))
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Return rows of numbers, float64 (N, F).

        Raises:
            UserError: a column is missing, or a value is missing, infinite or of the wrong type.
        """
        check_is_fitted(self, "names_")
        table = _as_table(X)
        wanted = [*self.numbers_, *self.categories_]
        if missing := [name for name in wanted if name not in table.columns]:
            near = nearest(missing[0], table.columns)
            raise UserError(
                f"the table has no column '{missing[0]}', which the training table had{near}"
            )
        _check_complete(table.loc[:, wanted])

        parts = [self._numbers(table)]
        if self.categories_:
            text = table[list(self.categories_)].astype(str).to_numpy(dtype=object)
            parts.append(np.asarray(self.encoder_.transform(text), dtype=np.float64))
        return np.concatenate(parts, axis=1)

    def _numbers(self, table: pd.DataFrame) -> np.ndarray:
        for name in self.numbers_:
            column: Any = table[name]
            if not pd.api.types.is_numeric_dtype(column):
                numbers: Any = pd.to_numeric(column, errors="coerce")
                wrong = column[numbers.isna()] if numbers.isna().any() else column
                value = wrong.iloc[0]
                raise UserError(f"column '{name}' must hold numbers, but holds {value!r}.")
        return table[self.numbers_].to_numpy(dtype=np.float64)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the columns that `transform` returns."""
        return np.array(self.names_, dtype=object)

    def to_json(self) -> dict[str, Any]:
        """Return the encoder as JSON values, for `from_json`."""
        return {"numbers": self.numbers_, "categories": self.categories_}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TableEncoder":
        """Build an encoder from the result of `to_json`."""
        encoder = cls()
        encoder.numbers_ = list(content["numbers"])
        return encoder._prepare(dict(content["categories"]))


def _as_table(rows: Any) -> pd.DataFrame:
    if isinstance(rows, pd.DataFrame):
        return rows.rename(columns=str)
    array = np.asarray(rows)
    if array.ndim != 2:
        raise UserError(f"a table needs two axes (got {array.ndim}).")
    return _numbered(array).infer_objects()


def _check_complete(table: pd.DataFrame) -> None:
    """Check that no value is missing or infinite.

    Raises:
        UserError: a value is missing or infinite. The message names the column and its first
            row with such a value.
    """
    for name in table.columns:
        column: Any = table[name]
        bad = column.isna().to_numpy()
        if pd.api.types.is_float_dtype(column):
            bad = bad | ~np.isfinite(column.to_numpy(dtype=np.float64, na_value=np.nan))
        if bad.any():
            first = int(bad.argmax())
            value = "NaN" if pd.isna(column.iloc[first]) else column.iloc[first]
            raise UserError(
                f"column '{name}' has {bad.sum()} missing or infinite value(s), first in data row "
                f"{first + 1} ({value}). Fill in the values, or remove the rows or the column."
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(list(names)[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
