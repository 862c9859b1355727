"""Write sampled pictures of an exported prior, and their tokens (`latentvae sample`)."""

import hashlib
from pathlib import Path

import torch
from diffusers.utils import logging
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from latentvae.compute.precision import full_float32
from latentvae.errors import UserError
from latentvae.files import read_text
from latentvae.latents.finishing import finish
from latentvae.latents.formats.shards import DTYPES, Content, ShardHeader
from latentvae.latents.writing import save_shard
from latentvae.pictures import save_grid, to_pil
from latentvae.priors.pipeline import TokenPipeline
from latentvae.priors.sampling import Sampling, sample_tokens
from latentvae.priors.text import repeat_text
from latentvae.priors.transformer import NO_CLASS

TOKENS_NAME = "tokens.json"  # file of an export with facts about the tokens that the prior learned
GRID_NAME = "grid.png"
GRID_IMAGES = 64  # number of pictures that the grid shows at most


@full_float32()
def sample_folder(
    prior: Path,
    out: Path,
    *,
    num: int,
    class_name: str | None = None,
    prompt: str | None = None,
    options: Sampling,
    seed: int = 0,
    batch_size: int = 32,
    tokens: bool = False,
    device: str | None = None,
) -> list[Path]:
    """Write sampled pictures (`00000.png`, ...) and a grid of the first 64 pictures into `out`.

    Args:
        prior: folder of an exported prior, or of a finished training.
        num: number of pictures.
        class_name: name or number of the pictures' class. By default, a prior with classes takes
            all classes in turn.
        prompt: text of the pictures, for a prior with text.
        options: how tokens are drawn.
        seed: seed of the random numbers. Except for rounding, a picture depends neither on `num`
            nor on `batch_size`.
        batch_size: number of pictures that are sampled at once.
        tokens: also write the tokens to `out`/tokens, as shards that `latentvae decode` reads.
        device: device of the computation. None takes the GPU if there is one.

    Returns:
        The paths of the pictures.

    Raises:
        UserError: an option is wrong, or the folder `out` is not empty.
    """
    # checks
    if num < 1 or batch_size < 1:
        raise UserError(f"num and batch_size must be at least 1 (got {num} and {batch_size}).")
    folder = find_export(prior)
    pipeline = open_prior(folder, device=device)
    content = read_content(folder)
    if class_name is None:
        classes = pipeline.all_classes(num)
    else:
        classes = torch.full((num,), pipeline.class_number(class_name))
    text = None if prompt is None else pipeline.encode([prompt])
    if options.guidance != 1 and text is None and int(classes.max()) == NO_CLASS:
        raise UserError(
            "guidance needs a class or a prompt. Give a class or a prompt, or leave guidance out."
        )
    check_new_folder(out)

    # pictures
    paths, drawn, shown = list[Path](), list[Tensor](), list[Tensor]()
    for start in tqdm(range(0, num, batch_size), desc=folder.name, unit="batch", disable=None):
        numbers = range(start, min(start + batch_size, num))
        sequences = sample_tokens(
            pipeline.transformer,
            classes[start : numbers.stop],
            text=None if text is None else repeat_text(text, len(numbers)),
            options=options,
            seed=seed,
            numbers=numbers,
        )
        images = pipeline.decode(sequences)
        drawn.append(sequences.cpu())
        for number, picture in zip(numbers, to_pil(images), strict=True):
            paths.append(out / f"{number:05d}.png")
            picture.save(paths[-1])
        shown += [images.cpu()] if start < GRID_IMAGES else []
    save_grid(torch.cat(shown)[:GRID_IMAGES], out / GRID_NAME)

    if tokens:
        write_samples(out / "tokens", torch.cat(drawn), classes, content, folder=folder)
    return paths


def check_new_folder(out: Path) -> None:
    """Create the folder `out`, or raise UserError if `out` exists and is not empty."""
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise UserError(f"'{out}' exists and is not an empty folder. Give another folder.")
    out.mkdir(parents=True, exist_ok=True)


def find_export(prior: Path) -> Path:
    """Return the folder of an exported prior, given this folder or the folder of its training.

    Raises:
        UserError: there is no such folder, or it holds no prior.
    """
    for folder in (prior, prior / "export"):
        if (folder / "model_index.json").is_file() and (folder / TOKENS_NAME).is_file():
            return folder
    if (prior / "config.yaml").is_file():
        raise UserError(
            f"the run '{prior}' has no export of a generator yet. Run its training command again, "
            "and wait until the training is done."
        )
    raise UserError(
        f"'{prior}' is no prior and no flow matching model. Give the output folder of "
        "train_prior.py or train_flow.py, or the folder `export` in this output folder."
    )


def open_prior(folder: Path, *, device: str | None = None) -> TokenPipeline:
    """Load an exported prior in eval mode."""
    logging.disable_progress_bar()
    pipeline = TokenPipeline.from_pretrained(folder, use_safetensors=True)
    for part in (pipeline.transformer, pipeline.vqvae, pipeline.text_encoder):
        if part is not None:
            part.eval()
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def read_content(folder: Path) -> Content:
    """Return the description (`Content`) of the tokens with which a prior was trained."""
    path = folder / TOKENS_NAME
    try:
        return Content.model_validate_json(read_text(path))
    except ValidationError as error:
        raise UserError(f"'{path}' was not written by train_prior.py.") from error


def write_samples(
    out: Path, sequences: Tensor, classes: Tensor, content: Content, *, folder: Path
) -> None:
    """Write sampled tokens (n, T) as shards, with a manifest like that of `latentvae encode`."""
    # what the shards hold
    count, labels = len(sequences), content.labels and int(classes.min()) >= 0
    items = sequences.reshape(count, *content.item_shape).to(DTYPES[content.dtype])
    content = content.model_copy(
        update={
            "num_source_items": count,
            "data_sha256": hashlib.sha256(items.numpy().tobytes()).hexdigest(),
            "labels": labels,
            "captions": False,
            "class_names": content.class_names if labels else None,
        }
    )

    # the shards, and the manifest that marks them as complete
    out.mkdir(parents=True, exist_ok=True)
    for shard in range(content.num_shards):
        rows = content.items_of(shard)
        part = slice(rows.start, rows.stop)
        tensors = {"indices": items[part]}
        tensors["sizes"] = torch.tensor([content.size] * len(rows), dtype=torch.int32)
        if labels:
            tensors["labels"] = classes[part]
        header = ShardHeader(content=content, shard=shard, unreadable=[])
        save_shard(out, header, tensors, names=[f"{number:05d}" for number in rows])
    finish(out, content, model=str(folder / "vqvae"), data=str(folder), rank=0)
