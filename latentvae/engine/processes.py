"""The processes of a run: joined, wrapped around modules, and taken down."""

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

DTYPES = {"no": None, "bf16": torch.bfloat16}  # of autocast, by mixed_precision


def start_accelerator(options: RunConfig, folder: Path) -> Accelerator:
    """Join the other ranks; precision as configured, or as the launcher was told.

    Raises:
        UserError: the launcher asks for a precision that is not supported.
    """
    AcceleratorState._reset_state()  # else the precision of an earlier run in this process stays
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
            f"the launcher asks for mixed precision {accelerator.mixed_precision}, which "
            "two optimisers on one gradient scaler get wrong; "
            "allowed are bf16 and no"
        )
    return accelerator


def end_accelerator(accelerator: Accelerator) -> None:
    """Take the process group down with all that uses it.

    A group that lives on to the end of the interpreter ends it with SIGABRT now and then
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    accelerator.free_memory()
    gc.collect()  # hooks and generators keep the prepared networks in circles
    accelerator.end_training()


def prepare(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Wrap a module in autocast and, with several processes, DDP."""
    with warnings.catch_warnings():  # newer torch has another name for it, which Accelerate has not
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        return accelerator.prepare(module)
