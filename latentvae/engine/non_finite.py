"""Say why an update was skipped: which loss terms were not finite, and for which items."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from latentvae.distributed import gather_objects, world_size
from latentvae.engine.task import Task

SHOWN = 4  # largest number of names shown for each process


def describe(values: Sequence[dict[str, Tensor]], keys: Sequence[Any], task: Task) -> str:
    """Return text, the same on every rank, that names the non-finite loss terms and their items.

    The items are the training samples of the micro-steps with such a term. If all terms are finite,
    the text says so.

    All ranks call this function, but only for a skipped update, because the function waits for the
    device.

    Args:
        values: the logged scalars of each micro-step of this rank.
        keys: the result of `Task.keys` for each micro-step.
        task: the task, whose `names` returns the names of the items.
    """
    # this rank
    found = []
    for step, logged in enumerate(values):
        terms = [name for name, value in logged.items() if not math.isfinite(value)]
        if terms:
            found.append((terms, _shown(task.names(keys[step]))))

    # all ranks
    clauses = []
    for process, steps in enumerate(gather_objects(found)):
        for terms, names in steps:
            where = f"process {process}: " if world_size() > 1 else ""
            on = f" on {names}" if names else ""
            clauses.append(f"{where}{', '.join(terms)} not finite{on}")
    return ", then ".join(clauses) or (
        "every loss term is finite, but the gradient of the total loss is not"
    )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
