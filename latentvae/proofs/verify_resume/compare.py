"""Two runs, one of them killed and resumed: are they the same in all that they leave behind?"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from latentvae.engine.checkpoint_files import PREFIX, load_checkpoint
from latentvae.engine.log import read_rows
from latentvae.proofs.checks import Check

NOISE = 10.0  # times the difference of two unbroken runs
LEAST = 1e-3  # of the norm; what is allowed where two unbroken runs happen to agree
ADVICE = (
    "do not rely on resuming this configuration; if images, versions and threads did not change "
    "between the launches, it is a fault of latentvae's: report it with both runs"
)


@dataclass(frozen=True)
class Left:
    """What a finished run leaves, by the name of its check.

    Attributes:
        tensors: by name, those of a checkpoint and of the export.
        values: plain ones: counters, sums since the last row, names of bad images.
        rows: of the log, without what is measured in seconds.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]
    rows: list[dict[str, Any]]


def what_is_left(folder: Path, *, update: int, parts: Mapping[str, str]) -> Left:
    """Read the last checkpoint, the log and the export of a run.

    Args:
        parts: name -> prefix of weights that are compared by themselves.
    """
    snapshot = load_checkpoint(folder / f"{PREFIX}{update}")
    tensors: dict[str, dict[str, Tensor]] = {}
    for file, values in snapshot.tensors.items():
        beside = file.endswith(("_optimizer", "_average"))
        for name, value in values.items():
            own = [part for part, prefix in parts.items() if name.startswith(prefix)]
            group = own[0] if own and not beside else file.replace("_", "'s ")
            tensors.setdefault(group, {})[name] = value
    tensors["export"] = _exported(folder / "export")
    scalars = dict(snapshot.values)
    # Rounding moves the numbers of controllers where it moves losses.
    if control := dict(_floats(scalars["task"])):
        tensors["controllers"] = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in control.items()
        }
    scalars["task"] = _without_floats(scalars["task"])
    return Left(tensors=tensors, values=scalars, rows=_timeless(folder))


def _exported(export: Path) -> dict[str, Tensor]:
    """Weights of an export, and the scales of its config."""
    found = {
        f"{path.stem}/{name}": value
        for path in sorted(export.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    config = export / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    scales = {k: v for k, v in values.items() if k.endswith("_factor") and isinstance(v, float)}
    return found | {k: torch.tensor(v, dtype=torch.float64) for k, v in scales.items()}


def _floats(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers with a fraction, at any depth, that are not 0."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _floats(value, f"{prefix}{name}.")
        elif isinstance(value, float) and value:
            yield f"{prefix}{name}", value


def _without_floats(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_floats(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not isinstance(value, float)
    }


def _timeless(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))}
        for row in read_rows(folder / "log.jsonl")
    ]


def compare(straight: Left, resumed: Left, *, again: Left | None = None) -> list[Check]:
    """A check for each group of tensors, for the counters and for the log.

    Args:
        straight: of the run that was never killed.
        resumed: of the one that was.
        again: of a second run that was never killed, where equality to the bit is not promised:
            `NOISE` times what differs between the two unbroken ones is allowed then.
    """
    names = list(dict.fromkeys([*straight.tensors, *resumed.tensors]))
    names = [n for n in names if straight.tensors.get(n) or resumed.tensors.get(n)]
    checks = []
    for name in names:
        left, right = straight.tensors.get(name, {}), resumed.tensors.get(name, {})
        if again is None:
            checks.append(_equal(name, left, right))
        else:
            checks.append(_near(name, left, right, again.tensors.get(name, {})))
    return [*checks, _counters(straight.values, resumed.values), _log(straight, resumed, again)]


def _equal(name: str, left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Check:
    unequal = [
        key
        for key in dict.fromkeys([*left, *right])
        if key not in left or key not in right or not _same(left[key], right[key])
    ]
    value = f"{len(left)} tensors equal"
    if unequal:
        value = f"{len(unequal)} of {len(left)} tensors differ, first {unequal[0]}"
    passed = not unequal and bool(left)
    return Check(name=name, passed=passed, value=value, expected="to the bit", advice=ADVICE)


def _same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def _near(
    name: str,
    left: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    again: Mapping[str, Tensor],
) -> Check:
    allowed = max(NOISE * distance(left, again), LEAST)
    found = distance(left, right)
    expected = f"at most {allowed:.2g} of the norm: {NOISE:g} times what two unbroken runs differ"
    passed = bool(left) and found <= allowed
    return Check(name=name, passed=passed, value=found, expected=expected, advice=ADVICE)


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm of the first; infinite for other names or shapes."""
    if left.keys() != right.keys() or any(left[k].shape != right[k].shape for k in left):
        return math.inf
    pairs = [(left[key].double(), right[key].double()) for key in left]
    apart = math.sqrt(sum((a - b).square().sum().item() for a, b in pairs))
    return apart / max(math.sqrt(sum(a.square().sum().item() for a, _ in pairs)), 1e-12)


def _counters(left: Mapping[str, Any], right: Mapping[str, Any]) -> Check:
    """The data position is among them, and randomness is counted from it: no state of a generator
    is kept that could differ."""
    unequal = [key for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
    return Check(
        name="data position, randomness, counters",
        passed=not unequal,
        value=f"{', '.join(unequal)} differ"
        if unequal
        else f"micro-step {left['progress']['micro_step']}",
        expected="equal",
        advice=ADVICE,
    )


def _log(straight: Left, resumed: Left, again: Left | None) -> Check:
    if again is not None:
        allowed = max(NOISE * _apart(straight.rows, again.rows), LEAST)
        found = _apart(straight.rows, resumed.rows)
        return Check(
            name="log rows",
            passed=bool(straight.rows) and found <= allowed,
            value=found,
            expected=f"losses within {allowed:.2g} of each other",
            advice=ADVICE,
        )
    left, right = straight.rows, resumed.rows
    unequal = [_difference(a, b) for a, b in zip(left, right, strict=False) if a != b]
    if len(left) != len(right):
        unequal.append(f"{len(left)} rows, resumed {len(right)}")
    return Check(
        name="log rows",
        passed=bool(left) and not unequal,
        value=unequal[0] if unequal else f"{len(left)} rows equal",
        expected="to the last digit, time apart",
        advice=ADVICE,
    )


def _difference(left: dict[str, Any], right: dict[str, Any]) -> str:
    names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    shown = f"{names[0]} is {left.get(names[0])}, resumed {right.get(names[0])}"
    return f"update {left.get('update')}: {shown}"


def _apart(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> float:
    """The largest distance of a loss's curve."""
    if [row["update"] for row in left] != [row["update"] for row in right]:
        return math.inf
    names = {name for row in left for name in row if name.startswith("loss/")}
    curves = (
        {name: torch.tensor([row[name] for row in rows if name in row]) for name in names}
        for rows in (left, right)
    )
    a, b = curves
    return max((distance({n: a[n]}, {n: b[n]}) for n in names), default=0.0)
