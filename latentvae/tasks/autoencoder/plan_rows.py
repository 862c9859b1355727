"""Describe a run's model, images and losses for the overview (plan) printed at its start."""

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from latentvae.data import ImageStream
from latentvae.models import calls
from latentvae.tasks.autoencoder.discretise import trains_encoder, warmup_steps

if TYPE_CHECKING:
    from latentvae.tasks.autoencoder.task import AutoencoderTask


def plan(task: "AutoencoderTask") -> dict[str, str]:
    """Return a dict from headings to texts about the model, its images and its losses."""
    size = _size(task.config.data.size)
    return {
        "model": _model(task),
        "latent": _latent(task),
        "images": (
            f"{_count(task)} to train, {len(task.validation_images):,} to validate, "
            f"at {size} px{_pixels(task)}"
        ),
        "objective": _objective(task),
        **_features(task),
        "discriminator": _discriminator(task),
    }


def _model(task: "AutoencoderTask") -> str:
    model = task.config.model
    size = _millions(task.net)
    kind = f"{type(task.net).__name__}, {size} M parameters, f = {model.f}, {_bottleneck(task)}"
    if task.base is None:
        return kind
    if task.base.discretised:
        return f"{kind}, discretised from {task.base.name}, {_learns(task)}"
    frozen = ", encoder frozen" if model.freeze_encoder else ""
    if rank := task.config.low_rank:
        learned = sum(p.numel() for p in task.net.parameters() if p.requires_grad)
        frozen = f", only adapters of rank {rank} learn ({learned:,} parameters)"
    return f"{kind}, fine-tuned from {task.base.name}{frozen}"


def _learns(task: "AutoencoderTask") -> str:
    """Return which parts of a discretised network learn, and when."""
    warmup, total = warmup_steps(task.config), task.config.run.max_train_steps
    rest = "encoder and decoder" if trains_encoder(task.config) else "decoder"
    frozen = "" if trains_encoder(task.config) else ", encoder frozen"
    if warmup >= total:
        return "only the quantiser and its convolutions learn"
    if warmup == 0:
        return f"quantiser and {rest} learn{frozen}"
    return f"the quantiser learns, and after update {warmup:,} also the {rest}{frozen}"


def _bottleneck(task: "AutoencoderTask") -> str:
    if (codes := calls.codes(task.net)) is None:
        return f"d = {task.config.model.latent_channels}{_posterior(task)}"
    levels = f", {codes.levels} for each position" if codes.levels > 1 else ""
    return f"K = {codes.number:,} codes of {codes.channels} channels{levels}"


def _posterior(task: "AutoencoderTask") -> str:
    logvar = getattr(task.config.model, "posterior_logvar", None)
    flow = getattr(task.config.model, "posterior_flow", 0)
    fixed = "" if logvar is None else f", log-variance {logvar:g}"
    if not flow:
        return fixed
    bottleneck: Any = task.wrapper.bottleneck
    prior = f"{_millions(bottleneck)} M parameters"
    return f"{fixed}, the prior is a flow of {flow} layers ({prior}, not exported)"


def _latent(task: "AutoencoderTask") -> str:
    f, d = task.config.model.f, task.config.model.latent_channels
    rows, columns = (side // f for side in task.config.data.size)
    if (codes := calls.codes(task.net)) is not None:
        tokens = rows * columns * codes.levels
        bpp = tokens * math.log2(codes.number) / math.prod(task.config.data.size)
        return f"{tokens} tokens per image, {bpp:.4g} raw bits per pixel"
    ratio = task.config.data.image_channels * f**2 / d
    return f"{d} x {rows} x {columns} per image, {ratio:g} times fewer values than the image"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}" if size[0] == size[1] else f"{size[0]} x {size[1]}"


def _pixels(task: "AutoencoderTask") -> str:
    data = task.config.data
    kind = {1: ", grey", 3: "", 4: ", RGBA"}[data.image_channels]
    if data.value_range is None:
        return kind
    return f"{kind}, {data.value_range[0]:g} to {data.value_range[1]:g}"


def _count(task: "AutoencoderTask") -> str:
    images = task.train_images
    if not isinstance(images, ImageStream):
        return f"{len(images):,}"
    known = f" of {images.num_images:,}" if images.num_images else ""
    return f"a stream{known}"


def _objective(task: "AutoencoderTask") -> str:
    options = task.config.objective
    rec = task.config.model.pixel_likelihood or options.rec_loss
    learned = ", learned log-variance" if options.learn_logvar else ""
    return task.objective.formula(rec=rec, lpips=f"LPIPS-{options.lpips_net}") + learned


def _features(task: "AutoencoderTask") -> dict[str, str]:
    if (loss := task.features) is None:
        return {}
    kind = f"{type(loss.network).__name__}, {_millions(loss.network)} M parameters, frozen"
    return {"features": f"{kind}, {loss.num_layers} layers are compared"}


def _discriminator(task: "AutoencoderTask") -> str:
    if task.discriminator is None:
        return "none"
    start, total = task.progress.discriminator_start, task.config.run.max_train_steps
    if start >= total:
        return f"never: it would start after update {start:,}, and the run has {total:,} updates"
    alone = task.config.discriminator.disc_warmup_steps
    full = start + alone + task.config.discriminator.disc_ramp_steps
    kind = f"{type(task.discriminator).__name__}, {_millions(task.discriminator)} M parameters"
    return (
        f"{kind}, starts after update {start:,}, "
        f"{f'learns alone for {alone:,} updates, ' if alone else ''}"
        f"full weight {task.config.discriminator.disc_scale:g} after update {full:,}"
    )


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}"
