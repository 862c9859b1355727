"""From a run to its export: averaged weights, measured statistics, the card, and the proof that
diffusers loads the same model."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel

from latentvae.data import ImageSource, validation_batches
from latentvae.distributed import barrier, is_main, rank, world_size
from latentvae.errors import UserError
from latentvae.export import ModelCard, export_autoencoder
from latentvae.latents import latent_statistics
from latentvae.training.checkpoint import load_checkpoint, newest_usable
from latentvae.training.config import TrainConfig, flat
from latentvae.training.randomness import seed_everything
from latentvae.training.run import Run, build_net, eval_transform, open_data
from latentvae.training.state import read_config
from latentvae.training.validate import First

STATISTICS_IMAGES = 1024
PROBE_IMAGES = 2
CARD_METRICS = {
    "validation/psnr": "PSNR (dB)",
    "validation/ssim": "SSIM",
    "validation/lpips": "LPIPS",
}


@contextlib.contextmanager
def averaged_weights(net: AutoencoderKL, ema: EMAModel | None) -> Iterator[None]:
    """Put the averaged weights into ``net`` for a while."""
    if ema is None:
        yield
        return
    parameters = list(net.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def export_run(run: Run) -> Path:
    """Export a run in hand, on all ranks; rank 0 writes."""
    out = run.folder / "export"
    with averaged_weights(run.net, run.ema):
        _export(
            run.net,
            run.config,
            data=(run.train_images, run.validation_images),
            folder=run.folder,
            out=out,
            device=run.accelerator.device,
        )
    return out


def export_folder(folder: Path, *, out: Path, overwrite: bool = False) -> None:
    """Export the newest usable checkpoint of the run in ``folder``; its images must still be there.

    Raises:
        UserError: not a run, no checkpoint, or ``out`` holds something and ``overwrite`` is not
            set.
    """
    config = read_config(folder / "config.yaml")
    if out.exists() and not overwrite:
        raise UserError(f"'{out}' exists; give another folder or --overwrite")
    checkpoint, faults = newest_usable(folder)
    if checkpoint is None:
        raise UserError(
            f"'{folder}' has no checkpoint that can be "
            f"used{'; ' + '; '.join(faults) if faults else ''}"
        )
    tensors = load_checkpoint(checkpoint).tensors
    net = build_net(config)
    prefix = "net."
    weights = tensors.get("ema") or {
        name.removeprefix(prefix): value
        for name, value in tensors["model"].items()
        if name.startswith(prefix)
    }
    net.load_state_dict(weights)
    _export(net, config, data=open_data(config), folder=folder, out=out, device=torch.device("cpu"))


def _export(
    net: AutoencoderKL,
    config: TrainConfig,
    *,
    data: tuple[ImageSource, ImageSource],
    folder: Path,
    out: Path,
    device: torch.device,
) -> None:
    batch = config.run.eval_batch_size
    transform = eval_transform(config)
    seed_everything(config.run.seed, rank())
    shard = validation_batches(
        First(data[0], STATISTICS_IMAGES),
        transform,
        batch_size=batch,
        rank=rank(),
        world_size=world_size(),
    )
    statistics = latent_statistics(net, (images.to(device) for images, _ in shard)).joined()
    if is_main():
        probe, _ = next(
            validation_batches(First(data[1], PROBE_IMAGES), transform, batch_size=PROBE_IMAGES)
        )
        report = export_autoencoder(
            net,
            out,
            statistics=statistics,
            sample_size=config.data.resolution,
            probe=probe,
            profile=config.run.export_profile,
            card=_card(config, folder),
            overwrite=True,
        )
        print(report.summary())
    barrier()


def _card(config: TrainConfig, folder: Path) -> ModelCard:
    """What the run knows of itself for the model card."""
    grids = sorted((folder / "samples").glob("update-*.png"))
    row = _last_validation(folder / "log.jsonl")
    metrics = {name: row[key] for key, name in CARD_METRICS.items() if key in row}
    protocol = (
        f"Measured on {row['validation/images']:.0f} unseen images after update "
        f"{row['update']:,}: shorter side resized to {config.data.resolution} px "
        f"({config.data.image_interpolation_mode}), centre crop, posterior mode, "
        "averaged weights, rounded to 8 bits; means over images."
        if row
        else ""
    )
    return ModelCard(
        name=folder.name,
        metrics=metrics,
        protocol=protocol,
        sample_grid=grids[-1] if grids else None,
        training=flat(config),
    )


def _last_validation(log: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    rows = [row for row in rows if "validation/psnr" in row]
    return rows[-1] if rows else {}
