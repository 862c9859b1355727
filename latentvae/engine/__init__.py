"""Parts of any training run: loop, checkpoints, resume, lock, log, signals, weight average."""
