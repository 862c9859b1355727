"""Export a student: check the diffusers folder, measure the student's cost, write a model card."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml

from latentvae.config.run_config import flat
from latentvae.engine.log import read_rows, sample_path
from latentvae.export.card import public_value
from latentvae.export.export_folder import load_back, written_whole
from latentvae.models import Network, calls
from latentvae.models.students import Part, stock_copy
from latentvae.option_marks import Private, marked
from latentvae.tasks.autoencoder.images import eval_transform
from latentvae.tasks.autoencoder.validate import readable_images
from latentvae.tasks.distill.config import DistillConfig
from latentvae.tasks.distill.cost import Cost, measure_cost
from latentvae.tasks.distill.teaching import UNTRAINED, untrained_part
from latentvae.text import markdown_text

if TYPE_CHECKING:
    from latentvae.tasks.distill.task import DistillTask

CLASSES = ("AutoencoderTiny", "AutoencoderKLFlux2")
Side = Literal["encoder", "decoder"]
SIDES: dict[Part, tuple[Side, ...]] = {
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "both": ("encoder", "decoder"),
}

CARD = """---
library_name: diffusers
tags: [latentvae, autoencoder, vae, distillation, taesd]
---

# {name}

{description}

{samples}## Use

```python
from diffusers import {kind}

vae = {kind}.from_pretrained("path/to/this/folder")
{snippet}
```

{usage}

## Metrics and cost

| | this model | teacher |
|---|---|---|
{rows}

{protocol}

## Training

```yaml
{options}```
"""

SAMPLES = """![Samples](samples.png)

Validation images: original, teacher, this model, and the error of this model (mid-grey means none).

"""


def is_whole(out: Path) -> bool:
    """Return whether a folder holds an export of a student: its config.json and its model card."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    known = isinstance(config, dict) and config.get("_class_name") in CLASSES
    return known and (out / "README.md").is_file()


def export_student(
    task: "DistillTask", out: Path, *, update: int, folder: Path
) -> dict[str, float]:
    """Write the student's folder, measure costs, and check that diffusers loads the same network.

    Args:
        task: a task whose student has the weights to export, in eval mode.
        out: the export's folder.
        update: number of updates done.
        folder: the run's folder.

    Returns:
        Values for the log.

    Raises:
        RuntimeError: the loaded network differs from the trained one.
    """
    print(f"export: writing {out} and measuring the cost of student and teacher", flush=True)
    costs: dict[Side, tuple[Cost, Cost]] = {
        side: (measure_cost(task.net, side), measure_cost(task.teacher.net, side))
        for side in SIDES[task.pair.part]
    }
    rows = [r for r in read_rows(folder / "log.jsonl") if "validation/psnr" in r]
    row = next((r for r in rows if r["update"] == update), {})

    with written_whole(out) as part:
        net = stock_copy(task.net)
        net.save_pretrained(part)
        grid = sample_path(folder, update)
        if grid.is_file():
            (part / "samples.png").write_bytes(grid.read_bytes())
        text = _card(task, costs, row, update=update, name=folder.resolve().name)
        (part / "README.md").write_text(text, encoding="utf-8")
        _check_equal(task, net, load_back(part, task.kind.network))

    ratios = {
        f"export/{side}_times_fewer_macs": theirs.macs / ours.macs
        for side, (ours, theirs) in costs.items()
    }
    return ratios | {"export/psnr": row["validation/psnr"]} if row else ratios


@torch.no_grad()
def _check_equal(task: "DistillTask", net: Network, loaded: Network) -> None:
    """Compare the loaded network with the trained one, on an image and the teacher's latents."""
    images = readable_images(task.validation_images, eval_transform(task.config), count=1)
    z = task.pair.teach(images.to(task.device), decode=False).z.cpu()
    for name, call, inputs in (("encoder", calls.encode, images), ("decoder", calls.decode, z)):
        if not torch.equal(call(net, inputs), call(loaded, inputs)):
            raise RuntimeError(f"the exported {name} differs from the trained one")


