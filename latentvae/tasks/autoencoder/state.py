"""What a checkpoint of a run holds, and whether a run may go on from one.

Randomness is counted, not stored (see `randomness`), and the data position is the number of
micro-steps done: one checkpoint, written by rank 0, serves all ranks.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from torch import Tensor, nn

from latentvae.config.autoencoder import TrainConfig, flat
from latentvae.config.presets import parse
from latentvae.distributed import gather_objects, rank, world_size
from latentvae.engine.checkpoint import Snapshot, load_optimizer_tensors, optimizer_tensors
from latentvae.errors import UserError
from latentvae.files import read_yaml
from latentvae.options import DecidesTheWatch, MayChange, marked
from latentvae.tasks.autoencoder.run import Run
from latentvae.tasks.autoencoder.saved_values import check_values

# What a run did that is older than the option, where the default of now is another.
BEFORE = {"data": {"resize_with": "pillow"}}


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        update: updates done.
        micro_step: micro-steps done, which is also the data position.
        skipped: non-finite updates skipped so far; `skipped_in_a_row` of them just now.
        window: sums of logged values since the last row, for this rank.
        units: sums that active units are counted from, since the last row, for this rank.
        bad_images: unreadable files met so far, by name and reason.
        critic_start: the update (from 0) in which the critic starts; it stays when a run with a
            running critic is made longer.
        kl_log_factor: logarithm of the KL's weight over kl_scale, where a target moves it.
        kl_error: its relative error in the update before.
        critic_stopped: updates done when the watch switched the critic off, for good; None: it has
            not.
        watch: what the watch remembers, see `CollapseWatch.state_dict`.
    """

    update: int = 0
    micro_step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    window: dict[str, list[float]] = field(default_factory=dict)
    units: list[list[float]] = field(default_factory=list)
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    critic_start: int = 0
    kl_log_factor: float = 0.0
    kl_error: float = 0.0
    critic_stopped: int | None = None
    watch: dict[str, Any] = field(default_factory=dict)


