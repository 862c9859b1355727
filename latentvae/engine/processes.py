"""Connect and disconnect the processes of a run, and wrap modules in autocast and DDP."""

import contextlib
import gc
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import nn

from latentvae.compute.precision import multiplies_bfloat16
from latentvae.config.run_config import RunConfig
from latentvae.distributed import gather_objects, launched_device
from latentvae.errors import UserError

DTYPES = {"no": None, "bf16": torch.bfloat16}  # autocast's dtype by mixed_precision


def start_accelerator(options: RunConfig, folder: Path) -> Accelerator:
    """Join the other ranks and return an `Accelerator`.

    The option `mixed_precision` sets the precision. With `auto`, the fastest precision of this
    machine is used. With None, the launcher's precision is used.

    Raises:
        UserError: the launcher asks for a precision that is not supported, or the ranks choose
            different precisions.
    """
    # Without this reset, the precision of an earlier run in this process would remain.
    AcceleratorState._reset_state()

    automatic = options.mixed_precision == "auto"
    accelerator = Accelerator(
        mixed_precision=fastest_precision() if automatic else options.mixed_precision,
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
    chosen = sorted(set(gather_objects(accelerator.mixed_precision)))
    if len(chosen) > 1:
        raise UserError(
            f"the processes of this run choose different precisions ({' and '.join(chosen)}), "
            "because their machines or their output folders differ. Give --mixed_precision no or "
            "bf16."
        )
    return accelerator


def fastest_precision() -> Literal["no", "bf16"]:
    """Return `bf16` if this process's device multiplies bfloat16 faster than float32, else `no`."""
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    device = torch.device("cpu" if use_cpu else launched_device())
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return "bf16" if multiplies_bfloat16(device) else "no"


def end_accelerator(accelerator: Accelerator) -> None:
    """Destroy the process group and everything that uses it.

    If a process group is still alive when the interpreter exits, the exit sometimes fails with
    SIGABRT (https://github.com/pytorch/pytorch/issues/190489).
    """
    accelerator.free_memory()
    gc.collect()  # hooks and generators hold the prepared networks in reference cycles
    accelerator.end_training()


def prepare(accelerator: Accelerator, module: nn.Module, *, some_wait: bool = False) -> nn.Module:
    """Wrap a module in autocast and, with several processes, in DDP.

    Args:
        some_wait: whether some parameters get no gradient in some updates. If True, DDP looks for
            these parameters in each forward pass. If False, DDP waits for the gradients of all
            parameters.
    """
    if accelerator.ddp_handler is not None:  # `start_accelerator` sets it
        accelerator.ddp_handler.find_unused_parameters = some_wait
    with warnings.catch_warnings():  # newer torch renamed an option, Accelerate uses the old name
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        return accelerator.prepare(module)