def _card(
    task: "DistillTask",
    costs: dict[Side, tuple[Cost, Cost]],
    row: dict[str, Any],
    *,
    update: int,
    name: str,
) -> str:
    private, config = marked(DistillConfig, Private), task.config
    options = {k: public_value(v) for k, v in flat(config).items() if k not in private}
    kind, scaling = task.kind.network.__name__, task.teacher.normalization.scaling_factor
    return CARD.format(
        name=markdown_text(name),
        description=_description(task),
        samples=SAMPLES if row else "",
        kind=kind,
        snippet=_SNIPPETS[kind].format(
            scaling=scaling, shift=task.teacher.normalization.shift_factor
        ),
        usage=_USAGE[kind],
        rows="\n".join(_rows(costs, row)),
        protocol=_protocol(task, costs, row, update),
        options=yaml.safe_dump(_plain(options), sort_keys=False),
    )


_SNIPPETS = {
    "AutoencoderTiny": """# z: latents in the scale of the diffusion model, such as
# (teacher's latents - {shift:g}) * {scaling:g}
images = vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1)""",
    "AutoencoderKLFlux2": """# images (B, 3, H, W) in [-1, 1]
z = vae.encode(images).latent_dist.mode()
images = vae.decode(z).sample.clamp(-1, 1)""",
}
_USAGE = {
    "AutoencoderTiny": (
        "This model has `scaling_factor` 1 and `shift_factor` 0, because its decoder takes latents "
        "in the scale of the diffusion model. In a diffusion pipeline that uses the teacher, set "
        "`pipe.vae = vae`. Do not switch tiling on, unless this model has 3 image channels, 4 "
        "latent channels and f = 8: diffusers' tiles of this class assume these numbers."
    ),
    "AutoencoderKLFlux2": (
        "Encoder and normalisation are those of the teacher. In a pipeline of FLUX.2, set "
        "`pipe.vae = vae`."
    ),
}


def _description(task: "DistillTask") -> str:
    teacher = markdown_text(task.teacher.name)
    part = {"both": "encoder and decoder", "encoder": "encoder", "decoder": "decoder"}
    text = (
        f"A small {part[task.pair.part]} distilled from {teacher} with latentvae: f = "
        f"{task.teacher.f}, {task.teacher.latent_channels} latent channels."
    )
    if (missing := untrained_part(task.config.student, task.kind)) is not None:
        does = UNTRAINED[missing]
        text += f" **The {missing} is not trained and {does}. Use the teacher's {missing}.**"
    return text


def _rows(costs: dict[Side, tuple[Cost, Cost]], row: dict[str, Any]) -> list[str]:
    """Return the rows of the table of metrics and costs in the model card."""
    rows: list[tuple[str, str, str]] = []
    for metric, words, digits in (("psnr", "PSNR (dB)", 2), ("lpips", "LPIPS", 3)):
        if row:
            ours, theirs, between = (
                f"{row[f'validation/{metric}{suffix}']:.{digits}f}"
                for suffix in ("", "_teacher", "_to_teacher")
            )
            rows.append((f"{words} to the images", ours, theirs))
            rows.append((f"{words} to the teacher's reconstruction", between, ""))
    if "validation/latent_error" in row:
        rows.append(("relative error of latents", f"{row['validation/latent_error']:.3f}", ""))
    for side, both in costs.items():
        size = f"{both[0].size} px"
        for words, values in (
            (f"{side}: parameters (M)", [f"{cost.parameters / 1e6:.2f}" for cost in both]),
            (f"{side}: G MACs at {size}", [f"{cost.macs / 1e9:.1f}" for cost in both]),
            (f"{side}: ms at {size}", [f"{cost.milliseconds:.1f}" for cost in both]),
            (f"{side}: peak MiB at {size}", [f"{cost.peak_mib:.0f}" for cost in both]),
        ):
            rows.append((words, values[0], values[1]))
    return [f"| {' | '.join(row)} |" for row in rows]


def _protocol(
    task: "DistillTask",
    costs: dict[Side, tuple[Cost, Cost]],
    row: dict[str, Any],
    update: int,
) -> str:
    weights = "averaged" if task.config.optimizer.use_ema else "trained"
    threads = f", {torch.get_num_threads()} threads" if task.device.type == "cpu" else ""
    speed = f"Time and memory: one image in float32 on {task.device.type}{threads}."
    if not row:
        return speed
    missing = {"decoder": " Images are encoded by the teacher.", "both": ""}
    missing["encoder"] = " Latents are decoded by the teacher."
    return (
        f"Means over {row['validation/images']:,} unseen images after update {update:,}: centre "
        f"crops of {' x '.join(map(str, task.config.data.size))} px, {weights} weights, "
        f"LPIPS-{task.config.objective.lpips_net}.{missing[task.pair.part]} {speed}"
    )


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with lists instead of tuples, for YAML."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
