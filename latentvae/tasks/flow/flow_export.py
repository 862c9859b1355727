"""Export a flow matching model as a diffusers pipeline, with its autoencoder and a model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from diffusers import DiTPipeline, DiTTransformer2DModel

from latentvae.config.run_config import flat
from latentvae.engine.log import read_rows, sample_path
from latentvae.export.card import public_value
from latentvae.export.export_folder import written_whole
from latentvae.latents.opening import open_model
from latentvae.option_marks import Private, marked
from latentvae.priors.dit import velocity
from latentvae.priors.flow_pipeline import build_pipeline
from latentvae.priors.flow_sample import LATENTS_NAME
from latentvae.priors.transformer import NO_CLASS
from latentvae.tasks.flow.config import LatentFlowConfig

if TYPE_CHECKING:
    from latentvae.tasks.flow.task import FlowTask

TOLERANCE = 1e-4  # largest difference of velocities between the trained network and the export

CARD = """---
library_name: diffusers
tags: [latentvae, flow-matching, image-generation]
---

# {name}

A flow matching model on the latents of an autoencoder, trained with latentvae. The network is a
`DiTTransformer2DModel` of {millions} M parameters. It makes latents of {shape}. Condition:
{condition}.

{samples}## Use

```python
{example}
```

`latentvae sample path/to/this/folder --num 16 --out pictures` writes pictures.

## Metrics

| squared error of the predicted velocity | value |
|---|---|
{rows}

Means over {images:,} unseen images after update {update:,}. Lower is better. Noise levels are
logit-normal with shift {shift:g}.

## Training

```yaml
{options}```
"""

SAMPLES = """![Samples](samples.png)

Samples of the averaged weights, not selected.

"""

STOCK_EXAMPLE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
pictures = pipe({classes}, guidance_scale=1.5, num_inference_steps=25).images"""

OWN_EXAMPLE = """from latentvae.priors import FlowPipeline

pipe = FlowPipeline.from_pretrained("path/to/this/folder")
pictures = pipe(num_images=4, guidance_scale={guidance}).images"""


def export_flow(task: "FlowTask", out: Path, *, update: int, folder: Path) -> float | None:
    """Write the pipeline as a folder, and check that it loads with the same weights.

    Returns:
        The loss of the last validation, or None if there was none.

    Raises:
        RuntimeError: the loaded network differs from the trained one.
    """
    rows = [r for r in read_rows(folder / "log.jsonl") if "validation/loss" in r]
    row = next((r for r in rows if r["update"] == update), {})
    pipeline = build_pipeline(
        task.net,
        task.autoencoder.net,
        shift=task.shift,
        labels=task.labels,
        normalization=task.data.normalization,
    )

    with written_whole(out) as part:
        pipeline.save_pretrained(part)
        (part / LATENTS_NAME).write_text(task.data.content.model_dump_json(indent=1) + "\n")
        grid = sample_path(folder, update)
        if grid.is_file():
            (part / "samples.png").write_bytes(grid.read_bytes())
        stock = isinstance(pipeline, DiTPipeline)
        values = {"update": update, "name": folder.resolve().name, "samples": grid.is_file()}
        (part / "README.md").write_text(_card(task, row, stock=stock, **values), encoding="utf-8")
        _check_equal(task, part)
    return row.get("validation/loss")


def _check_equal(task: "FlowTask", folder: Path) -> None:
    """Load network and autoencoder, and compare them with those of the task."""
    # the network: the same velocities for every class and for none
    loaded: Any = DiTTransformer2DModel.from_pretrained(
        folder / "transformer", use_safetensors=True
    )
    device, count = task.net.device, task.num_classes
    loaded = loaded.to(device).eval()
    classes = torch.tensor([NO_CLASS, *range(min(count, 8))], device=device)
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(len(classes), *task.data.shape, generator=draws).to(device)
    sigma = torch.linspace(0.1, 1.0, len(classes), device=device)
    with torch.no_grad():
        ours = velocity(task.net, noise, sigma, classes)
        theirs = velocity(loaded, noise, sigma, classes)
    if not torch.allclose(ours, theirs, atol=TOLERANCE):
        raise RuntimeError("the export's velocities differ from those of the trained network")

    # the autoencoder
    autoencoder = open_model(folder / "vae", device="cpu")
    if autoencoder.info()["weights_sha256"] != task.data.content.model_sha256:
        raise RuntimeError("the export's autoencoder differs from the autoencoder of the latents")


def _card(
    task: "FlowTask", row: dict[str, Any], *, stock: bool, update: int, name: str, samples: bool
) -> str:
    config, private = task.config, marked(LatentFlowConfig, Private)
    names = {
        "validation/loss": "this model",
        "validation/loss_wrong_class": "this model, given a wrong class",
        "validation/loss_gaussian": "the best model of independent Gaussian values",
    }
    options = {k: public_value(v) for k, v in flat(config).items() if k not in private}
    options["latents"] = [public_value(folder) for folder in config.latents.latents]

    labels, shape = task.labels, " x ".join(map(str, task.data.shape))
    classes = list(range(min(len(labels), 4))) or [0] * 4
    return CARD.format(
        name=name,
        samples=SAMPLES if samples else "",
        millions=f"{sum(p.numel() for p in task.net.parameters()) / 1e6:.1f}",
        shape=shape,
        condition=f"{len(labels)} classes" if labels else "none",
        example=STOCK_EXAMPLE.format(classes=classes)
        if stock
        else OWN_EXAMPLE.format(guidance=1.5 if labels else 1),
        rows="\n".join(
            f"| {words} | {row[key]:.4f} |" for key, words in names.items() if key in row
        ),
        images=len(task.data.validation),
        update=update,
        shift=task.shift,
        options=yaml.safe_dump(options, sort_keys=False),
    )
