"""Compute the peak memory of a training update with each preset, without using a GPU.

    python benchmarks/memory.py --json memory.json                  # every preset, its batch size
    python benchmarks/memory.py --presets kl_f8 --batch_sizes 4 8 12

The script needs no GPU and little memory. The script makes the same updates as a real run, in the
precision of the preset. The memory of an update includes that of the model, LPIPS, the
discriminator, both optimizers and the moving average of the weights. All tensors are torch's fake
tensors, which have shapes, dtypes and lifetimes but no values. A tracker adds up the sizes of all
tensor storages in use, and records the largest sum. The script makes two updates, because the
optimizers have their state only after the first update. The discriminator learns from the first
update on.

Autocast on a GPU computes normalisation layers in float32, but autocast on a CPU does not. So
`--device cuda`, the default, casts the inputs of normalisation layers to float32. Only tensors are
counted. A GPU also needs memory for the CUDA context (about 0.5 GiB), for the workspaces of
convolutions and for unused parts of allocated blocks. So choose a batch size that leaves a tenth of
the GPU's memory free.
"""

import json
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate.utils import patch_environment
from rich.console import Console
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from latentvae.cli.flags import exit_with, parse_options
from latentvae.config.presets import preset_names
from latentvae.data import Batch
from latentvae.engine.processes import start_accelerator
from latentvae.engine.training import Training, build_training
from latentvae.engine.updates import Updates
from latentvae.errors import UserError
from latentvae.losses.perceptual import _build_empty
from latentvae.tasks.autoencoder import build_parts, load_preset
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.fine_tuning import Base
from latentvae.tasks.autoencoder.task import AutoencoderTask
from latentvae.tasks.autoencoder.update_step import LearningAutoencoder

GIB = 2**30
UPDATES = 2
Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Options:
    """Options: presets whose memory is computed, settings of the updates, and the output file."""

    presets: tuple[str, ...] = ()
    """Names of presets whose memory is computed. Default: all presets."""

    batch_sizes: tuple[int, ...] = ()
    """Numbers of images per process and micro-step (forward and backward pass). Default: the
    train_batch_size of each preset."""

    resolution: int | None = None
    """Side of the images in pixels. Default: the resolution of each preset."""

    accumulate: bool = False
    """Compute two micro-steps (forward and backward passes) per update. The gradients of the first
    micro-step are in memory during the second micro-step."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Updates then need less memory but more time."""

    device: Device = "cuda"
    """Type of device whose autocast rules decide the dtypes of the computed tensors."""

    json: Path | None = None
    """JSON file to write the results to."""


@dataclass(frozen=True)
class Peak:
    """The result for one preset: the peak memory of a training update.

    Attributes:
        batch_size: number of images per process in one forward pass.
        gib: peak memory in GiB.
        fixed_gib: GiB in use between updates: weights, their average and the optimizers' state.
    """

    preset: str
    resolution: int
    batch_size: int
    gib: float
    fixed_gib: float


def peak(config: TrainConfig, *, device: Device = "cuda", fake: bool = True) -> tuple[int, int]:
    """Return the peak memory of `UPDATES` updates and the memory in use between updates, in bytes.

    Args:
        config: options of the run. `train_batch_size` is the number of images in one forward pass.
        device: device whose autocast rules are imitated.
        fake: use fake tensors. False uses real tensors on the CPU, to check the result of fake
            tensors.
    """
    with ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            # `Module.to` fails with fake parameters. No move is needed: all tensors are on the CPU.
            stays = mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module)
            stack.enter_context(stays)
        if device == "cuda":
            stack.enter_context(_norms_in_float32())
        training = stack.enter_context(_training(config))
        batch = _batch(config)

        memory = _LivingStorages()
        for module in _modules(training):
            memory.add([*module.parameters(), *module.buffers()])
        memory.add([s for a in training.averages.values() for s in a.shadow_params])
        memory.add(batch.images)
        with memory:
            updates = _WithoutSync(training)
            for _ in range(UPDATES):
                updates.make(iter(lambda: batch, None))

        return memory.peak, memory.now


class _LivingStorages(TorchDispatchMode):
    """Adds up the bytes of all tensor storages that exist now, and records the largest sum.

    `torch.distributed._tools.mem_tracker` does the same. But the hooks of `mem_tracker` fail in the
    call of `torch.autograd.grad` that computes the discriminator's adaptive weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out

    def add(self, tensors: Any) -> None:
        """Add the bytes of these tensors' storages to the sum, unless they were counted before."""
        for leaf in tree_leaves(tensors):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage not in self._seen:
                size = storage.nbytes()
                self._seen[storage] = True
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


