"""Compare the results of two runs: one uninterrupted, one killed and resumed."""

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

NOISE = 10.0  # allowed difference, as a multiple of that between two uninterrupted runs
# Difference, relative to the norm, that is always allowed, because two uninterrupted runs may be
# equal by chance.
LEAST = 1e-3
ADVICE = (
    "Do not rely on resuming runs of this configuration. If images, versions and threads did not "
    "change between the launches, the difference is a bug of latentvae: report it with both runs."
)


@dataclass(frozen=True)
class Results:
    """The results of a finished run.

    Attributes:
        tensors: tensors of the last checkpoint and of the exported model, by group (such as an
            optimizer's tensors) and by name. Each group has its own check.
        values: plain values of the last checkpoint, such as counters, sums of logged values since
            the last row of the log, and names of unreadable images. The floats of the task (such as
            a KL weight) are not here, but in `tensors`.
        rows: rows of the log, without times and memory.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]
    rows: list[dict[str, Any]]


def read_results(folder: Path, *, update: int, parts: Mapping[str, str]) -> Results:
    """Read the last checkpoint, the log and the export of a run.

    Args:
        folder: the run's folder.
        update: number of updates at the run's last checkpoint.
        parts: groups of weights that are checked separately: a dict from the group's name to the
            prefix of the names of its weights.
    """
    snapshot = load_checkpoint(folder / f"{PREFIX}{update}")
    tensors: dict[str, dict[str, Tensor]] = {}
    for file, values in snapshot.tensors.items():
        beside = file.endswith(("_optimizer", "_average"))
        for name, value in values.items():
            own = [part for part, prefix in parts.items() if name.startswith(prefix)]
            group = own[0] if own and not beside else file.replace("_", "'s ")
            tensors.setdefault(group, {})[name] = value

    # export and plain values
    tensors["export"] = _exported(folder / "export")
    scalars = dict(snapshot.values)
    # Compare floats (such as a KL weight) as tensors, because rounding changes them like losses.
    if control := dict(_floats(scalars["task"])):
        tensors["controllers"] = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in control.items()
        }
    scalars["task"] = _without_floats(scalars["task"])

    return Results(tensors=tensors, values=scalars, rows=_timeless(folder))


def _exported(export: Path) -> dict[str, Tensor]:
    """Return the weights of an exported model, and the scaling and shift factors of its config."""
    found = {
        f"{path.relative_to(export).with_suffix('').as_posix()}/{name}": value
        for path in sorted(export.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    config = export / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    scales = {k: v for k, v in values.items() if k.endswith("_factor") and isinstance(v, float)}
    return found | {k: torch.tensor(v, dtype=torch.float64) for k, v in scales.items()}


def _floats(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield name and value of each float that is not 0, also from nested dicts."""
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


def compare(straight: Results, resumed: Results, *, again: Results | None = None) -> list[Check]:
    """Return a check for each group of tensors, for the counters and for the log.

    Args:
        straight: results of the run that was never killed.
        resumed: results of the run that was killed.
        again: results of a second run that was never killed, needed if runs are not equal bit by
            bit. If `again` is given, the allowed difference of tensors and losses is 10 times
            (`NOISE`) their difference between the two uninterrupted runs, or 0.001 of their norm
            (`LEAST`) if that is larger. The counters must be equal in any case.
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
        value = f"{len(unequal)} of {len(left)} tensors differ, such as {unequal[0]}"
    passed = not unequal and bool(left)
    return Check(name=name, passed=passed, value=value, expected="equal to the bit", advice=ADVICE)


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
    expected = (
        f"at most {allowed:.2g} of the norm ({NOISE:g} times the difference between two "
        f"uninterrupted runs, but at least {LEAST:g})"
    )
    passed = bool(left) and found <= allowed
    return Check(name=name, passed=passed, value=found, expected=expected, advice=ADVICE)


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the norm of `left - right` over all tensors, divided by the norm of `left`.

    The distance is infinite if names or shapes differ.
    """
    if left.keys() != right.keys() or any(left[k].shape != right[k].shape for k in left):
        return math.inf
    pairs = [(left[key].double(), right[key].double()) for key in left]
    apart = math.sqrt(sum((a - b).square().sum().item() for a, b in pairs))
    return apart / max(math.sqrt(sum(a.square().sum().item() for a, _ in pairs)), 1e-12)


def _counters(left: Mapping[str, Any], right: Mapping[str, Any]) -> Check:
    """Check that the plain values of the two runs, such as counters, are equal.

    Equal counters mean equal data and equal random numbers, because both follow from the counters.
    """
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


def _log(straight: Results, resumed: Results, again: Results | None) -> Check:
    # close enough
    if again is not None:
        allowed = max(NOISE * _apart(straight.rows, again.rows), LEAST)
        found = _apart(straight.rows, resumed.rows)
        return Check(
            name="log rows",
            passed=bool(straight.rows) and found <= allowed,
            value=found,
            expected=f"losses of the two runs with a relative difference below {allowed:.2g}",
            advice=ADVICE,
        )

    # equal
    left, right = straight.rows, resumed.rows
    unequal = [_difference(a, b) for a, b in zip(left, right, strict=False) if a != b]
    if len(left) != len(right):
        unequal.append(f"{len(left)} rows, resumed {len(right)}")
    return Check(
        name="log rows",
        passed=bool(left) and not unequal,
        value=unequal[0] if unequal else f"{len(left)} rows equal",
        expected="values equal to the last digit, except times and memory",
        advice=ADVICE,
    )


def _difference(left: dict[str, Any], right: dict[str, Any]) -> str:
    names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    shown = f"{names[0]} is {left.get(names[0])}, resumed {right.get(names[0])}"
    return f"update {left.get('update')}: {shown}"


def _apart(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> float:
    """Return the largest `distance`, over all losses, between the values of a loss in two logs.

    The result is infinite if the two logs do not have rows of the same updates.
    """
    if [row["update"] for row in left] != [row["update"] for row in right]:
        return math.inf
    names = {name for row in left for name in row if name.startswith("loss/")}
    curves = (
        {name: torch.tensor([row[name] for row in rows if name in row]) for name in names}
        for rows in (left, right)
    )
    a, b = curves
    return max((distance({n: a[n]}, {n: b[n]}) for n in names), default=0.0)