def take_snapshot(run: Run, progress: Progress) -> Snapshot:
    """Everything the rest of the run depends on. All ranks call it; tensors are not copied."""
    tensors = {
        "model": run.wrapper.state_dict(),
        "optimizer": optimizer_tensors(run.optimizer, run.wrapper),
    }
    if run.critic is not None and run.critic_optimizer is not None:
        tensors["critic"] = run.critic.state_dict()
        tensors["critic_optimizer"] = optimizer_tensors(run.critic_optimizer, run.critic)
    if run.lecam is not None:
        tensors["lecam"] = run.lecam.state_dict()
    values: dict[str, Any] = {
        "update": progress.update,
        "micro_step": progress.micro_step,
        "skipped": progress.skipped,
        "skipped_in_a_row": progress.skipped_in_a_row,
        "windows": gather_objects(progress.window),
        "units": gather_objects(progress.units),
        "bad_images": progress.bad_images,
        "critic_start": progress.critic_start,
        "kl_log_factor": progress.kl_log_factor,
        "kl_error": progress.kl_error,
        "critic_stopped": progress.critic_stopped,
        "watch": progress.watch,
        "world_size": world_size(),
        "mixed_precision": run.accelerator.mixed_precision,
        "data": run.data_identity,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    if run.ema is not None:
        names = [name for name, _ in run.net.named_parameters()]
        tensors["ema"] = dict(zip(names, run.ema.shadow_params, strict=True))
        values["ema_steps"] = run.ema.optimization_step
    return Snapshot(tensors=tensors, values=values)


def restore(run: Run, snapshot: Snapshot) -> Progress:
    """Put a snapshot into a freshly built run; returns where it stood.

    Raises:
        UserError: the run was started with other processes, precision or images, or has another
            network; or no run has written it.
    """
    tensors, values = snapshot.tensors, snapshot.values
    check_values(
        values,
        num_channels=run.config.model.latent_channels,
        has_average=run.ema is not None,
    )
    _check_tensors(run, tensors)
    _check_same_circumstances(values, run)
    started = values["critic_start"] <= values["update"]
    load_weights(run.wrapper, tensors["model"])
    load_optimizer_tensors(run.optimizer, run.wrapper, tensors["optimizer"])
    if run.critic is not None and run.critic_optimizer is not None:
        load_weights(run.critic, tensors["critic"])
        load_optimizer_tensors(run.critic_optimizer, run.critic, tensors["critic_optimizer"])
    if run.lecam is not None:
        run.lecam.load_state_dict(tensors["lecam"])
    if run.ema is not None:
        for (name, _), shadow in zip(
            run.net.named_parameters(), run.ema.shadow_params, strict=True
        ):
            shadow.copy_(tensors["ema"][name])
        run.ema.optimization_step = values["ema_steps"]
    return Progress(
        update=values["update"],
        micro_step=values["micro_step"],
        skipped=values["skipped"],
        skipped_in_a_row=values["skipped_in_a_row"],
        window=values["windows"][rank()],
        units=values["units"][rank()] if "units" in values else [],  # older checkpoints have none
        bad_images=[(name, reason) for name, reason in values["bad_images"]],
        critic_start=values["critic_start"] if started else run.config.critic_start,
        kl_log_factor=values.get("kl_log_factor", 0.0),  # older checkpoints have none
        kl_error=values.get("kl_error", 0.0),
        critic_stopped=values.get("critic_stopped"),  # neither is in older checkpoints
        watch=values.get("watch", {}),
    )


def _check_tensors(run: Run, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Refuse files that are not there, and names and shapes that are not the run's. Weights are
    compared where they are loaded."""
    wanted = {
        "model": True,
        "optimizer": True,
        "critic": run.critic is not None,
        "critic_optimizer": run.critic_optimizer is not None,
        "lecam": run.lecam is not None,
        "ema": run.ema is not None,
    }
    expected: dict[str, dict[str, Tensor]] = {}
    if run.ema is not None:
        expected["ema"] = dict(run.net.named_parameters())
    if run.lecam is not None:
        expected["lecam"] = run.lecam.state_dict()
    for file, is_wanted in wanted.items():
        if is_wanted and file not in tensors:
            raise UserError(f"the checkpoint is not of this configuration: no {file}.safetensors")
    for file, values in expected.items():
        for name, value in values.items():
            found = tensors[file].get(name)
            if found is None or found.shape != value.shape:
                shape = "missing" if found is None else tuple(found.shape)
                raise UserError(
                    f"the checkpoint is not of this configuration: size mismatch for {name} in "
                    f"{file}.safetensors: {shape} there, {tuple(value.shape)} in the network"
                )


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Those of a checkpoint, which may have been put among those of another network."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the checkpoint is not of this configuration: {reason}") from error


def _check_same_circumstances(values: dict[str, Any], run: Run) -> None:
    """Refuse what the configuration does not show: processes, the launcher's precision, the
    images."""
    if values["world_size"] != world_size():
        raise UserError(
            f"the run was started with {values['world_size']} processes and cannot go on with "
            f"{world_size()}; launch it with {values['world_size']}"
        )
    precision = run.accelerator.mixed_precision
    if values["mixed_precision"] != precision:
        raise UserError(
            f"the run was started in mixed precision {values['mixed_precision']} and cannot go on "
            f"in {precision}; give --mixed_precision {values['mixed_precision']}"
        )
    now, then = run.data_identity, values["data"]
    # What an older checkpoint does not know of cannot be compared.
    changed = [name for name in now if name in then and now[name] != then[name]]
    if changed:
        shown = [name for name in changed if name != "names_sha256"]
        listed = ", ".join(f"{name}: {then[name]} then, {now[name]} now" for name in shown)
        listed = listed or f"{now['images']} with other names"
        raise UserError(
            f"the training images are not those the run was started with ({listed}); restore "
            "them, or start anew in another output_dir"
        )


def write_config(config: TrainConfig, path: Path) -> None:
    """Write the whole file or nothing."""
    temporary = path.with_suffix(".yaml.tmp")
    temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    temporary.replace(path)


def read_config(path: Path) -> TrainConfig:
    """The configuration that a run was started with.

    Raises:
        UserError: not a run's folder, or not a run's configuration.
    """
    if not path.is_file():
        raise UserError(f"'{path.parent}' is not a run: it has no {path.name}")
    values = read_yaml(path)
    if not isinstance(values, dict) or not values.keys() >= set(TrainConfig.model_fields):
        raise UserError(f"'{path}' is not the configuration of a run")
    for section, options in BEFORE.items():
        if isinstance(values[section], dict):
            values[section] = options | values[section]
    return parse(values, source=str(path))


def check_same_config(now: TrainConfig, then: TrainConfig) -> None:
    """Refuse to go on with options that change the result; names them."""
    new, old = flat(now), flat(then)
    may_change = set(marked(TrainConfig, MayChange))
    if new["critic_watch"] == old["critic_watch"] == "disable":
        may_change -= set(marked(TrainConfig, DecidesTheWatch))
    changed = [name for name in new if new[name] != old[name] and name not in may_change]
    if changed:
        listed = ", ".join(f"{name} ({old[name]} then, {new[name]} now)" for name in changed)
        raise UserError(
            f"the run in '{then.run.output_dir}' was started with other options: {listed}; "
            "give the old ones, "
            "another output_dir, or --overwrite_output_dir to delete it and start anew"
        )
