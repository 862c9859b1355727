"""Collect the content of a checkpoint, and restore a training from this content.

    model.safetensors  model_optimizer.safetensors  model_average.safetensors   of each learner
    ...                                              Task.tensors
    state.json                                       SavedValues

A learner is a module with its optimizer. The learner's name, here `model`, begins the names of the
learner's files. Only a learner with a weight average has the file of averages.

Random numbers are computed from counters (see `randomness`), and the position in the data is the
number of micro-steps done. So no rank needs a state of its own for random numbers or data, and rank
0 writes one checkpoint for all ranks.
"""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from latentvae.distributed import gather_objects, rank, world_size
from latentvae.engine.checkpoint_files import Snapshot, load_optimizer_tensors, optimizer_tensors
from latentvae.engine.log import Window
from latentvae.engine.progress import SavedValues, checked_values, not_of_a_run
from latentvae.engine.training import Training
from latentvae.errors import UserError


def take_snapshot(training: Training, window: Window | None = None) -> Snapshot:
    """Return the state that a resumed run needs. All ranks must call this function.

    The snapshot refers to the run's tensors and does not copy them. So the next update changes the
    snapshot.

    Args:
        training: the training, with its modules, optimizers and progress.
        window: this rank's sums of logged values (see `MeanWindow.state`).
    """
    task = training.task
    state = task.state()

    # tensors
    tensors = dict(task.tensors())
    for name, learner in task.learners.items():
        tensors[name] = learner.module.state_dict()
        tensors[f"{name}_optimizer"] = optimizer_tensors(learner.optimizer, learner.module)
    for name in training.averages:
        tensors[f"{name}_average"] = _average_tensors(training, name)

    # plain values
    values = SavedValues(
        progress=training.progress,
        windows=gather_objects(window or {}),
        task=state.model_dump(),
        ranks=gather_objects(task.rank_state().model_dump()),
        world_size=world_size(),
        mixed_precision=training.accelerator.mixed_precision,
        identity=task.identity(),
        average_steps={n: average.optimization_step for n, average in training.averages.items()},
        versions={"torch": torch.__version__, "diffusers": diffusers.__version__},
    )
    return Snapshot(tensors=tensors, values=values.model_dump())


def restore(training: Training, snapshot: Snapshot) -> Window:
    """Load a snapshot into a freshly built training. Return this rank's sums of logged values.

    The sums are those since the last row of the log.

    Raises:
        UserError: the snapshot was not written by a run of this version of latentvae, or the run
            that wrote it used another number of processes, another precision, other data or another
            network.
    """
    # checks, before anything changes
    if "update" in snapshot.values:
        raise UserError(
            "the checkpoint was written by another version of latentvae, and this version cannot "
            "resume it. Resume with the other version, or start a new run in another output_dir."
        )
    values = checked_values(SavedValues, snapshot.values)
    task, tensors = training.task, snapshot.tensors
    if snapshot.update not in (None, values.progress.update):
        raise not_of_a_run(
            f"its state.json is of update {values.progress.update}, but the folder's name says "
            "another update"
        )
    state = checked_values(task.state_class, values.task)
    rank_states = [checked_values(task.rank_state_class, own) for own in values.ranks]
    _check_tensors(training, tensors, values)
    _check_same_circumstances(training, values)

    # learners and averages
    for name, learner in task.learners.items():
        load_weights(learner.module, tensors[name])
        load_optimizer_tensors(learner.optimizer, learner.module, tensors[f"{name}_optimizer"])
    for name, average in training.averages.items():
        for key, shadow in _average_tensors(training, name).items():
            shadow.copy_(tensors[f"{name}_average"][key])
        average.optimization_step = values.average_steps[name]

    # The task's own values. Each rank first loads the states of all ranks, so that a wrong state of
    # one rank is an error on all ranks.
    task.load_tensors({name: tensors[name] for name in task.tensors()})
    task.load_state(state, update=values.progress.update)
    for own in (*rank_states, rank_states[rank()]):
        task.load_rank_state(own)

    training.progress = values.progress
    return values.windows[rank()]


