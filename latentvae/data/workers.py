"""What happens to the loader's worker processes when a run is told to stop."""

import os
import signal


def leave_signals_to_the_trainer(_worker: int) -> None:
    """Put a worker into a process group of its own, out of reach of what is meant for the run.

    Ctrl-C and `timeout` signal every process of a group, SLURM every process of a job step; workers
    must live on until the trainer has finished its update and saved. The trainer still ends them
    itself, and DataLoader's watchdog does if the trainer dies.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # SIGTERM is how the trainer ends a worker
