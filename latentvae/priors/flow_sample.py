"""Write sampled pictures of an exported flow matching model (`latentvae sample`)."""

from pathlib import Path

import torch
from diffusers.utils import logging
from torch import Tensor
from tqdm import tqdm

from latentvae.compute.precision import full_float32
from latentvae.errors import UserError
from latentvae.pictures import save_grid, to_pil
from latentvae.priors.flow_matching import FlowSampling
from latentvae.priors.flow_pipeline import FlowPipeline
from latentvae.priors.sample import GRID_IMAGES, GRID_NAME, check_new_folder
from latentvae.priors.text import repeat_text
from latentvae.priors.transformer import Text

LATENTS_NAME = "latents.json"  # file of an export with facts about the latents that were learned


def flow_export(path: Path) -> Path | None:
    """Return the folder of an exported flow matching model, or None if there is no export.

    `path` is the folder of the export, or the folder of the training.
    """
    for folder in (path, path / "export"):
        if (folder / "model_index.json").is_file() and (folder / LATENTS_NAME).is_file():
            return folder
    return None


def open_flow(folder: Path, *, device: str | None = None) -> FlowPipeline:
    """Load an exported flow matching model in eval mode."""
    logging.disable_progress_bar()
    pipeline = FlowPipeline.from_pretrained(folder, use_safetensors=True)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        if part is not None:
            part.eval()
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@full_float32()
def sample_flow_folder(
    folder: Path,
    out: Path,
    *,
    num: int,
    class_name: str | None = None,
    prompt: str | None = None,
    options: FlowSampling,
    seed: int = 0,
    batch_size: int = 32,
    device: str | None = None,
) -> list[Path]:
    """Write sampled pictures (`00000.png`, ...) and a grid of the first 64 pictures into `out`.

    Args:
        folder: an export of a flow matching model.
        num: number of pictures.
        class_name: name or number of the pictures' class. By default, a model with classes takes
            all classes in turn.
        prompt: text of the pictures, for a model with text.
        options: solver, steps and guidance.
        seed: seed of the noise. Except for rounding, a picture depends neither on `num` nor on
            `batch_size`.
        batch_size: number of pictures that are sampled at once.
        device: device of the computation. None takes the GPU if there is one.

    Returns:
        The paths of the pictures.

    Raises:
        UserError: an option is wrong, or the folder `out` is not empty.
    """
    # checks
    if num < 1 or batch_size < 1:
        raise UserError(f"num and batch_size must be at least 1 (got {num} and {batch_size}).")
    pipeline = open_flow(folder, device=device)
    labels = [] if class_name is None else [class_name]
    prompts = [] if prompt is None else [prompt]
    condition = pipeline.condition(labels, prompts, 1 if prompts else num)
    pipeline.check_guidance(condition, options)
    check_new_folder(out)

    # pictures
    paths, shown = list[Path](), list[Tensor]()
    for start in tqdm(range(0, num, batch_size), desc=folder.name, unit="batch", disable=None):
        numbers = range(start, min(start + batch_size, num))
        if isinstance(condition, Text):
            chosen = repeat_text(condition, len(numbers))
        else:
            chosen = condition[start : numbers.stop]
        latents = pipeline.sample(chosen, options=options, seed=seed, numbers=numbers)
        images = pipeline.decode(latents)
        for number, picture in zip(numbers, to_pil(images), strict=True):
            paths.append(out / f"{number:05d}.png")
            picture.save(paths[-1])
        shown += [images.cpu()] if start < GRID_IMAGES else []
    save_grid(torch.cat(shown)[:GRID_IMAGES], out / GRID_NAME)
    return paths
