"""How the images of an update are shared among processes and micro-steps."""

from typing import NamedTuple, Protocol

from latentvae.errors import UserError


class BatchOptions(Protocol):
    """The options that decide the batch, see `RunConfig`."""

    global_batch_size: int | None
    train_batch_size: int
    gradient_accumulation_steps: int


class UpdateBatch(NamedTuple):
    """Images per process and micro-step, and micro-steps per update."""

    per_process: int
    micro_steps: int


def split_batch(options: BatchOptions, processes: int, *, multiple: int = 1) -> UpdateBatch:
    """Return the batch of a process and its micro-steps.

    Without `global_batch_size`, both are the values of the options. With `global_batch_size`, each
    process takes an equal share of it. A process divides its share into as few equal micro-steps as
    `train_batch_size` allows, or into `gradient_accumulation_steps` if that option is set.

    Args:
        options: the three options of the batch.
        processes: number of processes.
        multiple: the batch of a micro-step must be a multiple of this number.

    Raises:
        UserError: the global batch cannot be divided like this. The message names the nearest
            possible batch.
    """
    total, most = options.global_batch_size, options.train_batch_size
    given = options.gradient_accumulation_steps
    if total is None:
        return UpdateBatch(most, given or 1)

    # the share of a process
    share, rest = divmod(total, processes)
    if rest or share % multiple or not share:
        raise UserError(_not_shared(total, processes, multiple))

    # its micro-steps
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
            f"{most}. {allowed}Leave it out and it follows, or give --global_batch_size "
            f"{most * given * processes}."
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
