"""Any training run: checkpoints, resume, lock, log, signals, weight average."""
