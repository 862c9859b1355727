"""Divide the images of an update among processes and micro-steps (forward and backward passes)."""

from typing import NamedTuple, Protocol

from latentvae.errors import UserError


class BatchOptions(Protocol):
    """The options that set the number of images per update, see `RunConfig`."""

    global_batch_size: int | None
    train_batch_size: int
    gradient_accumulation_steps: int


class UpdateBatch(NamedTuple):
    """Number of images per process and micro-step, and number of micro-steps per update."""

    per_process: int
    micro_steps: int


def split_batch(options: BatchOptions, processes: int, *, multiple: int = 1) -> UpdateBatch:
    """Return the number of images per process and micro-step, and the number of micro-steps.

    A micro-step is one forward and backward pass. Without `global_batch_size`, the returned numbers
    are `train_batch_size` and `gradient_accumulation_steps`. With `global_batch_size`, each process
    takes an equal part of the images of an update. If `gradient_accumulation_steps` is set, a
    process divides its part into that many micro-steps. Otherwise the process makes as few
    micro-steps of equal size as possible. In both cases, a micro-step has at most
    `train_batch_size` images.

    Args:
        options: the three options that set the number of images per update.
        processes: number of processes.
        multiple: number that must divide the number of images per micro-step.

    Raises:
        UserError: `global_batch_size` cannot be divided evenly among the processes and micro-steps,
            or a micro-step would have more than `train_batch_size` images. The error message names
            possible values of the options.
    """
    total, most = options.global_batch_size, options.train_batch_size
    given = options.gradient_accumulation_steps
    if total is None:
        return UpdateBatch(most, given or 1)

    # images of a process
    share, rest = divmod(total, processes)
    if rest or share % multiple or not share:
        raise UserError(_not_shared(total, processes, multiple))

    # micro-steps of a process
    possible = [n for n in range(1, share + 1) if share % n == 0 and share // n % multiple == 0]
    fitting = [n for n in possible if share // n <= most]
    if given is None:
        if not fitting:
            raise UserError(
                f"train_batch_size must be at least crops_per_image {multiple} (got {most})."
            )
        return UpdateBatch(share // fitting[0], fitting[0])

    if given not in fitting:
        allowed = f"Allowed are {', '.join(map(str, fitting))}. " if fitting else ""
        raise UserError(
            f"gradient_accumulation_steps {given} does not give global_batch_size {total} with "
            f"{processes} process{'es' if processes > 1 else ''} and at most train_batch_size "
            f"{most}. {allowed}Leave gradient_accumulation_steps out to have it computed, or give "
            f"--global_batch_size {most * given * processes}."
        )
    return UpdateBatch(share // given, given)


def _not_shared(total: int, processes: int, multiple: int) -> str:
    unit = processes * multiple
    near = max(round(total / unit), 1) * unit
    crops = f" times crops_per_image {multiple}" if multiple > 1 else ""
    return (
        f"global_batch_size {total} is not a multiple of the {processes} "
        f"process{'es' if processes > 1 else ''}{crops}. The nearest multiple is {near}."
    )
