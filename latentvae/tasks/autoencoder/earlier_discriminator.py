"""A new run that starts with the discriminator of an earlier one."""

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
    """Load the weights and the optimizer's state of a run's newest discriminator.

    Args:
        learner: the new discriminator.
        run: folder of the earlier run.
        lecam: averages of logits, loaded too if both runs have them.

    Raises:
        UserError: the folder has no discriminator, or one of another shape.
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
            f"discriminator_from '{run}' was trained without a discriminator. Leave it out."
        )

    try:
        load_weights(learner.module, tensors["discriminator"])
    except UserError as error:
        raise UserError(
            f"discriminator_from '{run}' has a discriminator of another shape. Give its disc_type, "
            f"disc_norm, disc_channels and disc_layers ({error.__cause__})."
        ) from error
    saved = tensors.get("discriminator_optimizer", {})
    load_optimizer_tensors(learner.optimizer, learner.module, saved)
    if lecam is not None and "lecam" in tensors:
        lecam.load_state_dict(tensors["lecam"])
