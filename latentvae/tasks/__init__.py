"""Tasks: what a run trains, one folder each.

A task is a `Task` of `engine.task`. A script in `train/` starts it, or `engine.loop.train`.
"""
