"""Protect the loader's worker processes from signals that stop a run."""

import os
import signal
import threading


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
