"""The plain values of a checkpoint, `state.json`. The manifest's hash says that a file is the one
that was saved, not that this program saved it: a copied or edited one is refused in one sentence.
"""

import json
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    model_validator,
)

from latentvae.errors import UserError
from latentvae.files import SHOWN
from latentvae.tasks.autoencoder.watch import Condition

Count = Annotated[int, Field(ge=0, lt=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = float | int  # NaN too, of an update that was skipped
Sums = Annotated[list[Number], Field(min_length=2, max_length=2)]
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


class _Values(BaseModel):
    """What a run cannot go on without; what it does not know of passes."""

    model_config = ConfigDict(strict=True)

    update: Count
    micro_step: Count
    skipped: Count
    skipped_in_a_row: Count
    windows: list[dict[str, Sums]]
    units: list[list[list[Number]]] | None = None  # older checkpoints have none
    bad_images: list[Named]
    critic_start: Count
    world_size: Annotated[int, Field(ge=1)]
    mixed_precision: str
    data: dict[str, Any]
    ema_steps: Count | None = None  # without an average
    # Not in older checkpoints:
    kl_log_factor: Finite = 0.0
    kl_error: Finite = 0.0
    critic_stopped: Count | None = None
    watch: Annotated[dict[str, Any], AfterValidator(_check_watch)] = {}

    @model_validator(mode="after")
    def _one_of_each_process(self) -> "_Values":
        for name in ("windows", "units"):
            values = getattr(self, name)
            if values is not None and len(values) != self.world_size:
                raise ValueError(f"{name}: {len(values)} of {self.world_size} processes")
        return self


def check_values(values: dict[str, Any], *, num_channels: int, has_average: bool) -> None:
    """Refuse a state that no run has written.

    Args:
        num_channels: d, whose sums `units` holds.
        has_average: whether the run keeps one.

    Raises:
        UserError: names the entry.
    """
    fault = ""
    try:
        checked = _Values.model_validate(values)
        if any(
            own and [len(row) for row in own] != [num_channels] * 3 for own in checked.units or []
        ):
            fault = f"units: not 3 x {num_channels} sums for each process"
        if has_average and checked.ema_steps is None:
            fault = "ema_steps: missing"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        fault = ": ".join(
            [*([".".join(map(str, first["loc"]))] if first["loc"] else []), first["msg"]]
        )
    if fault:
        raise UserError(
            f"the checkpoint's state.json was not written by a run ({fault[:SHOWN]}); delete that "
            "checkpoint, and the same command goes on from the one before"
        )
