"""Log to a tracker (TensorBoard or Weights & Biases, through Accelerate) besides log.jsonl.

A tracker that cannot start ends the run before the first update. A later error of the tracker is
printed once and does not stop the run, because log.jsonl has every number.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from latentvae.distributed import from_main
from latentvae.errors import UserError, first_line

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
_OFFLINE = {
    "wandb": "`wandb login`, or set WANDB_MODE=offline to keep the logs on this machine for "
    "`wandb sync`, "
}


def check_tracker(name: str) -> None:
    """Raise UserError if a tracker is not installed.

    Without this check, Accelerate would silently run without the tracker.
    """
    packages = _PACKAGES.get(name, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise UserError(
            f"report_to is '{name}', but {name} is not installed. Run `pip install "
            f"{packages[0]}`, or use --report_to none."
        )


def start_tracker(
    accelerator: Accelerator, name: str, *, folder: Path, project: str, options: Mapping[str, Any]
) -> None:
    """Start the tracker on rank 0, with its files in `folder/logs`.

    Args:
        accelerator: holds the tracker.
        name: name of the tracker, or `none`.
        folder: the run's folder.
        project: name of the project in the tracker.
        options: the run's options. Values other than numbers and text are passed as text.

    Raises:
        UserError: the tracker cannot start, such as wandb without a login. Every rank raises the
            error.
    """
    if name == "none":
        return

    # start the tracker
    simple = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in options.items()}
    logs, said = folder / "logs", None
    own = {"wandb": {"dir": str(logs), "name": folder.resolve().name}}
    try:
        if accelerator.is_main_process:
            logs.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(project, config=simple, init_kwargs=own)
    except Exception as error:  # each tracker raises its own errors
        said = first_line(error)

    # report a failure to every rank
    if said := from_main(said):
        accelerator.trackers.clear()  # a half-started tracker cannot be closed
        raise UserError(
            f"report_to {name} cannot start ({said}). Run {_OFFLINE[name]}or use --report_to none."
            if name in _OFFLINE
            else f"report_to {name} cannot start ({said}). Use --report_to none."
        )


class Tracker:
    """A logger that sends values and pictures to the tracker.

    On ranks other than 0, and in runs without a tracker, the methods do nothing.

    Args:
        accelerator: holds the tracker.
        say: prints a warning when the tracker fails for the first time.
    """

    def __init__(self, accelerator: Accelerator, *, say: Callable[[str], None]) -> None:
        self.accelerator = accelerator
        self.say = say
        self.warned = False

    def log(self, values: Mapping[str, float], *, update: int) -> None:
        with self._never_failing():
            self.accelerator.log(dict(values), step=update)

    def picture(self, path: Path, *, update: int) -> None:
        """Show an image file in the tracker."""
        with self._never_failing():
            for tracker in self.accelerator.trackers:
                image = Image.open(path).convert("RGB")  # trackers take no grey images
                pixels = np.asarray(image)[None]  # (1, H, W, 3)
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                shown: Any = tracker  # Accelerate's base class declares no `log_images`
                shown.log_images({"validation/samples": pixels}, step=update, **layout)

    @contextlib.contextmanager
    def _never_failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, a lost network, a bug in the tracker
            if not self.warned:
                self.say(
                    f"the tracker failed ({type(error).__name__}: {error}). The run continues, "
                    "and log.jsonl has every number."
                )
            self.warned = True


def close_tracker(accelerator: Accelerator) -> None:
    """Wait until the tracker has finished its files or its upload. Print errors of the tracker."""
    while accelerator.trackers:
        tracker = accelerator.trackers.pop()
        try:
            tracker.finish()
        except Exception as error:
            print(f"the tracker could not be closed ({type(error).__name__}: {error})")
