"""The order of the items, read from where each launch went on: the one part of a resume that leaves
no tensor."""

from collections.abc import Sequence

from latentvae.engine.task import Task
from latentvae.proofs.checks import Check


def check_order(task: Task, *, processes: int, starts: Sequence[int]) -> Check | None:
    """Whether every launch got the items that an unbroken run gets at the same place; None where
    the task does not tell.

    Args:
        starts: micro-steps done when each launch began.
    """
    options, unit = task.config.run, task.unit
    total = options.max_train_steps * options.gradient_accumulation_steps
    wrong = []
    for rank in range(processes):
        straight = task.order(rank=rank, processes=processes, start=0, stop=total)
        if straight is None:
            return None
        for start in starts:
            resumed = task.order(rank=rank, processes=processes, start=start, stop=total)
            if resumed != straight[start:]:
                wrong.append(f"{start} on rank {rank}")
    shown = ", ".join(map(str, starts))
    return Check(
        name="data order",
        passed=not wrong and bool(starts),
        value=f"differs from micro-step {wrong[0]}" if wrong else f"equal from micro-steps {shown}",
        expected=f"the same {unit} in each of {total} micro-steps, whichever launch makes it",
        advice=f"report it as a fault of latentvae's, with the number of {unit} and the options",
    )
