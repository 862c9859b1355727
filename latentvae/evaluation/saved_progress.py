"""Save an evaluation's state on disk, so that a stopped evaluation can continue.

    OUT/.progress/state.json    the task, the number of measured images, other values
    OUT/.progress/<n>.npz       sums over images

`state.json` is replaced in one step, and names the file of sums that belongs to it. So a process
that is killed at any time leaves a complete state.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentvae.errors import UserError
from latentvae.files import read_json

Arrays = dict[str, np.ndarray]


class Accumulator(Protocol):
    """An object with sums over images, which can be saved, loaded and continued."""

    def state_dict(self) -> Arrays: ...

    def load_state_dict(self, state: Mapping[str, np.ndarray], /) -> None: ...


class Progress:
    """Saves the state of an evaluation in the folder `out`, and loads it again.

    Args:
        out: the report's folder, which is made if it does not exist.
        task: JSON values of everything that the results depend on. If the folder holds the state of
            another task, a UserError names the keys that differ.
        overwrite: delete the saved state and report.json.

    Attributes:
        done: number of images that were measured, or left out because they are unreadable.
        values: JSON values that the last call of `save` stored.
        finished: whether the report is complete.
    """

    def __init__(self, out: Path, task: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder = out / ".progress"
        self.task: dict[str, Any] = json.loads(json.dumps(task))
        self.done, self.finished = 0, False
        self.values: dict[str, Any] = {}
        self._arrays: Arrays = {}
        self._saves = 0  # number of the last file of sums. Each save writes a new file.
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder '{out}': {error.strerror}.") from error

        # start, continue, or raise an error
        if overwrite:
            (out / "report.json").unlink(missing_ok=True)
            self._write({"done": 0})
        elif (self.folder / "state.json").exists():
            self._read(out)
        elif (out / "report.json").exists():
            raise UserError(f"'{out}' already holds a report. Give another folder, or --overwrite.")
        else:
            self._write({"done": 0})

    def save(self, done: int, values: Mapping[str, Any], parts: Mapping[str, Accumulator]) -> None:
        """Write the sums of `parts` and the state to disk."""
        # sums first
        arrays = {
            f"{name}/{key}": array
            for name, part in parts.items()
            for key, array in part.state_dict().items()
        }
        self._saves += 1
        path = self.folder / f"{self._saves}.npz"
        with path.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())

        # then the state, which names the file of sums
        self.done, self.values = done, dict(values)
        self._write({"done": done, "values": self.values, "arrays": path.name})
        for old in self.folder.glob("*.npz"):
            if old != path:
                old.unlink()

    def restore(self, parts: Mapping[str, Accumulator]) -> None:
        """Load the saved sums into the objects in `parts`."""
        for name, part in parts.items():
            prefix = f"{name}/"
            state = {
                key.removeprefix(prefix): array
                for key, array in self._arrays.items()
                if key.startswith(prefix)
            }
            try:
                part.load_state_dict(state)
            except Exception as error:  # objects raise different errors for wrong arrays
                raise self.damaged(error) from error
        self._arrays = {}

    def finish(self) -> None:
        self._write({"finished": True})
        for old in self.folder.glob("*.npz"):
            old.unlink()

    def _write(self, state: Mapping[str, Any]) -> None:
        temporary = self.folder / "state.json.part"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"task": self.task, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / "state.json")

    def _read(self, out: Path) -> None:
        try:
            state = read_json(self.folder / "state.json")
        except UserError as error:
            raise self.damaged(error) from error

        # the same task?
        try:
            if keys := _differing(state["task"], self.task):
                raise UserError(
                    f"'{out}' holds an evaluation with another {', '.join(keys)}. "
                    "Give another folder, or --overwrite."
                )
            if state.get("finished"):
                self.finished = (out / "report.json").exists()
                return
            if "arrays" not in state:
                return

            # sums, values and rows
            self._saves = int(Path(state["arrays"]).stem)
            path = self.folder / f"{self._saves}.npz"
            if not path.is_file():
                raise ValueError(f"{path.name} is not a file")
            with np.load(path, allow_pickle=False) as arrays:
                self._arrays = dict(arrays)
            self.done, self.values = int(state["done"]), dict(state["values"])
            _check_rows(out / "per_image.csv", self.values.get("csv_bytes", 0))
        except UserError:
            raise
        except Exception as error:  # zip, zlib and NumPy raise different errors
            raise self.damaged(error) from error

    def damaged(self, error: Exception) -> UserError:
        """Return the error to raise for a saved state that is not valid."""
        reason = str(error) or type(error).__name__
        return UserError(
            f"the saved state in '{self.folder}' is damaged ({reason}). Start again with "
            "--overwrite."
        )


def _check_rows(table: Path, size: int) -> None:
    """Check that per_image.csv (`table`) still has all rows that belong to the saved state.

    The table is later cut to `size` bytes. If the table were shorter, zeros would fill the gap.
    """
    if size < 0 or (size and table.stat().st_size < size):
        raise ValueError(f"{table.name} is shorter than when the state was saved")


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the names of the entries that differ between `old` and `new`.

    The names of nested entries are joined by dots.
    """
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{inner}" for inner in _differing(a, b)]
        elif a != b:
            found.append(key)
    return found
