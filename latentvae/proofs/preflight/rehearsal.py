"""Make a short trial run (rehearsal): the first updates of a run, and a record of their effects.

The model, images, precision and number of processes are those of the user's run. The rehearsal's
folder is temporary, and the discriminator starts after two updates.
"""

import hashlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.data import Batch
from latentvae.distributed import send_from_main
from latentvae.engine.checkpoint_files import optimizer_tensors
from latentvae.engine.training import Training
from latentvae.engine.updates import UpdateResult, Updates
from latentvae.proofs.preflight.gradient_watch import Watch
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.task import AutoencoderTask
from latentvae.tasks.autoencoder.update_step import DISCRIMINATOR, MODEL

UPDATES = 4  # two updates without the discriminator, and two with it
DISCRIMINATOR_START = 2  # first update of the discriminator, counted from 0
WATCHED_TENSORS = 12  # about this number per network is copied before and after each update


@dataclass(kw_only=True)
class Seen:
    """Record of an update: results, time, learning rates, and tensors before and after the update.

    Attributes:
        result: what `Updates.make` returned.
        seconds: time of the update in seconds, including the loading of its images.
        rates: learning rates of the model's and the discriminator's optimizers.
        before, after: some tensors before and after the update, on the CPU. Their names start with
            `model/`, `discriminator/` or `ema/`.
        moments: the optimizer's moving averages of the gradients (AdamW's first moments), after the
            update, for the model's weights in `after`.
        discriminator_calls: number of forward passes of the discriminator.
    """

    result: UpdateResult
    seconds: float
    rates: tuple[float, ...]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    moments: dict[str, Tensor]
    discriminator_calls: int


@dataclass(kw_only=True)
class Rehearsal:
    """A short trial run (rehearsal) of the user's run, with everything that the checks examine.

    Attributes:
        asked: the configuration of the user's run.
        task: the task of the short run.
        training: the state of the training (see `engine`). The run's folder is temporary.
        updates: object that makes the updates of the run.
        seen: records of the updates that were made.
        watch: object that recorded gradients and dtypes during the updates.
        batches: sha256, minimum and maximum of the images of each batch on this rank.
        images: two images of the first batch, (2, C, H, W). If the batch has only one image, the
            second is its mirror image.
        source: iterator over the batches that were not used yet.
        peak_memory: peak memory use in bytes.
        save_seconds, checkpoint_bytes: measured time of saving a checkpoint in seconds, and the
            checkpoint's size in bytes.
        validation_seconds: measured time of a validation, in seconds per image.
    """

    asked: TrainConfig
    task: AutoencoderTask
    training: Training
    updates: Updates
    seen: list[Seen] = field(default_factory=list)
    watch: Watch = field(init=False)
    batches: list[tuple[str, float, float]] = field(default_factory=list)
    images: Tensor = field(init=False)
    source: Iterator[Batch] = field(init=False)
    peak_memory: int = 0
    save_seconds: float = 0.0
    checkpoint_bytes: int = 0
    validation_seconds: float = 0.0

    def rehearse(self) -> None:
        """Make the updates. Stop at an update whose gradients are not finite."""
        self.source = iter(self._noted(self.task.batches(start_step=0)))
        _reset_peak(self.training.accelerator.device)
        with Watch(self.task) as self.watch:
            for _ in range(UPDATES):
                self.seen.append(self._update(self.source))
                if not self.seen[-1].result.finite:
                    break
        self.peak_memory = _peak(self.training.accelerator.device)

    def _update(self, source: Iterator[Batch]) -> Seen:
        # update
        training, calls = self.training, self.watch.discriminator_calls
        before = watched_tensors(training)
        _wait(training.accelerator.device)
        start = time.perf_counter()
        result = self.updates.make(source)
        _wait(training.accelerator.device)

        # what the update did
        optimizers = [learner.optimizer for learner in training.task.learners.values()]
        return Seen(
            result=result,
            seconds=time.perf_counter() - start,
            rates=tuple(optimizer.param_groups[0]["lr"] for optimizer in optimizers),
            before=before,
            after=watched_tensors(training),
            moments=_moments(self.task),
            discriminator_calls=self.watch.discriminator_calls - calls,
        )

    def _noted(self, loader: Any) -> Iterator[Batch]:
        for batch in loader:
            images = batch.on("cpu")
            digest = hashlib.sha256(images.contiguous().numpy().data).hexdigest()
            self.batches.append((digest, images.min().item(), images.max().item()))
            if len(self.batches) == 1:
                few = images[:2] if len(images) > 1 else torch.cat([images, images.flip(3)])
                self.images = few.clone()
            self.watch.next_micro_step()
            yield batch


