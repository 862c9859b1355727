"""Write the model card (README.md) of an export, in the form that the Hugging Face Hub reads."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from huggingface_hub import ModelCard as HubCard
from huggingface_hub import ModelCardData

from latentvae.models import Network, family_of
from latentvae.text import markdown_text

TAGS = ("latentvae", "autoencoder", "vae", "latent-diffusion", "image-compression")


class Report(Protocol):
    """The facts from an export's report that the model card shows.

    Attributes:
        network: the class that loads the export.
        kind: the kind of network, in a few words.
        size: the size of the network's latents, in a few words.
    """

    @property
    def network(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> str: ...
    def facts(self) -> str:
        """Return the section of the model card that describes the export."""
        ...


@dataclass(frozen=True)
class ModelCard:
    """Those facts in a model card that cannot be read from the exported network.

    Args:
        name: the model's name.
        description: one or two sentences on the purpose of the training.
        metrics: values of metrics by name, in the order of the card's table.
        protocol: how the metrics were measured, in one sentence.
        resolution: resolution of the training images, such as "64" or "64 x 96". None uses the
            `sample_size` of the network's config.
        training: options of the training run. Access tokens are left out, and paths are shortened.
        sample_grid: path of a PNG picture, which is copied into the folder of the card.
        license: a Hub licence name, chosen by the user.
        base_model: id of a Hub model that was fine-tuned.
        dataset: id of a Hub data set that the network was trained on.
        location: argument of `from_pretrained` in the card's example, such as an id on the Hub.
    """

    name: str = "autoencoder"
    description: str = ""
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    protocol: str = ""
    resolution: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    sample_grid: Path | None = None
    license: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    location: str = "path/to/this/folder"


def write_card(
    card: ModelCard, folder: Path, *, net: Network, config: Mapping[str, Any], report: Report
) -> None:
    """Write README.md, and the sample grid as samples.png, into `folder`.

    Args:
        net: the exported network.
        config: the network's config.
    """
    # metadata for the Hub
    data = ModelCardData(
        library_name="diffusers",
        tags=list(TAGS),
        license=card.license,
        datasets=card.dataset,
        base_model=card.base_model,
    )
    if card.base_model:
        data["base_model_relation"] = "finetune"

    # sections
    sections = [
        _title(card, net, config, report),
        _samples(card, folder),
        _usage(card, net, config, report),
        _metrics(card),
        report.facts(),
        _training(card),
    ]
    text = "\n\n".join(section for section in sections if section)
    content = HubCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").content
    (folder / "README.md").write_text(content, encoding="utf-8")


def _title(card: ModelCard, net: Network, config: Mapping[str, Any], report: Report) -> str:
    f = family_of(net).latent_shape(net).f
    facts = (
        f"{report.kind}: f = {f} (an image of H x W pixels becomes H/{f} x W/{f} latent pixels), "
        f"{report.size}, trained with latentvae"
    )
    if resolution := card.resolution or config.get("sample_size"):
        facts += f" at {resolution} pixels"
    return "\n\n".join(
        part for part in (f"# {markdown_text(card.name)}", card.description, f"{facts}.") if part
    )


def _samples(card: ModelCard, folder: Path) -> str:
    if card.sample_grid is None:
        return ""
    shutil.copyfile(card.sample_grid, folder / "samples.png")
    return (
        "![Samples](samples.png)\n\nValidation images: original, reconstruction, and their "
        "difference (mid-grey means no difference)."
    )


def _usage(card: ModelCard, net: Network, config: Mapping[str, Any], report: Report) -> str:
    usage = family_of(net).usage(net)
    assert usage is not None
    channels = config["in_channels"]
    kind = {1: ", grey,", 4: ", RGBA,"}.get(channels, "")
    snippet = usage.snippet.format(latents=_latents(config), channels=channels, kind=kind)
    return f"""## Use

```python
from {usage.package} import {report.network}

vae = {report.network}.from_pretrained("{card.location}")
{snippet}
```

{usage.pipelines}`latentvae.load(folder)` encodes and decodes pictures of any size."""


def _latents(config: Mapping[str, Any]) -> str:
    if config.get("latents_mean") is not None:
        return (
            "(z - torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1)) * "
            "vae.config.scaling_factor / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)"
        )
    return "(z - vae.config.shift_factor) * vae.config.scaling_factor"


def _metrics(card: ModelCard) -> str:
    if not card.metrics:
        return ""
    rows = [f"| {name} | {_number(value)} |" for name, value in card.metrics.items()]
    table = "\n".join(["## Metrics", "", "| metric | value |", "|---|---|", *rows])
    return f"{table}\n\n{card.protocol}".rstrip()


def _training(card: ModelCard) -> str:
    options = {k: public_value(v) for k, v in card.training.items() if "token" not in k}
    if not options:
        return ""
    return f"## Training\n\n```yaml\n{yaml.safe_dump(options, sort_keys=False)}```"


def public_value(value: Any) -> Any:
    """Return the value of a training option in a form that a public model card may show.

    A path is shortened to its last part, because its other parts can contain the name of the user
    or of the machine.
    """
    if not isinstance(value, str | Path):
        return value
    local = Path(value).is_absolute() or str(value)[:1] in (".", "~") or os.path.exists(value)
    return Path(value).name if local else str(value)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
