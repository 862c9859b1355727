"""Check the options that every run has, before any work and without touching a file."""

import os
from pathlib import Path

from latentvae.config.run_config import RunConfig
from latentvae.engine.launcher import check_launcher
from latentvae.engine.publishing import repository
from latentvae.engine.tracker import check_tracker
from latentvae.errors import UserError


def check_options(options: RunConfig) -> Path:
    """Check the options and return the run's folder.

    Raises:
        UserError: an option is missing, names a tracker that is not installed, or contradicts
            another option or a setting of the launcher.
    """
    # options
    if options.output_dir is None:
        raise UserError(
            "output_dir is missing. Give the folder to write the run to, such as runs/first."
        )
    wanted = options.resume_from_checkpoint
    if options.overwrite_output_dir and wanted != "latest":
        raise UserError(
            f"resume_from_checkpoint '{wanted}' resumes a run that overwrite_output_dir "
            "deletes. Give one of them."
        )

    # the launcher
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "the launcher set MASTER_ADDR but not WORLD_SIZE: it was asked for several "
            "processes and started one. On CPUs launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )

    check_launcher(precision=options.mixed_precision)

    # tracker and upload
    check_tracker(options.report_to)
    folder = Path(options.output_dir)
    if options.push_to_hub:
        repository(options.hub_model_id, folder)
    return folder