def rehearsed(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return a copy of the user's configuration, for a short run in another folder.

    The short run has the full learning rate from the start, a discriminator that starts early, and
    no trackers (such as TensorBoard).
    """
    copy = config.model_copy(deep=True)
    copy.run.output_dir = str(folder)
    copy.run.resume_from_checkpoint, copy.run.overwrite_output_dir = "latest", False
    copy.run.report_to, copy.run.push_to_hub = "none", False
    copy.discriminator.disc_start = float(DISCRIMINATOR_START)
    copy.discriminator.disc_warmup_steps, copy.discriminator.disc_ramp_steps = 0, 1
    if hasattr(copy.model, "quantizer_warmup_steps"):  # every part learns, as in most of the run
        copy = copy.with_changes({"model": {"quantizer_warmup_steps": 0}})
    copy.optimizer.lr_warmup_steps, copy.optimizer.lr_scheduler = 0, "constant"
    return copy


def watched_tensors(training: Training) -> dict[str, Tensor]:
    """Return copies of some weights of model, discriminator and weight average, on the CPU."""
    found: dict[str, Tensor] = {}
    for kind, learner in training.task.learners.items():
        some = _some(trained(learner.module))
        found |= {f"{kind}/{name}": parameter for name, parameter in some.items()}
    if training.averages:
        averages = training.average_of_weights()
        weights = training.task.learners[MODEL].module.named_parameters()
        watched = {name: p for name, p in weights if f"{MODEL}/{name}" in found and p in averages}
        found |= {f"ema/{name}": averages[p] for name, p in watched.items()}
    return {name: value.detach().cpu().clone() for name, value in found.items()}


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _some(tensors: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return about `WATCHED_TENSORS` tensors, spread over the network.

    The tensors are split into groups in the network's order. The result has the largest tensor of
    each group. Codes are left out, because a code that restarts (takes a new value) changes
    completely.
    """
    items = [item for item in tensors.items() if not item[0].startswith("net.quantize.")]
    step = max(len(items) // WATCHED_TENSORS, 1)
    stretches = (items[i : i + step] for i in range(0, len(items), step))
    return dict(max(stretch, key=lambda item: item[1].numel()) for stretch in stretches)


def _moments(task: AutoencoderTask) -> dict[str, Tensor]:
    some = _some(trained(task.wrapper))
    state = task.learners[MODEL].optimizer.state
    return {
        f"model/{name}": state[p]["exp_avg"].detach().cpu().clone()
        for name, p in some.items()
        if p in state
    }


def fingerprints(training: Training) -> dict[str, str]:
    """Return a sha256 for each group of tensors that an update changes, such as the weights."""
    groups = _state(training)
    if average := training.averages.get(MODEL):
        groups["average"] |= {"steps": torch.tensor(average.optimization_step)}
    return {name: _digest(tensors) for name, tensors in groups.items()}


def align(training: Training) -> None:
    """Send the state of the first rank to all ranks, as a restored checkpoint does.

    Another check (`ranks-equal`) tests whether the states of the ranks were already equal.
    """
    device = training.accelerator.device.type
    tensors = [value for group in _state(training).values() for value in group.values()]
    send_from_main(value for value in tensors if value.device.type == device)


def _state(training: Training) -> dict[str, dict[str, Tensor]]:
    """Return all tensors that an update changes, in groups such as weights and averages."""
    groups: dict[str, dict[str, Tensor]] = {}
    for kind, prefix in ((MODEL, ""), (DISCRIMINATOR, "discriminator ")):
        if learner := training.task.learners.get(kind):
            groups[prefix.strip() or "weights"] = learner.module.state_dict()
            groups[f"{prefix}optimizer"] = optimizer_tensors(learner.optimizer, learner.module)
    if average := training.averages.get(MODEL):
        groups["average"] = {str(i): value for i, value in enumerate(average.shadow_params)}
    if anchors := training.task.tensors().get("lecam"):
        groups["LeCam averages"] = anchors
    return groups


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """Return the peak memory use so far in bytes, of the GPU or, without a GPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
