"""Compute the order of images from seed, step and rank.

To continue at the right image, a resumed run needs only the number of steps already done.
"""

from collections.abc import Iterator

from torch.utils.data import Sampler

from latentvae.data.random_draws import Stream, counter_rng
from latentvae.errors import UserError


class IndexSampler(Sampler[list[tuple[int, int]]]):
    """An endless sampler that yields a list of (epoch, image index) for each micro-step of a rank.

    A micro-step is one forward and backward pass. No image is used twice in an epoch. Each epoch
    leaves out fewer images than one joint batch, which has the B * W images of all W ranks. Each
    epoch has its own random order of the images. At step s of an epoch the joint batch is
    ``order[s*B*W : (s+1)*B*W]``, and rank r takes the r-th (from 0) of W equal parts of the joint
    batch. So two ranks see the same images as one process with twice the batch size.

    Args:
        num_items: number of images.
        batch_size: B, images per rank and micro-step.
        seed: seed of the order, 0 or above.
        rank: number of this process, 0 to ``world_size - 1``.
        world_size: W, number of processes.
        start_step: number of micro-steps already done, over all epochs.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        assert 0 <= rank < world_size and start_step >= 0
        _check_sizes(num_items, batch_size, world_size)
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.steps_per_epoch = num_items // (batch_size * world_size)

    def order(self, epoch: int) -> list[int]:
        """Return the numbers of all images in the order of an epoch."""
        return counter_rng(Stream.ORDER, self.seed, epoch).permutation(self.num_items).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = divmod(self.start_step, self.steps_per_epoch)
        while True:
            order = self.order(epoch)
            for first in range(step, self.steps_per_epoch):
                start = (first * self.world_size + self.rank) * self.batch_size
                yield [(epoch, index) for index in order[start : start + self.batch_size]]
            epoch, step = epoch + 1, 0


def _check_sizes(num_items: int, batch_size: int, world_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1 (got {batch_size}).")
    if num_items < world_size:
        raise UserError(
            f"{num_items} images are too few for {world_size} processes. Use at most {num_items}."
        )
    if num_items < batch_size * world_size:
        joint = f"{batch_size} x {world_size} processes" if world_size > 1 else str(batch_size)
        most = num_items // world_size
        raise UserError(
            f"{num_items} images are too few for a batch of {joint}. "
            f"Use a batch size of at most {most}."
        )
