"""Where an update went wrong: which terms were not finite, on which images."""

import math

from torch import Tensor

from latentvae.data import ImageSource, ImageStream
from latentvae.distributed import gather_objects, rank, world_size
from latentvae.errors import printable

SHOWN = 4  # names of images, at most, of each process


def describe(
    values: list[dict[str, Tensor]],
    indices: list[Tensor],
    images: ImageSource | ImageStream,
) -> str:
    """A clause for the log, the same on every rank; all ranks call it, for a skipped update only:
    it syncs.

    Args:
        values: the logged scalars of each micro-step of this rank.
        indices: (B,) the images of each.
        images: what they count.
    """
    found = []
    for step, logged in enumerate(values):
        terms = [name for name, value in logged.items() if not math.isfinite(value)]
        if terms:
            found.append((terms, _names(indices[step], images)))
    clauses = []
    for process, steps in enumerate(gather_objects(found)):
        for terms, names in steps:
            where = f"process {process}: " if world_size() > 1 else ""
            clauses.append(f"{where}{', '.join(terms)} not finite on {names}")
    return "; ".join(clauses) or "every term is finite, the gradient of their sum is not"


def _names(indices: Tensor, images: ImageSource | ImageStream) -> str:
    numbers = indices.tolist()
    if isinstance(images, ImageStream):
        shown = [f"row {number} of process {rank()}'s stream" for number in numbers]
    else:
        shown = [printable(images.name(number)) for number in numbers]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more
