"""From a run to its export: averaged weights, measured statistics, the card, and the proof that
diffusers loads the same model."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from latentvae.compute.compilation import not_compiled
from latentvae.config.autoencoder import TrainConfig, flat
from latentvae.data import ImageSource, ImageStream, some_of, validation_batches
from latentvae.distributed import barrier, is_main, rank, world_size
from latentvae.engine.checkpoint import load_checkpoint, newest_usable, update_of
from latentvae.engine.log import append_row, read_rows
from latentvae.engine.publishing import check_push, push_export, repository
from latentvae.engine.randomness import Stream, seed_everything
from latentvae.errors import UserError
from latentvae.export import (
    ExportReport,
    ModelCard,
    TokenizerReport,
    export_autoencoder,
    export_tokenizer,
)
from latentvae.export.card import public_value
from latentvae.export.diffusers import is_export
from latentvae.latents import latent_statistics
from latentvae.models import DiscreteAutoencoder
from latentvae.options import Private, marked
from latentvae.tasks.autoencoder.base import Base, encoder_sha256, read_base
from latentvae.tasks.autoencoder.run import Run, build_net, eval_transform, open_data
from latentvae.tasks.autoencoder.state import load_weights, read_config
from latentvae.tasks.autoencoder.validate import readable_images, sample_grid_path

STATISTICS_IMAGES = 1024
PROBE_IMAGES = 2


@contextlib.contextmanager
def averaged_weights(net: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Put the averaged weights into ``net`` for a while, in eval mode and not compiled. Its
    buffers, as a codebook of moving averages, are averages already."""
    training = [module for module in net.modules() if module.training]
    parameters = list(net.parameters())
    net.eval()
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    try:
        with not_compiled():
            yield
    finally:
        if ema is not None:
            ema.restore(parameters)
        for module in training:
            module.training = True


def is_exported(folder: Path, update: int, *, config: TrainConfig) -> bool:
    """Whether the run's export is there and was made after that update, by the same options; of
    those, older logs tell nothing."""
    made = [row for row in read_rows(folder / "log.jsonl") if "export/scaling" in row]
    wanted = {"update": update} | _export_options(config)
    same = made and all(made[-1].get(name, value) == value for name, value in wanted.items())
    return bool(same) and is_export(folder / "export")


def _export_options(config: TrainConfig) -> dict[str, Any]:
    """What changes an export of the same weights, for the log."""
    options = config.run
    return {
        "export/profile": options.export_profile,
        "export/lookup_from_codebook": options.lookup_from_codebook,
    }


def export_run(run: Run, *, update: int) -> Path:
    """Export a run in hand, on all ranks; rank 0 writes."""
    with averaged_weights(run.net, run.ema):
        report = _export(
            run.net,
            run.config,
            data=(run.train_images, run.validation_images),
            card=_card(run.config, run.folder, update),
            out=run.folder / "export",
            device=run.accelerator.device,
            base=run.base,
        )
    if report is not None:
        row = {"update": update, "export/scaling": report.scaling_factor}
        row |= _export_options(run.config)
        append_row(run.folder / "log.jsonl", row)
    return run.folder / "export"


