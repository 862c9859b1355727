"""The command `latentvae train-tiny`."""

import inspect
from collections.abc import Sequence


def train_tiny_command(arguments: Sequence[str]) -> None:
    """Distil an autoencoder into a small, fast one, and export the small one for diffusers.

        latentvae train-tiny --teacher runs/vae/export --train_data_dir photos \\
            --output_dir runs/tiny

    The given autoencoder is called the teacher, and the small autoencoder is called the student.
    If the teacher is an AutoencoderKLFlux2, the student is a smaller AutoencoderKLFlux2. For all
    other teachers, the student is an AutoencoderTiny (the network of TAESD). By default, only its
    decoder is trained. To train with several processes, start the command with `accelerate launch`.
    `--config` takes a YAML file or the name of a preset. Every flag below overrides a value of this
    config. To resume a training that was interrupted, run the same command again. `--preflight`
    trains a few updates to check the training, and then exits.
    """
    from latentvae.cli.train import run_task
    from latentvae.proofs.distill_preflight import distill_preflight
    from latentvae.tasks.distill.task import DistillTask

    run_task(
        DistillTask,
        arguments,
        description=inspect.cleandoc(train_tiny_command.__doc__ or ""),
        default_config="tiny_small",
        preflight=distill_preflight,
    )
