"""The commands `latentvae encode` and `latentvae decode`, and the text that they print."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open

from latentvae.errors import UserError, printable
from latentvae.latents.decode import decode_folder
from latentvae.latents.encode import encode_folder
from latentvae.latents.encode_buckets import encode_buckets
from latentvae.latents.formats.shards import Manifest, shard_path
from latentvae.latents.shard_dataset import ShardReader

SHOWN_CLASSES = 3


def encode_command(
    *, model: str, data: str, out: Path, aspect_ratio_buckets: int = 0, **options: Any
) -> None:
    """Encode images and print a summary.

    Args:
        model: folder or Hub id of an autoencoder.
        data: images, see `encode_folder`.
        out: folder for the shards (files of latents or tokens).
        aspect_ratio_buckets: number of image shapes (height and width), see `encode_buckets`. With
            0, all images have the same shape.
        options: the other options of `encode_folder`.
    """
    if aspect_ratio_buckets < 0:
        raise UserError(f"aspect_ratio_buckets must be at least 0 (got {aspect_ratio_buckets}).")
    with _stoppable():
        if aspect_ratio_buckets:
            options["aspect_ratio_buckets"] = aspect_ratio_buckets
            manifests = encode_buckets(model, data, out, **options)
        else:
            manifests = {out: encode_folder(model, data, out, **options)}

    for folder, manifest in manifests.items():
        if manifest is None:
            continue  # other processes still encode, and the last process prints the summary
        for name, reason in manifest.unreadable:
            _say(printable(f"left out {name}: {reason}"), style="yellow")
        _say(summary(manifest, folder))


def decode_command(*, shards: Path, out: Path, **options: Any) -> None:
    """Decode shards (files of latents or tokens), and print how many pictures were written.

    Each process counts only its own pictures.
    """
    with _stoppable():
        pictures = decode_folder(shards, out, **options)
    _say(f"{len(pictures)} pictures in {out}")


def summary(manifest: Manifest, out: Path) -> str:
    """Return a summary of the encoded images, in a few lines."""
    content, facts = manifest.content, manifest.statistics
    shape = " x ".join(map(str, content.item_shape))
    lines = [
        f"{manifest.num_items} images in {len(manifest.shards)} shards in {out}: "
        f"{content.kind}, {shape} {content.dtype}"
    ]
    lines.append(_classes(manifest, out))
    if content.captions:
        count = sum(map(bool, ShardReader(out).captions()))
        lines.append(f"captions of {count} images")

    # bits or scale
    if content.kind == "tokens":
        coded = facts.get("coded_bpp")
        parts = facts.get("levels", [facts])
        used = " and ".join(str(part["num_codes_used"]) for part in parts)
        each = f"{content.num_codes} codes" + (" of each level" if len(parts) > 1 else "")
        true = f", {coded:.4f} coded (mean of {facts['coded_images']} images)" if coded else ""
        lines += [
            f"bits per pixel: {facts['raw_bpp']:.4f} raw{true}",
            f"{used} of {each} used, perplexity {facts['perplexity']:.1f}",
        ]
        if coded and coded > facts["raw_bpp"]:
            lines.append(
                "The coded size exceeds the raw size, because each image is coded alone, with its "
                "own header and code frequencies. With few tokens and many codes, the header and "
                "frequencies take more bits than the coding saves."
            )
    else:
        lines.append(f"latents before scaling: mean {facts['mean']:.4f}, std {facts['std']:.4f}")
    return "\n".join(lines)


def _classes(manifest: Manifest, out: Path) -> str:
    """Return a text with the number of classes and the names of the first classes."""
    if not manifest.content.labels:
        return "no classes: neither labels in a table nor at least two sub-folders"

    # names
    if names := manifest.content.class_names:
        shown = ", ".join(names[:SHOWN_CLASSES]) + (", ..." if len(names) > SHOWN_CLASSES else "")
        return printable(f"{len(names)} classes: {shown}")

    # integers
    found = set[int]()
    for shard in range(len(manifest.shards)):
        with safe_open(shard_path(out, shard), "pt") as file:
            found |= set(file.get_tensor("labels").tolist())
    found.discard(-1)  # rows without a label
    return f"{len(found)} classes"


@contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("stopped. Run the same command again to continue.", file=sys.stderr)
        raise SystemExit(130) from None  # the shell's code for Ctrl-C


def _say(text: str, *, style: str = "") -> None:
    Console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)
