"""Tasks define what a run trains. Each task has its own folder.

A task is a subclass of `engine.task.Task`. A script in `train/` or `engine.loop.train` starts a
task.
"""
