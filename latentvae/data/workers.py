"""The loader's worker processes: how many make sense, and how they survive signals."""

import functools
import logging
import os
import signal
import threading
import warnings

from latentvae.distributed import is_main

logger = logging.getLogger(__name__)


def explain_num_workers(num_workers: int) -> None:
    """Say once if there are more workers than processors, in place of torch's warning.

    torch repeats its warning for every loader and names no option.
    """
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
    _explain_once(num_workers)


@functools.cache
def _explain_once(num_workers: int) -> None:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if count is not None and num_workers > count and is_main():
        logger.warning(
            "%d processes read images, but this process may use %d processors only. More than that "
            "are rarely faster: give at most %d workers.",
            *(num_workers, count, count),
        )


def leave_signals_to_the_trainer(_worker: int) -> None:
    """Put a worker into its own process group, so that signals to the run do not reach it.

    Ctrl-C and `timeout` signal every process of a group, and SLURM every process of a job step. The
    workers must live until the trainer has finished its update and saved. The trainer still ends
    them itself by a SIGTERM, because a SIGTERM from the trainer counts. If the trainer dies,
    DataLoader's watchdog ends them.
    """
    if not hasattr(os, "setpgrp"):  # Windows
        return
    os.setpgrp()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: a SIGTERM from any process ends a worker
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also in later threads
    threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
