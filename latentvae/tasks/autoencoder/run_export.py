"""Export a trained autoencoder: measure latents, write a model card, and load the export."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from latentvae.config.run_config import flat
from latentvae.data import ImageSource, ImageStream, some_of, validation_batches
from latentvae.distributed import barrier, is_main, rank, world_size
from latentvae.engine.checkpoint_content import averaged_or_trained, load_weights
from latentvae.engine.checkpoint_files import load_checkpoint, newest_usable, update_of
from latentvae.engine.log import read_rows, sample_path
from latentvae.engine.publishing import check_push, push_export, repository
from latentvae.engine.randomness import Stream, seed_everything
from latentvae.engine.resume import read_config
from latentvae.errors import UserError
from latentvae.export import ModelCard, export_network
from latentvae.export.card import public_value
from latentvae.export.export_folder import is_export
from latentvae.latents import latent_statistics
from latentvae.models import FAMILIES, Network
from latentvae.models.low_rank import adapter_tensors, merged
from latentvae.option_marks import Private, marked
from latentvae.tasks.autoencoder.build_parts import adapt_decoder, build_net
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.fine_tuning import Base, encoder_sha256, read_base, weights_sha256
from latentvae.tasks.autoencoder.images import eval_transform, open_data
from latentvae.tasks.autoencoder.reach import LEAST_VALIDATION_IMAGES
from latentvae.tasks.autoencoder.validate import readable_images

STATISTICS_IMAGES = 1024
PROBE_IMAGES = 2


def is_whole(out: Path) -> bool:
    """Return whether a folder holds an export, see `is_export`."""
    return is_export(out)


def done(out: Path) -> str:
    """Return the line that a run prints at its end, which says how to load its export."""
    kind = json.loads((out / "config.json").read_text(encoding="utf-8"))["_class_name"]
    module = "diffusers" if hasattr(diffusers, kind) else "latentvae.models"
    return f"done: {out} loads with {module}.{kind}.from_pretrained('{out}')"


def options_of_export(config: TrainConfig) -> dict[str, Any]:
    """Return the options that change the exported files but not the weights, for the log."""
    options = config.run
    return {
        "export/profile": options.export_profile,
        "export/lookup_from_codebook": options.lookup_from_codebook,
    }


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
    """Export the newest usable checkpoint of a run.

    The run's images must still exist, because the export measures their latents.

    Args:
        folder: the run's folder.
        out: the export's folder.
        overwrite: replace an existing `out`.
        lookup_from_codebook: export for diffusers' aMUSEd pipeline, as a run with the option
            `lookup_from_codebook` does.
        push_to_hub: also upload the export to the Hugging Face Hub.
        hub_model_id: repository, owner/name. By default, the repository is named like the run's
            folder.
        hub_private_repo: make a new repository private.

    Raises:
        UserError: `folder` is not a run or has no usable checkpoint, `out` exists and `overwrite`
            is off, `lookup_from_codebook` is set for a run without codes, or the upload is sure to
            fail.
        UploadError: the upload failed. The export in `out` is complete.
    """
    # options
    config = read_config(folder / "config.yaml", TrainConfig)
    if lookup_from_codebook:
        if not config.model.has_codes:
            kind = config.model.architecture
            raise UserError(
                f"lookup_from_codebook needs a tokenizer, but '{folder}' is a run of {kind}"
            )
        config.run.lookup_from_codebook = True
    config.run.push_to_hub, config.run.hub_model_id = push_to_hub, hub_model_id
    if push_to_hub:
        check_push(repository(hub_model_id, folder), private=hub_private_repo)
    if out.exists() and not overwrite:
        raise UserError(f"'{out}' exists. Give another folder, or --overwrite.")

    # weights
    checkpoint, faults = newest_usable(folder)
    if checkpoint is None:
        reasons = "".join(f". {fault}" for fault in faults)
        raise UserError(f"'{folder}' has no checkpoint that can be used{reasons}")
    base, update = read_base(folder, config.model.architecture), update_of(checkpoint)
    net = checkpoint_network(config, checkpoint, base=base)

    # export
    train, validation = open_data(config)
    export_of_run(
        net,
        config,
        images=(validation if isinstance(train, ImageStream) else train, validation),
        update=update,
        folder=folder,
        out=out,
        device=torch.device("cpu"),
        base=base,
    )

    # upload
    if push_to_hub:
        repo_id = repository(hub_model_id, folder)
        message = f"Autoencoder after update {update:,}"
        push_export(out, repo_id=repo_id, private=hub_private_repo, message=message)


def checkpoint_network(config: TrainConfig, checkpoint: Path, *, base: Base | None) -> Network:
    """Return the network of a run with the weights of a checkpoint, in eval mode.

    If the run averages its weights (`use_ema`), the averaged weights are used.

    Args:
        config: the run's options.
        checkpoint: the checkpoint's folder.
        base: the pretrained network of a fine-tuning, or None.

    Raises:
        UserError: the checkpoint cannot be used.
    """
    net = build_net(config, base)
    adapt_decoder(config, net)
    load_weights(net, _weights(checkpoint, averaged=config.optimizer.use_ema))
    return net.eval()


def _weights(checkpoint: Path, *, averaged: bool) -> dict[str, torch.Tensor]:
    """Return the network's weights in a checkpoint, or with `averaged` their moving averages."""
    tensors, prefix = load_checkpoint(checkpoint).tensors, "net."
    if averaged and "model_average" not in tensors:
        raise UserError(
            f"checkpoint '{checkpoint}' has no model_average.safetensors, but the run averages its "
            "weights (use_ema). Another version of latentvae wrote this checkpoint."
        )
    weights = averaged_or_trained(tensors, "model")
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def export_of_run(
    net: Network,
    config: TrainConfig,
    *,
    images: tuple[ImageSource, ImageSource],
    update: int,
    folder: Path,
    out: Path,
    device: torch.device,
    base: Base | None,
) -> dict[str, Any]:
    """Measure the latents on all ranks, and write the export on the first rank.

    Args:
        net: the network with the weights to export, in eval mode.
        config: the run's options.
        images: two sources of images. The first source gives the statistics of the latents.
            Images of the second source are used to compare the network with the loaded export.
        update: number of updates done.
        folder: the run's folder.
        out: the export's folder.
        device: device on which the measurements are computed.
        base: the pretrained network of a fine-tuning, or None.

    Returns:
        Values to log on the first rank.
    """
    # adapters
    adapted = adapter_tensors(net)
    net = merged(net) if adapted else net

    # the card
    card = _card(config, folder, update)
    if base is not None:
        card = _fine_tuned(card, net, config, base)
        if base.whole and (compared := compared_with_base(folder, update)):
            card = replace(card, protocol=f"{card.protocol} {compared}")
            if is_main():
                print(compared)

    # latent statistics
    FAMILIES[config.model.architecture].write_constants(net, config.model)
    transform = eval_transform(config)
    if is_main():
        count = min(len(images[0]), STATISTICS_IMAGES)
        print(f"export: measuring the latents of {count:,} images", flush=True)
    seed_everything(Stream.EXPORT, config.run.seed, rank())
    shard = validation_batches(
        some_of(images[0], STATISTICS_IMAGES),
        transform,
        batch_size=config.run.eval_batch_size,
        rank=rank(),
        world_size=world_size(),
    )
    statistics = latent_statistics(net, (batch.to(device) for batch, _ in shard)).joined()

    # the folder
    report = None
    if is_main():
        print(f"export: writing {out} and comparing it with the network", flush=True)
        probe = readable_images(images[1], transform, count=PROBE_IMAGES)

        report = export_network(
            net,
            out,
            statistics=statistics,
            sample_size=_sample_size(config, base),
            probe=probe,
            profile=config.run.export_profile,
            card=card,
            frozen_encoder=config.model.freeze_encoder,
            lookup_from_codebook=config.run.lookup_from_codebook,
            overwrite=True,
        )
        print(report.summary())
        if adapted:
            write_adapters(adapted, out / "lora")

    barrier()
    return {} if report is None else {"export/scaling": report.scaling_factor}


