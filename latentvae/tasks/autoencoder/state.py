"""Define the plain values (no tensors) in the checkpoints of an autoencoder's training.

The package `engine` adds further values.
"""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf

from latentvae.engine.progress import Count, Number
from latentvae.engine.task import State
from latentvae.tasks.autoencoder.collapse_watch import Condition

Finite = Annotated[float, Field(allow_inf_nan=False)]
# A file's name and why it is unreadable. Pydantic's `str` rejects names that are not UTF-8.
Named = Annotated[list[InstanceOf[str]], Field(min_length=2, max_length=2)]


class _Watch(BaseModel):
    """The schema of `CollapseWatch.state_dict`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    conditions: dict[str, Condition] = {}
    best_lpips: float | None = None
    best_update: Count = 0
    most_used: dict[str, Count] = {}
    validated_on: str = ""


def _check_watch(saved: dict[str, Any]) -> dict[str, Any]:
    _Watch.model_validate_json(json.dumps(saved))
    return saved


class KLTargetState(State):
    """The schema of `losses.objective.kl_target.KLTarget.state_dict`."""

    log_factor: Finite = 0.0
    error: Finite = 0.0


class AutoencoderState(State):
    """State of the discriminator's schedule, the KL weight and the collapse watch.

    The state is equal on all ranks.

    Attributes:
        discriminator_start: the first update (counted from 0) in which the discriminator learns.
            The value stays the same if the run is extended after the discriminator has started.
        discriminator_stopped: number of updates done when the collapse watch switched the
            discriminator off. None while the discriminator is on.
        kl_target: state of the controller of the KL's weight.
        bad_images: name of each unreadable file so far, and why it cannot be read.
        watch: state of the collapse watch, see `CollapseWatch.state_dict`.
    """

    discriminator_start: Count = 0
    discriminator_stopped: Count | None = None
    kl_target: KLTargetState = KLTargetState()
    bad_images: list[Named] = Field(default_factory=list)
    watch: Annotated[dict[str, Any], AfterValidator(_check_watch)] = Field(default_factory=dict)


class RankState(State):
    """Values that a rank gathers between two rows of the log.

    Attributes:
        units: 3 numbers for each of d latent channels, from which the number of active units is
            computed (see `ActiveUnits.state`).
    """

    units: list[list[Number]] = Field(default_factory=list)
