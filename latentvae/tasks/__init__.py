"""Define the tasks: a task says what a training run trains. Each task has its own folder.

A task is a subclass of `engine.task.Task`. Start a task by the function `engine.loop.train`, or by
a script in `train/`.
"""
