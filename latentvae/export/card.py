"""The model card (README.md) of an export, in the form that the Hugging Face Hub reads."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard as HubCard
from huggingface_hub import ModelCardData

from latentvae.export.report import ExportReport

TAGS = ("latentvae", "autoencoder", "vae", "latent-diffusion", "image-compression")


@dataclass(frozen=True)
class ModelCard:
    """What the export itself cannot know.

    Args:
        name: what to call the model.
        description: a sentence or two on what it was trained for.
        metrics: name and value, in the order of the table.
        protocol: under which the metrics were measured, in one sentence.
        resolution: side of the training images in pixels, where it is not the config's
            `sample_size`.
        training: options of the run; tokens are left out, and of paths all but the last part.
        sample_grid: a PNG, copied beside the card.
        license: a Hub licence name; it is the user's to choose.
        base_model: id of a Hub model that was fine-tuned.
        dataset: id of a Hub data set that it was trained on.
        location: what its user gives to `from_pretrained`, such as an id on the Hub.
    """

    name: str = "autoencoder"
    description: str = ""
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    protocol: str = ""
    resolution: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    sample_grid: Path | None = None
    license: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    location: str = "path/to/this/folder"


def write_card(
    card: ModelCard, folder: Path, *, config: Mapping[str, Any], report: ExportReport
) -> None:
    """Write README.md, and the sample grid as samples.png, into `folder`.

    Args:
        config: of the exported network.
    """
    data = ModelCardData(
        library_name="diffusers",
        tags=list(TAGS),
        license=card.license,
        datasets=card.dataset,
        base_model=card.base_model,
    )
    if card.base_model:
        data["base_model_relation"] = "finetune"
    sections = [
        _title(card, config),
        _samples(card, folder),
        _usage(card, config),
        _metrics(card),
        _facts(report),
        _training(card),
    ]
    text = "\n\n".join(section for section in sections if section)
    content = HubCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").content
    (folder / "README.md").write_text(content, encoding="utf-8")


def _title(card: ModelCard, config: Mapping[str, Any]) -> str:
    f, d = 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]
    facts = (
        f"A KL autoencoder for latent diffusion: f = {f} (an image of H x W pixels becomes "
        f"H/{f} x W/{f} latent pixels) with d = {d} channels, trained with latentvae at "
        f"{card.resolution or config['sample_size']} pixels."
    )
    return "\n\n".join(part for part in (f"# {card.name}", card.description, facts) if part)


def _samples(card: ModelCard, folder: Path) -> str:
    if card.sample_grid is None:
        return ""
    shutil.copyfile(card.sample_grid, folder / "samples.png")
    return (
        "![Samples](samples.png)\n\nUnseen images: original, reconstruction, difference "
        "(mid-grey is none)."
    )


def _usage(card: ModelCard, config: Mapping[str, Any]) -> str:
    latents = "(z - vae.config.shift_factor) * vae.config.scaling_factor"
    if config["latents_mean"] is not None:
        latents = "(z - mean) / std  # vae.config.latents_mean and latents_std, per channel"
    return f"""## Use

```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{card.location}")
z = vae.encode(images).latent_dist.sample()  # images (B, 3, H, W) in [-1, 1]
latents = {latents}
recon = vae.decode(z).sample
```

Any diffusers pipeline takes it as `vae=`. `latentvae.load(folder)` encodes and decodes pictures of
any size."""


def _metrics(card: ModelCard) -> str:
    if not card.metrics:
        return ""
    rows = [f"| {name} | {_number(value)} |" for name, value in card.metrics.items()]
    table = "\n".join(["## Metrics", "", "| metric | value |", "|---|---|", *rows])
    return f"{table}\n\n{card.protocol}".rstrip()


def _facts(report: ExportReport) -> str:
    half = report.half_precision
    upcast = "false" if half.safe else "true: pipelines decode in float32"
    lines = [
        "## Export",
        "",
        f"- Profile `{report.profile}`: `scaling_factor` {report.scaling_factor:.6g} (before "
        f"{report.old_scaling_factor:.6g}; measured on posterior samples of {report.num_images} "
        f"images: {report.measured_scaling_factor:.6g}), `shift_factor` {report.shift_factor:.6g}.",
        f"- `force_upcast` {upcast}. Measured with float16 weights and activations: {half}.",
        "- Loaded back with diffusers and compared with the trained network: equal, bit for bit.",
    ]
    if report.identity_post_quant_conv:
        lines.append(
            "- An identity `post_quant_conv` was added: SDXL pipelines need one to upcast."
        )
    return "\n".join(lines)


def _training(card: ModelCard) -> str:
    options = {k: public_value(v) for k, v in card.training.items() if "token" not in k}
    if not options:
        return ""
    return f"## Training\n\n```yaml\n{yaml.safe_dump(options, sort_keys=False)}```"


def public_value(value: Any) -> Any:
    """An option as the card may show it: of a path, which tells whose machine it was, the last
    part."""
    if not isinstance(value, str | Path):
        return value
    local = Path(value).is_absolute() or str(value)[:1] in (".", "~") or os.path.exists(value)
    return Path(value).name if local else str(value)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