def write_adapters(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write low-rank adapters as a file that PEFT and diffusers load onto the pretrained network.

    This call loads the adapters:

        vae.load_lora_adapter("export/lora", prefix=None, use_safetensors=True)
    """
    folder.mkdir()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})


def _sample_size(config: TrainConfig, base: Base | None) -> int:
    """Return the `sample_size` of the export's config, from which diffusers computes tile sizes.

    If the pretrained network has a larger value, that value is kept.
    """
    own = 0 if base is None else base.net.config.get("sample_size", 0)
    return max(*config.data.size, own if isinstance(own, int) else max(own))


def _fine_tuned(card: ModelCard, net: Network, config: TrainConfig, base: Base) -> ModelCard:
    """Name the pretrained network in the model card. Check that a frozen encoder is unchanged.

    Raises:
        RuntimeError: the encoder was frozen, but its weights have changed.
    """
    name = public_value(base.name)
    if base.whole and weights_sha256(net) == base.weights_sha256:
        return replace(
            card, description=f"The unchanged weights of {name}: no training changed them."
        )

    card = replace(card, base_model=base.hub_id)
    if base.discretised:
        return replace(card, description=f"A tokenizer, discretised from {name}.")
    if not config.model.freeze_encoder:
        return replace(card, description=f"Fine-tuned from {name}.")
    if encoder_sha256(net) != base.encoder_sha256:
        raise RuntimeError(f"the encoder was frozen, but differs from the encoder of {base.name}")
    description = (
        f"The decoder of {name}, fine-tuned. The encoder is bit for bit that of the pretrained "
        f"network (sha256 of the encoder's weights {base.encoder_sha256}). Scaling and shift of "
        "the latents are unchanged. Existing latents, and models that generate latents, stay valid."
    )
    if rank := config.low_rank:
        description += (
            f" The folder `lora` holds the same change as adapters of rank {rank}. "
            '`vae.load_lora_adapter("lora", prefix=None, use_safetensors=True)` adds the adapters '
            "to the pretrained network, and needs the package peft."
        )
    return replace(card, description=description)


def compared_with_base(folder: Path, update: int) -> str:
    """Return text with the metrics before and after a fine-tuning, or "" if metrics are missing.

    The metrics before the fine-tuning come from the validation before the first update. The result
    is also "" if the two validations have different numbers of images.
    """
    rows = [row for row in read_rows(folder / "log.jsonl") if "validation/psnr" in row]
    first = next((row for row in rows if row["update"] == 0), None)
    last = next((row for row in rows if row["update"] == update), None)
    if first is None or last is None or first["validation/images"] != last["validation/images"]:
        return ""
    parts = [
        f"{name} {first[key]:.{digits}f} to {last[key]:.{digits}f} "
        f"({last[key] - first[key]:+.{digits}f}{unit})"
        for name, key, digits, unit in (
            ("PSNR", "validation/psnr", 2, " dB"),
            ("SSIM", "validation/ssim", 3, ""),
            ("LPIPS", "validation/lpips", 3, ""),
        )
    ]
    return f"From the pretrained network to this model: {', '.join(parts)}."


def _card(config: TrainConfig, folder: Path, update: int) -> ModelCard:
    """Return the model card of a run after `update` updates."""
    # metrics
    rows = read_rows(folder / "log.jsonl")
    row = next((r for r in rows if r["update"] == update and "validation/psnr" in r), {})
    names = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": f"LPIPS ({config.objective.lpips_net})"}
    tokens = f"by {row.get('validation/tokens', 0):,} tokens"
    names |= {"usage": f"share of the codes used {tokens}", "perplexity": "perplexity of the codes"}
    metrics = {n: row[f"validation/{k}"] for k, n in names.items() if f"validation/{k}" in row}

    # protocol
    mode = "posterior mode, " if config.model.posterior == "gaussian" else ""
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
    if row and row["validation/images"] < LEAST_VALIDATION_IMAGES:
        protocol += " The number of validation images is too small to compare models."

    # the card
    grid, private = sample_path(folder, update), marked(TrainConfig, Private)
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
