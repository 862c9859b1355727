"""What happens to the loader's worker processes when a run is told to stop."""

import multiprocessing
import os
import signal
import threading


def leave_signals_to_the_trainer(_worker: int) -> None:
    """Let workers live on when a process group is told to stop: the trainer finishes and saves.

    Ctrl-C, SLURM and `timeout` signal every process. SIGTERM from the trainer itself still ends
    a worker: so DataLoader shuts down. If the trainer dies, DataLoader's watchdog ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_the_trainer_says_so, daemon=True).start()


def _exit_when_the_trainer_says_so() -> None:
    parent = multiprocessing.parent_process()
    trainer = parent.pid if parent is not None else os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)  # as DataLoader's own handler of SIGTERM does