class _WithoutSync(Updates):
    """Makes updates without checking for finite gradients, as fake tensors have no values."""

    def _verdict(self, norms: dict[str, Tensor], measured: Tensor) -> tuple[bool, int, list[float]]:
        return True, 0, [1.0] * len(measured)


class _LearningTask(AutoencoderTask):
    """The autoencoder task without the reading of images and the monitoring of tensor values."""

    build = LearningAutoencoder.build
    micro_step = LearningAutoencoder.micro_step


@contextmanager
def _training(config: TrainConfig) -> Iterator[Training]:
    """Build and yield the `Training` of a run. The weights of the LPIPS network are zeros."""

    def empty_lpips(net: Any, **_: Any) -> Any:
        model = _build_empty(net).eval()
        for module in model.modules():
            values = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, value in values:
                delattr(module, name)
                module.register_buffer(name, torch.zeros(value.shape), persistent=False)
        return model.to(memory_format=torch.channels_last)

    with (
        tempfile.TemporaryDirectory() as folder,
        patch_environment(ACCELERATE_USE_CPU="true"),
        mock.patch.object(build_parts, "load_lpips", empty_lpips),
    ):
        task = _LearningTask(config)
        task.base = _base(config)
        accelerator = start_accelerator(config.run, Path(folder))
        # k-means needs images. A resumed run does not run k-means.
        yield build_training(task, folder=Path(folder), accelerator=accelerator, resumed=True)


def _base(config: TrainConfig) -> Base | None:
    """Return a network shaped like the preset's pretrained network, or None if there is none."""
    if config.model.pretrained_model_name_or_path is None:
        return None
    net = build_parts.build_net(config, None)
    return Base("shape", net, encoder_sha256="", weights_sha256="", whole=True)


def _batch(config: TrainConfig) -> Batch:
    height, width = config.data.size
    count = config.run.train_batch_size
    images = torch.zeros(count, config.data.image_channels, height, width, dtype=torch.uint8)
    return Batch(images=images, indices=torch.arange(count), bad=[])


def _modules(training: Training) -> list[Any]:
    learners = training.task.learners.values()
    return [*(learner.module for learner in learners), training.task.metric]  # type: ignore[attr-defined]


@contextmanager
def _norms_in_float32() -> Iterator[None]:
    """Cast the inputs of norms to float32 under autocast, as autocast does on a GPU."""

    def cast(norm: Any) -> Any:
        def called(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

        return called

    with (
        mock.patch.object(F, "group_norm", cast(F.group_norm)),
        mock.patch.object(F, "layer_norm", cast(F.layer_norm)),
    ):
        yield


def config_of(name: str, options: Options, batch_size: int | None) -> TrainConfig:
    """Return the options of a preset, with a discriminator that learns from the start.

    The network has random weights (`--init random`). With `--init linear`, a PCA before the first
    update would also need memory, which this script does not compute.
    """
    preset = load_preset(name)
    run: dict[str, Any] = {"gradient_accumulation_steps": 2 if options.accumulate else 1}
    run["global_batch_size"] = None  # because `batch_size` is the number of images of one process
    run["gradient_checkpointing"] = options.gradient_checkpointing
    run["train_batch_size"] = batch_size or preset.run.train_batch_size
    sections: dict[str, dict[str, Any]] = {
        "discriminator": {"disc_start": 0.0, "disc_warmup_steps": 0, "disc_ramp_steps": 0},
        "run": run,
        "data": {} if options.resolution is None else {"resolution": options.resolution},
    }
    if hasattr(preset.model, "init"):
        sections["model"] = {"init": "random"}
    return preset.with_changes(sections)


def run(options: Options) -> None:
    """Compute the peak memory with each preset, and print each result."""
    console, peaks = Console(), list[Peak]()
    console.print(f"{'preset':24} {'px':>5} {'images':>7} {'GiB':>8} {'fixed GiB':>10}")
    for name in options.presets or preset_names(TrainConfig):
        for batch_size in options.batch_sizes or (None,):
            config = config_of(name, options, batch_size)
            most, fixed = peak(config, device=options.device)
            size, count = max(config.data.size), config.run.train_batch_size
            peaks.append(Peak(name, size, count, most / GIB, fixed / GIB))
            console.print(f"{name:24} {size:5} {count:7} {most / GIB:8.1f} {fixed / GIB:10.1f}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in peaks], indent=1) + "\n")


def main() -> None:
    try:
        run(parse_options(Options, sys.argv[1:], prog="memory.py", description=__doc__))
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
