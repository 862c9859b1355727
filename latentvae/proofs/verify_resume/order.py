"""Check the order of the training data after each resume. No saved tensor shows this order."""

from collections.abc import Sequence

from latentvae.engine.task import Task
from latentvae.proofs.checks import Check


def check_order(task: Task, *, processes: int, starts: Sequence[int]) -> Check | None:
    """Check that every launch gets the same data as an uninterrupted run at the same micro-steps.

    A micro-step is the forward and backward pass of one batch. Launches do not record their data,
    so this function computes the data of each launch again, by `Task.order`.

    Args:
        task: the task of the run.
        processes: number of processes of each launch.
        starts: for each launch, the number of micro-steps done at its start.

    Returns:
        The check, or None if the task does not know the order of its data.
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
        expected=f"the same {unit} in each of {total} micro-steps, in every launch",
        advice=f"Report the difference as a bug of latentvae, with the number of {unit} and the "
        "options.",
    )
