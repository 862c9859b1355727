"""Export a flow matching model as a diffusers pipeline, with its autoencoder and a model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from latentvae.config.run_config import flat
from latentvae.engine.log import read_rows, sample_path
from latentvae.errors import UserError
from latentvae.export.card import public_value
from latentvae.export.export_folder import written_whole
from latentvae.latents.opening import open_model
from latentvae.option_marks import Private, marked
from latentvae.priors.dit import Condition, velocity
from latentvae.priors.flow_pipeline import FlowPipeline, build_pipeline
from latentvae.priors.flow_sample import LATENTS_NAME
from latentvae.priors.text import check_exported_encoder, longest_text
from latentvae.priors.transformer import NO_CLASS
from latentvae.tasks.flow.config import LatentFlowConfig
from latentvae.tasks.flow.latents import LatentData

if TYPE_CHECKING:
    from latentvae.tasks.flow.task import FlowTask

CHECKED = 8  # classes or captions whose velocities are compared
TOLERANCE = 1e-4  # largest difference of velocities between the trained network and the export

CARD = """---
library_name: diffusers
tags: [latentvae, flow-matching, image-generation]
---

# {name}

A flow matching model on the latents of an autoencoder, trained with latentvae. The network is a
`{network}` of {millions} M parameters. The network makes latents of shape {shape}. Condition:
{condition}.

{samples}## Use

```python
{example}
```

`latentvae sample path/to/this/folder {flags}--num 16 --out pictures` writes pictures.

## Metrics

| squared error of the predicted velocity | value |
|---|---|
{rows}

The values are means over {images:,} unseen images after update {update:,}. Lower is better. Noise
levels are logit-normal with shift {shift:g}.

## Training

```yaml
{options}```
"""

SAMPLES = """![Samples](samples.png)

Random samples of this model, not selected by quality.

"""

STOCK_EXAMPLE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
pictures = pipe({classes}, guidance_scale=1.5, num_inference_steps=25).images"""

STOCK_TEXT_EXAMPLE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
pictures = pipe(
    ["a photo"] * 4,
    guidance_scale=1.5,
    num_inference_steps=25,
    use_resolution_binning=False,  # draw at the training resolution
    clean_caption=False,  # prompts are prepared as in the training
    max_sequence_length={longest},
).images"""

OWN_EXAMPLE = """from latentvae.priors import FlowPipeline

