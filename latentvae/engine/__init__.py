"""Run any training: loop, checkpoints, resume, folder lock, log, signals and weight average."""
