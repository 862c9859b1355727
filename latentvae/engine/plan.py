"""Make the table of facts (the plan) that a run prints before its first update."""

import os

import torch

from latentvae.engine.training import Training


def plan(training: Training) -> str:
    """Return a table of the facts that decide the cost and the result of the run, as text."""
    rows = {
        **training.task.plan(),
        "batch": _batch(training),
        "updates": _updates(training),
        "learning rate": _learning_rate(training),
        "precision": _precision(training),
        "folder": str(training.folder),
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def warnings(training: Training) -> list[str]:
    """Return a warning for each option that has less effect than a user may expect."""
    found, total = [], training.config.run.max_train_steps
    name = next(iter(training.task.learners))
    pause, warmup = training.task.pause(name), training.config.optimizer.lr_warmup_steps
    end = warmup + (len(pause) if pause.start < warmup else 0)
    if end > total:
        found.append(
            f"lr_warmup_steps {warmup:,} ends at update {end:,}, but the run has {total:,}: the "
            "learning rate never reaches its full value. Give a share such as 0.1."
        )
    device, precision = training.accelerator.device, training.accelerator.mixed_precision
    if device.type == "cuda" and precision == "bf16" and _emulates_bf16(device):
        found.append(
            f"mixed_precision bf16 is emulated on {torch.cuda.get_device_name(device)}, which is "
            "slower than float32. Give --mixed_precision no."
        )
    return [*found, *training.task.warnings()]


def _emulates_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return not torch.cuda.is_bf16_supported(including_emulation=False)


def _batch(training: Training) -> str:
    options, processes = training.config.run, training.accelerator.num_processes
    return (
        f"{training.items_per_update} = {options.train_batch_size} {training.task.unit} x "
        f"{options.gradient_accumulation_steps} micro-steps x {processes} processes"
    )


def _updates(training: Training) -> str:
    options, task, start = training.config.run, training.task, training.progress.update
    resumed = f", from {start:,} on" if start else ""
    if task.steps_per_epoch is None:
        return f"{options.max_train_steps:,}{resumed}"
    steps = options.max_train_steps * options.gradient_accumulation_steps
    items = task.steps_per_epoch * task.items_read * training.accelerator.num_processes
    epochs = f"{steps / task.steps_per_epoch:,.1f} epochs of {items:,} {task.unit}"
    return f"{options.max_train_steps:,} ({epochs}){resumed}"


def _learning_rate(training: Training) -> str:
    options = training.config.optimizer
    warmup = f"{options.lr_warmup_steps:,} updates of warm-up"
    return f"{options.learning_rate:g}, {options.lr_scheduler} after {warmup}"


def _precision(training: Training) -> str:
    kind, device = training.accelerator.mixed_precision, training.accelerator.device
    precision = "float32" if kind == "no" else f"{kind} over float32 weights"
    return f"{precision} on {device}{_threads(training) if device.type == 'cpu' else ''}"


def _threads(training: Training) -> str:
    """Return text with the number of threads of each process.

    By default, launchers give each of several processes only one thread.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    text = f", {threads} thread{'s' if threads > 1 else ''} per process"
    if threads * training.accelerator.num_processes < cores:
        text += f" of {cores} cores (more: accelerate launch --num_cpu_threads_per_process N)"
    return text
