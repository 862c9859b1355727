"""The tracker beside log.jsonl (TensorBoard or Weights & Biases, through Accelerate).

A tracker that cannot start is told before the first update. What it raises later is told once and
stops nothing: log.jsonl has every number.
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
from latentvae.errors import UserError

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
_OFFLINE = {
    "wandb": "`wandb login`, or WANDB_MODE=offline to keep it on this machine for `wandb sync`, "
}


def check_tracker(name: str) -> None:
    """Refuse a tracker that is asked for and not installed; Accelerate would go on without it."""
    packages = _PACKAGES.get(name, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise UserError(
            f"report_to is '{name}', but it is not installed; run `pip install "
            f"{packages[0]}` or use --report_to none"
        )


def start_tracker(
    accelerator: Accelerator, name: str, *, folder: Path, project: str, options: Mapping[str, Any]
) -> None:
    """Start it on rank 0, with its files in ``folder/logs``.

    Args:
        options: of the run; what is no number or text is given as text.

    Raises:
        UserError: on every rank, if it cannot start, such as wandb without a login.
    """
    if name == "none":
        return
    simple = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in options.items()}
    logs, said = folder / "logs", None
    own = {"wandb": {"dir": str(logs), "name": folder.resolve().name}}
    try:
        if accelerator.is_main_process:
            logs.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(project, config=simple, init_kwargs=own)
    except Exception as error:  # of whichever kind the tracker has
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if said := from_main(said):
        accelerator.trackers.clear()  # half of one could not be closed
        raise UserError(
            f"report_to {name} cannot start ({said}); {_OFFLINE.get(name, '')}or use "
            "--report_to none"
        )


class Tracker:
    """What tells the tracker; silent where there is none, as on all ranks but the first.

    Args:
        say: prints the one warning.
    """

    def __init__(self, accelerator: Accelerator, *, say: Callable[[str], None]) -> None:
        self.accelerator = accelerator
        self.say = say
        self.warned = False

    def log(self, values: Mapping[str, float], *, update: int) -> None:
        with self._going_on():
            self.accelerator.log(dict(values), step=update)

    def picture(self, path: Path, *, update: int) -> None:
        """Show an image file."""
        with self._going_on():
            for tracker in self.accelerator.trackers:
                pixels = np.asarray(Image.open(path).convert("RGB"))[
                    None
                ]  # (1, H, W, 3), of grey too
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                shown: Any = tracker  # Accelerate's base class has no pictures
                shown.log_images({"validation/samples": pixels}, step=update, **layout)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, a network that is gone, a bug in the tracker
            if not self.warned:
                self.say(
                    f"the tracker failed ({type(error).__name__}: {error}); the run goes on, and "
                    "log.jsonl has every number"
                )
            self.warned = True


def close_tracker(accelerator: Accelerator) -> None:
    """Let the tracker finish its files or its upload, whatever it raises."""
    while accelerator.trackers:
        tracker = accelerator.trackers.pop()
        try:
            tracker.finish()
        except Exception as error:
            print(f"the tracker could not be closed ({type(error).__name__}: {error})")
