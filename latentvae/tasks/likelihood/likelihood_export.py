"""Export a variational autoencoder as a folder, with a model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from latentvae.config.presets import load_preset, preset_names
from latentvae.config.run_config import flat
from latentvae.engine.log import read_rows, sample_path
from latentvae.export.card import public_value
from latentvae.export.export_folder import written_whole
from latentvae.models.likelihood_models import ImagesOfModel, load_likelihood_net, write_images_file
from latentvae.option_marks import Private, marked
from latentvae.tasks.likelihood.config import LikelihoodConfig

if TYPE_CHECKING:
    from latentvae.tasks.likelihood.task import LikelihoodTask

CARD = """---
library_name: diffusers
tags: [latentvae, vae, likelihood]
---

# {name}

A variational autoencoder, trained with latentvae by the bound `{bound}` of the likelihood. The
network has {millions} M parameters and {groups} groups of latents, for images of shape {shape}. The
pixels have the distribution `{likelihood}`.

{samples}## Use

```python
from latentvae.models.likelihood_models import load_likelihood_net

net, about = load_likelihood_net("path/to/this/folder")
pictures = net.sample(16)              # (16, C, H, W) in [-1, 1]
nats = -net(images).elbo()             # images in [-1, 1]
```

`latentvae likelihood path/to/this/folder --data IMAGES` measures the likelihood of images.
`latentvae sample path/to/this/folder --num 16 --out pictures` writes pictures.

## Metrics

| | value |
|---|---|
{rows}

The values are means over {images:,} unseen images after update {update:,}. Lower is better.

## Training

```yaml
{options}```
"""

SAMPLES = """![Samples](samples.png)

Random samples of this model, not selected by quality.

"""
NAMES = {
    "validation/nats": "negative ELBO, nats per image",
    "validation/bits_per_dim": "negative ELBO, bits per dimension",
    "validation/nats_importance": "importance-weighted bound, nats per image",
    "validation/kl": "KL, nats per image",
    "validation/class_error": "wrong classes, percent",
}


def is_whole(out: Path) -> bool:
    """Return whether a folder holds an export: its config.json and its model card."""
    return (out / "config.json").is_file() and (out / "README.md").is_file()


def export_network(
    task: "LikelihoodTask", out: Path, *, update: int, folder: Path
) -> dict[str, float]:
    """Write the network's folder, and check that it loads with the same weights.

    Returns:
        Values for the log.

    Raises:
        RuntimeError: the loaded network differs from the trained one.
    """
    rows = [r for r in read_rows(folder / "log.jsonl") if "validation/nats" in r]
    row = next((r for r in rows if r["update"] == update), {})
    data = task.config.data
    about = ImagesOfModel(
        binarize="static" if data.binarize == "dynamic" else data.binarize,
        image_interpolation_mode=data.image_interpolation_mode,
        value_range=data.value_range,
        preset=_unchanged_preset(task.config),
    )

    with written_whole(out) as part:
        task.net.save_pretrained(part)
        write_images_file(part, about)
        grid = sample_path(folder, update)
        if grid.is_file():
            (part / "samples.png").write_bytes(grid.read_bytes())
        values = {"update": update, "name": folder.resolve().name, "samples": grid.is_file()}
        (part / "README.md").write_text(_card(task, row, **values), encoding="utf-8")
        _check_equal(task, part)
    return {"export/nats": row["validation/nats"]} if row else {}


def _unchanged_preset(config: LikelihoodConfig) -> str:
    """Return the name of the run's preset, or "" if the run does not use an unchanged preset.

    The network, the loss and the option `binarize` must be those of the preset.
    """
    if config.config not in preset_names(LikelihoodConfig) or Path(config.config).is_file():
        return ""
    preset = load_preset(config.config, LikelihoodConfig)
    same = preset.vae == config.vae and preset.objective == config.objective
    return config.config if same and preset.data.binarize == config.data.binarize else ""


def _check_equal(task: "LikelihoodTask", folder: Path) -> None:
    loaded, _ = load_likelihood_net(folder)
    ours, theirs = task.net.state_dict(), loaded.state_dict()
    same = ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].cpu(), theirs[name]) for name in ours
    )
    if not same:
        raise RuntimeError("the exported network has other weights than the trained network")


def _card(
    task: "LikelihoodTask", row: dict[str, Any], *, update: int, name: str, samples: bool
) -> str:
    config, private = task.config, marked(LikelihoodConfig, Private)
    options = {k: public_value(v) for k, v in flat(config).items() if k not in private}
    return CARD.format(
        name=name,
        bound=config.objective.bound,
        millions=f"{sum(p.numel() for p in task.net.parameters()) / 1e6:.2f}",
        groups=task.net.num_groups,
        shape=" x ".join(map(str, config.image_shape)),
        likelihood=config.vae.likelihood,
        samples=SAMPLES if samples else "",
        rows="\n".join(
            f"| {words} | {row[key]:.3f} |" for key, words in NAMES.items() if key in row
        ),
        images=len(task.validation_pixels),
        update=update,
        options=yaml.safe_dump(options, sort_keys=False),
    )
