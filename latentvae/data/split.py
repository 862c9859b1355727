"""Which images are for training and which for validation."""

import hashlib
import os

from latentvae.data.folder import SAMPLES, ImageFolder, ImageSource, SamplePhotos
from latentvae.errors import UserError


def open_source(spec: str | os.PathLike[str], *, split: str = "validation") -> ImageSource:
    """Open ``"samples"`` (the given split of the sample photos) or a folder (all of it)."""
    return SamplePhotos(split) if os.fspath(spec) == SAMPLES else ImageFolder(spec)


def open_images(
    spec: str | os.PathLike[str],
    *,
    validation_data_dir: str | os.PathLike[str] | None = None,
    split_share: float = 0.02,
    seed: int = 0,
) -> tuple[ImageSource, ImageSource]:
    """Open the images for training and for validation; no file is in both.

    Args:
        spec: ``"samples"`` or a folder (write ``./samples`` for a folder of that name).
        validation_data_dir: the same for validation; files of it below ``spec`` are not trained on.
        split_share: the share of ``spec`` held out if there is no ``validation_data_dir``, in
            (0, 1). A file is held out by the hash of its relative path and ``seed``, so adding
            files moves none of the others; at least one is held out and one kept.
        seed: another seed holds out other files.
    """
    train = open_source(spec, split="train")
    if validation_data_dir is not None:
        validation = open_source(validation_data_dir, split="validation")
        return _without(train, validation), validation
    if isinstance(train, ImageFolder):
        return _hold_out(train, share=split_share, seed=seed)
    return train, open_source(spec, split="validation")


def _hold_out(folder: ImageFolder, *, share: float, seed: int) -> tuple[ImageFolder, ImageFolder]:
    if not 0 < share < 1:
        raise UserError(f"the held-out share is {share}; it must lie between 0 and 1 (0.02, say)")
    if len(folder) < 2:
        raise UserError(
            f"'{folder.root}' has one image only; two are needed to hold one out for validation"
        )
    draws = {name: _unit_hash(name, seed) for name in folder.names}
    ranked = sorted(draws, key=lambda name: draws[name])
    held = {name for name in ranked if draws[name] < share} - {ranked[-1]} | {ranked[0]}
    train = [name for name in folder.names if name not in held]
    validation = [name for name in folder.names if name in held]
    return ImageFolder(folder.root, names=train), ImageFolder(folder.root, names=validation)


def _unit_hash(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on the name and the seed alone."""
    digest = hashlib.sha256(f"{seed}:".encode() + os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _without(train: ImageSource, validation: ImageSource) -> ImageSource:
    """``train`` less the files that are in ``validation`` too (one folder may lie in the other)."""
    if not (isinstance(train, ImageFolder) and isinstance(validation, ImageFolder)):
        return train
    roots = train.root.resolve(), validation.root.resolve()
    if not (roots[0].is_relative_to(roots[1]) or roots[1].is_relative_to(roots[0])):
        return train
    held = {(validation.root / name).resolve() for name in validation.names}
    names = [name for name in train.names if (train.root / name).resolve() not in held]
    if not names:
        raise UserError(
            f"every image of '{train.root}' is also in the validation folder '{validation.root}'; "
            "give two folders, or leave the validation folder out to hold out a share"
        )
    return ImageFolder(train.root, names=names)
