"""Define and check the plain values of a checkpoint (`state.json`), such as the progress.

A hash in the checkpoint's manifest.json proves that a file has not changed. But the hash does not
prove that this program wrote the file. So the values are checked too, and wrong values of an edited
file are an error.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentvae.errors import UserError
from latentvae.files import SHOWN

Count = Annotated[int, Field(ge=0, lt=2**53)]
Number = float | int  # also NaN, after a skipped update
Sums = Annotated[list[Number], Field(min_length=2, max_length=2)]


class Progress(BaseModel):
    """Counters of the updates and micro-steps (forward and backward passes) that a run has done.

    Attributes:
        update: number of updates done.
        micro_step: number of micro-steps done, which is also the position in the data.
        skipped: number of updates that were skipped so far (see `UpdateResult.finite`).
        skipped_in_a_row: number of skipped updates since the last update that was not skipped.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    update: Count = 0
    micro_step: Count = 0
    skipped: Count = 0
    skipped_in_a_row: Count = 0


class SavedValues(BaseModel):
    """The content of `state.json`: all values of a checkpoint that are not tensors.

    Attributes:
        progress: counters of the updates and micro-steps done.
        windows: for each rank, sum and count of each logged value since the last row of the log.
        task: the values of `Task.state`.
        ranks: the values of `Task.rank_state`, for each rank.
        world_size: number of processes.
        mixed_precision: precision of the run.
        identity: the values of `Task.identity`.
        average_steps: number of updates in each weight average, by the name of its learner (a
            module with its optimizer).
        versions: versions of the libraries that wrote the checkpoint, only for information.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    progress: Progress
    windows: list[dict[str, Sums]]
    task: dict[str, Any]
    ranks: list[dict[str, Any]]
    world_size: Annotated[int, Field(ge=1)]
    mixed_precision: str
    identity: dict[str, Any]
    average_steps: dict[str, Count]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _one_of_each_process(self) -> "SavedValues":
        for name in ("windows", "ranks"):
            if len(getattr(self, name)) != self.world_size:
                found = len(getattr(self, name))
                raise ValueError(f"{name}: {found} of {self.world_size} processes")
        return self


Model = TypeVar("Model", bound=BaseModel)


def checked_values(model: type[Model], values: Any) -> Model:
    """Convert the plain values of a checkpoint to an object of class `model`.

    Raises:
        UserError: the values were not written by a run. The message names the wrong entry.
    """
    try:
        checked = model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = [".".join(map(str, first["loc"]))] if first["loc"] else []
        raise not_of_a_run(": ".join([*where, first["msg"]])) from error
    if missing := _not_given(checked):
        raise not_of_a_run(f"{missing[0]}: missing")
    return checked


def _not_given(values: BaseModel) -> list[str]:
    """Return the names of missing fields, at any depth. A run always saves every field."""
    names = [name for name in type(values).model_fields if name not in values.model_fields_set]
    for name in type(values).model_fields:
        inner = getattr(values, name)
        if isinstance(inner, BaseModel):
            names += [f"{name}.{missing}" for missing in _not_given(inner)]
    return names


def not_of_a_run(fault: str) -> UserError:
    """Return the `UserError` for a `state.json` that was not written by a run."""
    return UserError(
        f"the checkpoint's state.json was not written by a run ({fault[:SHOWN]}). Delete that "
        "checkpoint, and the same command resumes from the checkpoint before it."
    )
