"""What a run trains, one folder each: a `Task` of `engine.task`, started by a script in `train/` or
from Python by `engine.loop.train`."""