def load_for_export(training: Training, snapshot: Snapshot) -> None:
    """Load the weights of a snapshot, their averages, the values of the task and the progress.

    Nothing else is loaded, so the number of processes, the precision and the data may differ from
    those of the run.

    Raises:
        UserError: the snapshot is of another network, or was not written by a run.
    """
    values = checked_values(SavedValues, snapshot.values)
    task, tensors = training.task, snapshot.tensors
    state = checked_values(task.state_class, values.task)
    _check_tensors(training, tensors, values)

    for name, learner in task.learners.items():
        load_weights(learner.module, tensors[name])
    for name in training.averages:
        for key, shadow in _average_tensors(training, name).items():
            shadow.copy_(tensors[f"{name}_average"][key])
    task.load_tensors({name: tensors[name] for name in task.tensors()})
    task.load_state(state, update=values.progress.update)
    training.progress = values.progress


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's weights into a module.

    Raises:
        UserError: the weights belong to another network.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the checkpoint is not of this configuration: {reason}") from error


def averaged_or_trained(tensors: Mapping[str, Mapping[str, Tensor]], name: str) -> dict[str, Any]:
    """Return a module's weights from a checkpoint. Weights with an average are replaced by it."""
    return {**tensors.get(name, {}), **tensors.get(f"{name}_average", {})}


def _average_tensors(training: Training, name: str) -> dict[str, Tensor]:
    """Return a module's averaged weights, by the names of the weights in the checkpoint."""
    averages = training.average_of_weights()
    weights = training.task.learners[name].module.named_parameters()
    return {key: averages[parameter] for key, parameter in weights if parameter in averages}


def _check_tensors(
    training: Training, tensors: Mapping[str, Mapping[str, Tensor]], values: SavedValues
) -> None:
    """Raise UserError if a file, tensor or entry of `average_steps` is missing, or a shape differs.

    Weights and optimizer states are checked later, when they are loaded.
    """
    expected: dict[str, dict[str, Tensor]] = {}
    for name in training.task.learners:
        expected |= {name: {}, f"{name}_optimizer": {}}
    expected |= {f"{name}_average": _average_tensors(training, name) for name in training.averages}
    expected |= training.task.tensors()
    for file, wanted in expected.items():
        if file not in tensors:
            raise UserError(
                f"the checkpoint is not of this configuration: {file}.safetensors is missing"
            )
        for name, value in wanted.items():
            _check_shape(tensors[file].get(name), value, name=name, file=file)
    for name in training.averages:
        if name not in values.average_steps:
            raise UserError(
                f"the checkpoint is not of this configuration: average_steps of {name} is missing"
            )


def _check_shape(found: Tensor | None, wanted: Tensor, *, name: str, file: str) -> None:
    if found is None or found.shape != wanted.shape:
        shape = "missing" if found is None else tuple(found.shape)
        raise UserError(
            f"the checkpoint is not of this configuration: size mismatch for {name}: {shape} in "
            f"{file}.safetensors, {tuple(wanted.shape)} in the network"
        )


def _check_same_circumstances(training: Training, values: SavedValues) -> None:
    """Raise UserError if the circumstances differ from those at the run's start.

    The circumstances are the number of processes, the precision, the data and frozen networks. A
    comparison of the options does not find these differences.
    """
    if values.world_size != world_size():
        raise UserError(
            f"the run was started with {values.world_size} processes and cannot resume with "
            f"{world_size()}. Launch it with {values.world_size}."
        )

    precision = training.accelerator.mixed_precision
    if values.mixed_precision != precision:
        raise UserError(
            f"the run was started in mixed precision {values.mixed_precision} and cannot resume "
            f"in {precision}. Give --mixed_precision {values.mixed_precision}."
        )

    now, then = training.task.identity(), values.identity
    changed = [name for name in now | then if now.get(name) != then.get(name)]
    if changed:
        shown = [name for name in changed if not name.endswith("_sha256")]
        listed = ", ".join(f"{name}: {then.get(name)} then, {now.get(name)} now" for name in shown)
        first = next(iter(now.values()), "")
        listed = listed or f"{first} with other names"
        raise UserError(
            f"training data or frozen networks are not the same as at the start of the run "
            f"({listed}). "
            "Restore the old data and networks, or start a new run in another output_dir."
        )
