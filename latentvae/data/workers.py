"""What happens to the loader's worker processes when a run is told to stop."""

import os
import signal
import threading


def leave_signals_to_the_trainer(_worker: int) -> None:
    """Put a worker into a process group of its own, out of reach of what is meant for the run.

    Ctrl-C and `timeout` signal every process of a group, SLURM every process of a job step; workers
    must live on until the trainer has finished its update and saved. The trainer still ends them
    itself, by a SIGTERM that counts because it is the trainer's, and DataLoader's watchdog does if
    the trainer dies.
    """
    if not hasattr(os, "setpgrp"):  # Windows
        return
    os.setpgrp()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: there a SIGTERM from anyone ends a worker
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also in threads that come later
    threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
