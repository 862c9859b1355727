"""The plot and the table of the trainings that learning.py compares."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

METRICS = {"psnr": "PSNR (dB), higher is better", "lpips_alex": "LPIPS (alex), lower is better"}


def plot(runs: Sequence[Any], path: Path) -> None:
    """Draw PSNR and LPIPS against minutes: a colour for each recipe, a line for each seed."""
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=120)
    names = list(dict.fromkeys(entry["recipe"] for entry in runs))
    for axes, (metric, label) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
        for entry in runs:
            number = names.index(entry["recipe"])
            first = entry is next(other for other in runs if other["recipe"] == entry["recipe"])
            minutes, values = zip(*((p["minutes"], p[metric]) for p in entry["curve"]), strict=True)
            own = f" {entry['recipe']}" if first else None
            axes.plot(minutes, values, marker=".", color=f"C{number}", label=own)
        axes.set(xlabel="minutes", ylabel=label)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    figure.savefig(path)


def table(runs: Sequence[Any]) -> Table:
    """Return a table of the last point of every run, and the mean over the seeds of a recipe."""
    shown = Table(title="measurements at the end of each training, on the unseen images")
    columns = ("recipe", "seed", "updates", "minutes", "PSNR (dB)", "SSIM", "LPIPS alex")
    for column in (*columns, "LPIPS vgg"):
        shown.add_column(column)
    for name in dict.fromkeys(entry["recipe"] for entry in runs):
        ends = [(entry["seed"], entry["curve"][-1]) for entry in runs if entry["recipe"] == name]
        rows = [(str(seed), end) for seed, end in ends]
        if len(ends) > 1:
            keys = ("update", "minutes", "psnr", "ssim", "lpips_alex", "lpips_vgg")
            rows.append(("mean", {key: mean(end[key] for _, end in ends) for key in keys}))
        for seed, end in rows:
            metrics = [f"{end[name]:.3f}" for name in ("ssim", "lpips_alex", "lpips_vgg")]
            numbers = [f"{end['psnr']:.2f}", *metrics]
            updates = f"{end['update']:,.0f}"
            shown.add_row(name, seed, updates, f"{end['minutes']:.1f}", *numbers)
    return shown
