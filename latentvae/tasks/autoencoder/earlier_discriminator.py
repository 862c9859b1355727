"""Start a new run with the discriminator of an earlier run."""

from pathlib import Path

from latentvae.engine.checkpoint_content import load_weights
from latentvae.engine.checkpoint_files import (
    load_checkpoint,
    load_optimizer_tensors,
    newest_usable,
)
from latentvae.engine.task import Learner
from latentvae.errors import UserError
from latentvae.losses.adversarial import LeCam


def load_discriminator(learner: Learner, run: Path, lecam: LeCam | None) -> None:
    """Load the discriminator and its optimizer's state from a run's newest usable checkpoint.

    Args:
        learner: the new discriminator.
        run: folder of the earlier run.
        lecam: running averages of logits for the LeCam penalty. The averages of the earlier run
            are loaded if both runs use this penalty.

    Raises:
        UserError: the run has no usable checkpoint or no discriminator, or its discriminator has
            another shape.
    """
    run = run.expanduser()
    checkpoint, faults = newest_usable(run) if run.is_dir() else (None, [])
    if checkpoint is None:
        reasons = "".join(f" {fault}." for fault in faults)
        raise UserError(
            f"discriminator_from '{run}' has no checkpoint that can be used.{reasons} Give the "
            "output_dir of an earlier run."
        )
    tensors = load_checkpoint(checkpoint).tensors
    if "discriminator" not in tensors:
        raise UserError(
            f"the run in discriminator_from '{run}' has no discriminator. Leave this option out."
        )

    try:
        load_weights(learner.module, tensors["discriminator"])
    except UserError as error:
        raise UserError(
            f"discriminator_from '{run}' has a discriminator of another shape. Use the disc_type, "
            f"disc_norm, disc_channels and disc_layers of the earlier run ({error.__cause__})."
        ) from error
    saved = tensors.get("discriminator_optimizer", {})
    load_optimizer_tensors(learner.optimizer, learner.module, saved)
    if lecam is not None and "lecam" in tensors:
        lecam.load_state_dict(tensors["lecam"])
