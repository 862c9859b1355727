"""The order of the images, read from where each launch went on: the one part of a resume that
leaves no tensor."""

from collections.abc import Sequence
from itertools import islice

from latentvae.config.autoencoder import TrainConfig
from latentvae.data import (
    BucketSampler,
    ImageSource,
    IndexSampler,
    aspect_ratios,
    assign,
)
from latentvae.proofs.checks import Check


def check_order(
    config: TrainConfig, images: ImageSource, *, processes: int, starts: Sequence[int]
) -> Check:
    """Whether every launch got the images that an unbroken run gets at the same place.

    Args:
        starts: micro-steps done when each launch began.
    """
    options = config.run
    total = options.max_train_steps * options.gradient_accumulation_steps
    buckets = None
    if config.data.aspect_ratio_buckets:
        joint = config.images_read * processes
        buckets = assign(aspect_ratios(images), config.train_sizes, at_least=joint)

    def order(rank: int, start: int) -> list[list[tuple[int, int]]]:
        place = {"rank": rank, "world_size": processes, "start_step": start, "seed": options.seed}
        if buckets is not None:
            sampler = BucketSampler(buckets, config.images_read, **place)
        else:
            sampler = IndexSampler(len(images), config.images_read, **place)
        return list(islice(sampler, total - start))

    wrong = []
    for rank in range(processes):
        straight = order(rank, 0)
        wrong += [f"{s} on rank {rank}" for s in starts if order(rank, s) != straight[s:]]
    shown = ", ".join(map(str, starts))
    return Check(
        name="data order",
        passed=not wrong and bool(starts),
        value=f"differs from micro-step {wrong[0]}" if wrong else f"equal from micro-steps {shown}",
        expected=f"the same images in each of {total} micro-steps, whichever launch makes it",
        advice="report it as a fault of latentvae's, with the number of images and the options",
    )
