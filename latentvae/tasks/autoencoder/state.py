"""The plain values of an autoencoder's checkpoint, beside the engine's own."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf

from latentvae.engine.progress import Count, Number
from latentvae.engine.task import State
from latentvae.tasks.autoencoder.collapse_watch import Condition

Finite = Annotated[float, Field(allow_inf_nan=False)]
# Of file names, which need not be UTF-8, so no strings to pydantic.
Named = Annotated[list[InstanceOf[str]], Field(min_length=2, max_length=2)]


class _Watch(BaseModel):
    """What `CollapseWatch.state_dict` gives."""

    model_config = ConfigDict(strict=True, extra="forbid")

    conditions: dict[str, Condition] = {}
    best_lpips: float | None = None
    best_update: Count = 0
    most_used: Count = 0
    validated_on: str = ""


def _check_watch(saved: dict[str, Any]) -> dict[str, Any]:
    _Watch.model_validate_json(json.dumps(saved))
    return saved


class KLTargetState(State):
    """See `losses.objective.kl_target.KLTarget.state_dict`."""

    log_factor: Finite = 0.0
    error: Finite = 0.0


class AutoencoderState(State):
    """How far the controllers are, the same on every rank.

    Attributes:
        discriminator_start: the update (from 0) in which the discriminator starts; it stays when a
            run with a running discriminator is made longer.
        discriminator_stopped: updates done when the watch switched it off, for good; None: it has
            not.
        kl_target: the controller of the KL's weight.
        bad_images: unreadable files met so far, by name and reason.
        watch: what the watch remembers, see `CollapseWatch.state_dict`.
    """

    discriminator_start: Count = 0
    discriminator_stopped: Count | None = None
    kl_target: KLTargetState = KLTargetState()
    bad_images: list[Named] = Field(default_factory=list)
    watch: Annotated[dict[str, Any], AfterValidator(_check_watch)] = Field(default_factory=dict)


class RankState(State):
    """What a rank gathers between two rows of the log.

    Attributes:
        units: sums that active units are counted from, 3 x d.
    """

    units: list[list[Number]] = Field(default_factory=list)