pipe = FlowPipeline.from_pretrained("path/to/this/folder")
pictures = pipe({condition}num_images=4, guidance_scale={guidance}).images"""


def open_autoencoder(path: str | None, data: LatentData) -> Any:
    """Return the autoencoder that made the latents.

    Args:
        path: the autoencoder's folder. None means the autoencoder named in the latents' manifest.
        data: the latents.

    Raises:
        UserError: there is no such autoencoder, or the latents were made with other weights.
    """
    try:
        autoencoder = open_model(path or data.model, device="cpu")
    except UserError as error:
        if path is not None:
            raise
        raise UserError(
            f"{error} (The manifest of the latents names this autoencoder. Give another with "
            "--autoencoder.)"
        ) from error

    if autoencoder.info()["weights_sha256"] != data.content.model_sha256:
        raise UserError(
            f"autoencoder '{path or data.model}' has other weights than the autoencoder that "
            f"made the latents ('{data.model}'). Give that autoencoder, or encode the images "
            "again."
        )
    return autoencoder


def export_flow(task: "FlowTask", out: Path, *, update: int, folder: Path) -> float | None:
    """Write the pipeline as a folder, and check that it loads with the same weights.

    Returns:
        The validation loss at `update`, or None if there was no validation at this update.

    Raises:
        RuntimeError: the loaded network, text encoder, tokenizer or autoencoder differs from the
            original.
    """
    rows = [r for r in read_rows(folder / "log.jsonl") if "validation/loss" in r]
    row = next((r for r in rows if r["update"] == update), {})
    pipeline = build_pipeline(
        task.net,
        task.autoencoder.net,
        shift=task.shift,
        labels=task.labels,
        normalization=task.data.normalization,
        text=None if task.encoder is None else (task.words, task.encoder),
    )

    with written_whole(out) as part:
        pipeline.save_pretrained(part)
        (part / LATENTS_NAME).write_text(task.data.content.model_dump_json(indent=1) + "\n")
        grid = sample_path(folder, update)
        if grid.is_file():
            (part / "samples.png").write_bytes(grid.read_bytes())
        stock = not isinstance(pipeline, FlowPipeline)
        values = {"update": update, "name": folder.resolve().name, "samples": grid.is_file()}
        (part / "README.md").write_text(_card(task, row, stock=stock, **values), encoding="utf-8")
        _check_equal(task, part)
    return row.get("validation/loss")


def _check_equal(task: "FlowTask", folder: Path) -> None:
    """Raise RuntimeError if an exported part, such as the network, differs from the original."""
    # the network: the same velocities for some classes or captions, and for none
    text = task.condition == "text"
    kind: Any = PixArtTransformer2DModel if text else DiTTransformer2DModel
    loaded = kind.from_pretrained(folder / "transformer", use_safetensors=True)
    device = task.net.device
    loaded = loaded.to(device).eval()
    ours, theirs = _texts(task, folder) if text else _classes(task)
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(len(ours), *task.data.shape, generator=draws).to(device)
    sigma = torch.linspace(0.1, 1.0, len(ours), device=device)
    with torch.no_grad():
        found = velocity(task.net, noise, sigma, ours), velocity(loaded, noise, sigma, theirs)
    if not torch.allclose(*found, atol=TOLERANCE):
        raise RuntimeError("the export's velocities differ from those of the trained network")

    # the autoencoder
    autoencoder = open_model(folder / "vae", device="cpu")
    if autoencoder.info()["weights_sha256"] != task.data.content.model_sha256:
        raise RuntimeError("the export's autoencoder is not the autoencoder that made the latents")


def _classes(task: "FlowTask") -> tuple[Condition, Condition]:
    """Return class indices twice: for the trained network and for the exported network.

    The first index means "no class".
    """
    numbers = [NO_CLASS, *range(min(task.num_classes, CHECKED))]
    classes = torch.tensor(numbers, device=task.net.device)
    return classes, classes


def _texts(task: "FlowTask", folder: Path) -> tuple[Condition, Condition]:
    """Return hidden states of some captions twice, after a check of the exported text encoder.

    The first result is for the trained network, and the second for the export.

    Raises:
        RuntimeError: the exported encoder has other weights, or the exported tokenizer splits
            captions in another way.
    """
    captions = ["", *dict.fromkeys(task.data.validation.captions)][: CHECKED + 1]
    check_exported_encoder(folder, task.words, task.encoder, captions=captions)
    states = task.states(captions)
    return states, states


def _card(
    task: "FlowTask", row: dict[str, Any], *, stock: bool, update: int, name: str, samples: bool
) -> str:
    config, private = task.config, marked(LatentFlowConfig, Private)
    names = {
        "validation/loss": "this model",
        "validation/loss_wrong_class": "this model, given a wrong class",
        "validation/loss_wrong_text": "this model, given a wrong caption",
        "validation/loss_gaussian": "the best model of independent Gaussian latent values",
    }
    options = {k: public_value(v) for k, v in flat(config).items() if k not in private}
    options["latents"] = [public_value(folder) for folder in config.latents.latents]

    labels, shape = task.labels, " x ".join(map(str, task.data.shape))
    text = task.condition == "text"
    return CARD.format(
        name=name,
        samples=SAMPLES if samples else "",
        millions=f"{sum(p.numel() for p in task.net.parameters()) / 1e6:.1f}",
        shape=shape,
        network=type(task.net).__name__,
        condition=f"{len(labels)} classes" if labels else task.condition,
        example=_example(task, stock=stock),
        flags='--prompt "a photo" ' if text else "",
        rows="\n".join(
            f"| {words} | {row[key]:.4f} |" for key, words in names.items() if key in row
        ),
        images=len(task.data.validation),
        update=update,
        shift=task.shift,
        options=yaml.safe_dump(options, sort_keys=False),
    )


def _example(task: "FlowTask", *, stock: bool) -> str:
    """Return code that draws four pictures with the export."""
    labels, text = task.labels, task.condition == "text"
    if stock and text:
        return STOCK_TEXT_EXAMPLE.format(longest=longest_text(task.words))
    if stock:
        return STOCK_EXAMPLE.format(classes=list(range(min(len(labels), 4))) or [0] * 4)
    prompt = 'prompt="a photo", ' if text else ""
    return OWN_EXAMPLE.format(condition=prompt, guidance=1.5 if labels or text else 1)
