"""Connect and disconnect the processes of a run, and wrap modules in autocast and DDP."""

import gc
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import nn

from latentvae.config.run_config import RunConfig
from latentvae.errors import UserError

DTYPES = {"no": None, "bf16": torch.bfloat16}  # autocast's dtype by mixed_precision


def start_accelerator(options: RunConfig, folder: Path) -> Accelerator:
    """Join the other ranks and return an `Accelerator`.

    The options set the precision. If no option sets it, the launcher's precision is used.

    Raises:
        UserError: the launcher asks for a precision that is not supported.
    """
    # Without this reset, the precision of an earlier run in this process would remain.
    AcceleratorState._reset_state()

    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "logs")),
        kwargs_handlers=[
            DistributedDataParallelKwargs(static_graph=False, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=options.ddp_timeout)),
        ],
    )
    if accelerator.mixed_precision not in DTYPES:
        raise UserError(
            f"the launcher asks for mixed precision {accelerator.mixed_precision}, which fails "
            "with two optimizers on one gradient scaler. Allowed are bf16 and no."
        )
    return accelerator


def end_accelerator(accelerator: Accelerator) -> None:
    """Destroy the process group and everything that uses it.

    If a process group is still alive when the interpreter exits, the exit sometimes fails with
    SIGABRT (https://github.com/pytorch/pytorch/issues/190489).
    """
    accelerator.free_memory()
    gc.collect()  # hooks and generators hold the prepared networks in reference cycles
    accelerator.end_training()


def prepare(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Wrap a module in autocast and, with several processes, in DDP."""
    with warnings.catch_warnings():  # newer torch renamed an option, Accelerate uses the old name
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        return accelerator.prepare(module)
