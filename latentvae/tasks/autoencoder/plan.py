"""What a run is about to do, said before its first update."""

import math
import os

import torch
from torch import nn

from latentvae.data import ImageStream
from latentvae.models.calls import num_codes, num_levels
from latentvae.tasks.autoencoder.run import Run, latent_weights


def plan(run: Run, *, steps_per_epoch: int | None, start: int) -> str:
    """A table of the facts that decide what the run costs and gives.

    Args:
        steps_per_epoch: micro-steps in which every training image comes once; None if unknown.
        start: updates done already.
    """
    rows = {
        "model": _model(run),
        "latent": _latent(run),
        "images": (
            f"{_count(run)} to train, {len(run.validation_images):,} to validate, "
            f"at {_size(run.config.data.size)} px{_pixels(run)}"
        ),
        "batch": _batch(run),
        "updates": _updates(run, steps_per_epoch, start),
        "learning rate": _learning_rate(run),
        "objective": _objective(run),
        "critic": _critic(run),
        "precision": _precision(run),
        "folder": str(run.folder),
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def _model(run: Run) -> str:
    model = run.config.model
    size = _millions(run.net)
    kind = f"{type(run.net).__name__}, {size} M parameters, f = {model.f}, {_bottleneck(run)}"
    if run.base is None:
        return kind
    frozen = ", encoder frozen" if model.freeze_encoder else ""
    return f"{kind}, fine-tuned from {run.base.name}{frozen}"


def _bottleneck(run: Run) -> str:
    if (codes := num_codes(run.net)) is None:
        return f"d = {run.config.model.latent_channels}"
    levels = num_levels(run.net)
    return f"K = {codes:,} codes of {run.net.quantize.code_channels} channels" + (
        f", {levels} for each position" if levels > 1 else ""
    )


def _latent(run: Run) -> str:
    f, d = run.config.model.f, run.config.model.latent_channels
    rows, columns = (side // f for side in run.config.data.size)
    if (codes := num_codes(run.net)) is not None:
        tokens = rows * columns * num_levels(run.net)
        bpp = tokens * math.log2(codes) / math.prod(run.config.data.size)
        return f"{tokens} tokens per image, {bpp:.4g} raw bits per pixel"
    ratio = run.config.data.image_channels * f**2 / d
    return f"{d} x {rows} x {columns} per image, {ratio:g} times fewer numbers than pixels"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}" if size[0] == size[1] else f"{size[0]} x {size[1]}"


def _pixels(run: Run) -> str:
    data = run.config.data
    kind = {1: ", grey", 3: "", 4: ", RGBA"}[data.image_channels]
    if data.value_range is None:
        return kind
    return f"{kind}, {data.value_range[0]:g} to {data.value_range[1]:g}"


def _batch(run: Run) -> str:
    options, processes = run.config.run, run.accelerator.num_processes
    return (
        f"{run.images_per_update} = {options.train_batch_size} images x "
        f"{options.gradient_accumulation_steps} micro-steps x {processes} processes"
    )


def _count(run: Run) -> str:
    images = run.train_images
    if not isinstance(images, ImageStream):
        return f"{len(images):,}"
    known = f" of {images.num_images:,}" if images.num_images else ""
    return f"a stream{known}"


def _updates(run: Run, steps_per_epoch: int | None, start: int) -> str:
    options = run.config.run
    resumed = f", from {start:,} on" if start else ""
    if steps_per_epoch is None:
        return f"{options.max_train_steps:,}{resumed}"
    epochs = options.max_train_steps * options.gradient_accumulation_steps / steps_per_epoch
    images = steps_per_epoch * run.config.images_read * run.accelerator.num_processes
    return f"{options.max_train_steps:,} ({epochs:,.1f} epochs of {images:,} images){resumed}"


def _learning_rate(run: Run) -> str:
    options = run.config.optimizer
    warmup = f"{options.lr_warmup_steps:,} updates of warm-up"
    return f"{options.learning_rate:g}, {options.lr_scheduler} after {warmup}"


def _objective(run: Run) -> str:
    options = run.config.objective
    scale, net = options.perceptual_scale, options.lpips_net
    lpips = f" + {scale:g} LPIPS-{net}" if scale else ""
    rec = getattr(run.config.model, "likelihood", None) or options.rec_loss
    learned = ", learned log-variance" if options.learn_logvar else ""
    return f"{rec}{lpips}{_latent_terms(run)}{learned}"


def _latent_terms(run: Run) -> str:
    terms = [
        f" + {w:g} {name.replace('_', ' ')}" for name, w in latent_weights(run.config).items() if w
    ]
    if run.config.model.has_kl:
        options = run.config.objective
        held = f"{options.kl_target:g} bits per latent element" if options.kl_target else ""
        held = held or (f"a pixel loss of {options.rec_target:g}" if options.rec_target else "")
        moves = f", its weight moving to hold {held}" if held else ""
        terms.append(f" + {options.kl_scale:g} KL{moves}")
    return "".join(terms).replace("+ -", "- ")


def _critic(run: Run) -> str:
    if run.critic is None:
        return "none"
    start, total = run.config.critic_start, run.config.run.max_train_steps
    if start >= total:
        return f"never: it would start after update {start:,}, and the run has {total:,}"
    alone = run.config.critic.disc_warmup_steps
    full = start + alone + run.config.critic.disc_ramp_steps
    kind = f"{type(run.critic).__name__}, {_millions(run.critic)} M parameters"
    return (
        f"{kind}, starts after update {start:,}, "
        f"{f'learns alone for {alone:,}, ' if alone else ''}"
        f"full weight {run.config.critic.disc_scale:g} after {full:,}"
    )


def _precision(run: Run) -> str:
    kind, device = run.accelerator.mixed_precision, run.accelerator.device
    precision = "float32" if kind == "no" else f"{kind} over float32 weights"
    return f"{precision} on {device}{_threads(run) if device.type == 'cpu' else ''}"


def _threads(run: Run) -> str:
    """Launchers give each process one thread unless told otherwise, which few know."""
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    told = f", {threads} thread{'s' if threads > 1 else ''} per process"
    if threads * run.accelerator.num_processes < cores:
        told += f" of {cores} cores (more: accelerate launch --num_cpu_threads_per_process N)"
    return told


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}"