def export_folder(
    folder: Path,
    *,
    out: Path,
    overwrite: bool = False,
    lookup_from_codebook: bool = False,
    push_to_hub: bool = False,
    hub_model_id: str | None = None,
    hub_private_repo: bool = False,
) -> None:
    """Export the newest usable checkpoint of the run in ``folder``; its images must still be there.

    Args:
        lookup_from_codebook: for aMUSEd, as does a run that was started so.
        push_to_hub: upload it too, to ``hub_model_id`` or under the run's name.

    Raises:
        UserError: not a run, no checkpoint, or ``out`` is there and ``overwrite`` is not set.
        UploadError: it is exported, but the Hub did not take it.
    """
    config = read_config(folder / "config.yaml")
    if lookup_from_codebook:
        if config.model.architecture != "vq":
            kind = config.model.architecture
            raise UserError(
                f"lookup_from_codebook is for tokenizers, and '{folder}' is a run of {kind}"
            )
        config.run.lookup_from_codebook = True
    config.run.push_to_hub, config.run.hub_model_id = push_to_hub, hub_model_id
    if push_to_hub:
        check_push(repository(hub_model_id, folder), private=hub_private_repo)
    if out.exists() and not overwrite:
        raise UserError(f"'{out}' exists; give another folder or --overwrite")
    checkpoint, faults = newest_usable(folder)
    if checkpoint is None:
        reasons = "".join(f"; {fault}" for fault in faults)
        raise UserError(f"'{folder}' has no checkpoint that can be used{reasons}")
    base, update = read_base(folder, config.model.architecture), update_of(checkpoint)
    net = build_net(config, base)
    load_weights(net, _weights(checkpoint))
    net.eval()
    _export(
        net,
        config,
        data=open_data(config),
        card=_card(config, folder, update),
        out=out,
        device=torch.device("cpu"),
        base=base,
    )
    if push_to_hub:
        repo_id = repository(hub_model_id, folder)
        push_export(out, repo_id=repo_id, private=hub_private_repo, update=update)


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, averaged where there is an average."""
    tensors, prefix = load_checkpoint(checkpoint).tensors, "net."
    trained = {
        k.removeprefix(prefix): v for k, v in tensors.get("model", {}).items() if prefix in k
    }
    return trained | tensors.get("ema", {})


def _export(
    net: Any,
    config: TrainConfig,
    *,
    data: tuple[ImageSource | ImageStream, ImageSource],
    card: ModelCard,
    out: Path,
    device: torch.device,
    base: Base | None,
) -> ExportReport | TokenizerReport | None:
    """Measure on all ranks, write on the first, which has the report."""
    if base is not None:
        card = _fine_tuned(card, net, config, base)
    transform = eval_transform(config)
    seed_everything(Stream.EXPORT, config.run.seed, rank())
    shard = validation_batches(
        some_of(data[1] if isinstance(data[0], ImageStream) else data[0], STATISTICS_IMAGES),
        transform,
        batch_size=config.run.eval_batch_size,
        rank=rank(),
        world_size=world_size(),
    )
    statistics = latent_statistics(net, (images.to(device) for images, _ in shard)).joined()
    report = None
    if is_main():
        probe = readable_images(data[1], transform, count=PROBE_IMAGES)
        if isinstance(net, DiscreteAutoencoder):
            report = export_tokenizer(
                net,
                out,
                statistics=statistics,
                resolution=_sample_size(config, base),
                probe=probe,
                card=card,
                frozen_encoder=config.model.freeze_encoder,
                lookup_from_codebook=config.run.lookup_from_codebook,
                overwrite=True,
            )
        else:
            report = export_autoencoder(
                net,
                out,
                statistics=statistics,
                sample_size=_sample_size(config, base),
                frozen_encoder=config.model.freeze_encoder,
                probe=probe,
                profile=config.run.export_profile,
                card=card,
                overwrite=True,
            )
        print(report.summary())
    barrier()
    return report


def _sample_size(config: TrainConfig, base: Base | None) -> int:
    """Tiling goes by it: a base that was trained on larger images keeps its own."""
    own = 0 if base is None else base.net.config.get("sample_size", 0)
    return max(*config.data.size, own if isinstance(own, int) else max(own))


def _fine_tuned(card: ModelCard, net: Any, config: TrainConfig, base: Base) -> ModelCard:
    """What is certified of a base's encoder.

    Raises:
        RuntimeError: the encoder was to stay as it was, and did not.
    """
    name = public_value(base.name)
    card = replace(card, base_model=base.hub_id)
    if not config.model.freeze_encoder:
        return replace(card, description=f"Fine-tuned from {name}.")
    if encoder_sha256(net) != base.encoder_sha256:
        raise RuntimeError(f"the encoder was frozen, but is no longer that of {base.name}")
    description = (
        f"The decoder of {name}, fine-tuned. The encoder is bit for bit that of the base "
        f"(sha256 of its weights {base.encoder_sha256}), scaling and shift are kept: latents and "
        "what generates them stay valid."
    )
    return replace(card, description=description)


def _card(config: TrainConfig, folder: Path, update: int) -> ModelCard:
    """What the run knows of itself after an update, for the model card."""
    rows = read_rows(folder / "log.jsonl")
    row = next((r for r in rows if r["update"] == update and "validation/psnr" in r), {})
    names = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": f"LPIPS ({config.objective.lpips_net})"}
    tokens = f"by {row.get('validation/tokens', 0):,} tokens"
    names |= {"usage": f"share of the codes used {tokens}", "perplexity": "perplexity of the codes"}
    metrics = {n: row[f"validation/{k}"] for k, n in names.items() if f"validation/{k}" in row}
    mode = "posterior mode, " if config.model.architecture in ("kl", "asymmetric") else ""
    weights = "averaged weights" if config.optimizer.use_ema else "trained weights"
    height, width = config.data.size
    size = (
        f"shorter side resized to {height} px"
        if height == width
        else f"resized to cover {height} x {width} px (height x width)"
    )
    protocol = (
        f"Means over {row['validation/images']:,} unseen images after update {update:,}: {size} "
        f"({config.data.image_interpolation_mode}), "
        f"centre crop, {mode}{weights}, rounded to 8 bits where the images are of 8 bits."
        if row
        else ""
    )
    grid, private = sample_grid_path(folder, update), marked(TrainConfig, Private)
    data_set, repo_id = config.data.dataset_name, config.run.hub_model_id
    return ModelCard(
        name=folder.resolve().name,
        resolution=" x ".join(map(str, dict.fromkeys(config.data.size))),
        dataset=None if data_set is None or Path(data_set).exists() else data_set,
        metrics=metrics,
        protocol=protocol,
        sample_grid=grid if grid.is_file() else None,
        location=repo_id if config.run.push_to_hub and repo_id else ModelCard.location,
        training={name: v for name, v in flat(config).items() if name not in private},
    )
