"""Check the number of a loader's worker processes, and protect the workers from signals."""

import functools
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from latentvae.distributed import launched_rank

logger = logging.getLogger(__name__)


@contextmanager
def explained_workers(num_workers: int) -> Iterator[None]:
    """Warn once, in place of torch's own warning, if there are more workers than CPU cores.

    Create a ``DataLoader`` and its iterator inside this context, because torch warns when either is
    created.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if num_workers > cores:
        _say_too_many(num_workers, cores)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


@functools.cache
def _say_too_many(num_workers: int, cores: int) -> None:
    if launched_rank()[0] == 0:
        logger.warning(
            "%d worker processes were asked for, but this process may use %d cores. More workers "
            "than cores do not read faster, and they take memory. Use at most %d.",
            *(num_workers, cores, cores),
        )


def leave_signals_to_the_trainer(_worker: int) -> None:
    """Put a worker into its own process group, so that signals to the run do not end it.

    Ctrl-C and `timeout` signal every process of a group. SLURM signals every process of a job step,
    so a worker also ignores SIGUSR1 and, on Linux, SIGTERM from any process except the trainer. The
    workers must live until the trainer has finished its update and saved a checkpoint. The trainer
    itself can still end the workers, because workers still react to a SIGTERM from the trainer. If
    the trainer dies, DataLoader's watchdog ends the workers.
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
