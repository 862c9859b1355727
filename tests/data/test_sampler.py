"""The order of images: complete, shared out, and a function of its counters alone."""

from itertools import islice

import numpy as np
import pytest
import torch

from latentvae.data import IndexSampler
from latentvae.errors import UserError


def steps(count, **options):
    options = {"num_items": 23, "batch_size": 4, "seed": 5} | options
    return list(islice(IndexSampler(**options), count))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_in_an_epoch_no_image_comes_twice_and_only_the_tail_is_dropped(world_size):
    per_epoch = 23 // (4 * world_size)
    sampler = IndexSampler(23, 4, seed=5, world_size=world_size)
    assert sampler.steps_per_epoch == per_epoch
    ranks = [steps(3 * per_epoch, rank=r, world_size=world_size) for r in range(world_size)]
    for epoch in range(3):
        rows = [row for rank in ranks for row in rank[epoch * per_epoch : (epoch + 1) * per_epoch]]
        pairs = [pair for row in rows for pair in row]
        assert {pair[0] for pair in pairs} == {epoch}
        assert len({pair[1] for pair in pairs}) == len(pairs) == per_epoch * 4 * world_size


def test_two_ranks_together_are_one_process_with_the_joined_batch():
    ranks = [steps(9, batch_size=3, rank=r, world_size=2) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == steps(9, batch_size=6)


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 17])
def test_starting_at_a_step_is_the_same_as_getting_there(start):
    assert steps(8, start_step=start) == steps(start + 8)[start:]


def test_epochs_and_seeds_differ_and_all_images_come_in_time():
    sampler = IndexSampler(23, 4, seed=5)
    assert sampler.order(0) != sampler.order(1) != IndexSampler(23, 4, seed=6).order(1)
    assert sorted(sampler.order(7)) == list(range(23))
    assert {index for row in steps(25) for _, index in row} == set(range(23))


def test_the_global_generators_are_neither_read_nor_touched():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), str(np.random.get_state())
    first = steps(7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]
    torch.manual_seed(2)
    assert steps(7) == first


@pytest.mark.parametrize(
    ("num_items", "batch_size", "world_size", "message"),
    [
        (7, 8, 1, r"7 images are too few for a batch of 8\. Use a batch size of at most 7"),
        (7, 4, 2, r"7 images are too few for a batch of 4 x 2 processes\. .* of at most 3"),
        (3, 1, 4, r"3 images are too few for 4 processes\. Use at most 3"),
        (3, 0, 1, r"the batch size must be at least 1 \(got 0\)"),
    ],
)
def test_too_few_images_are_refused(num_items, batch_size, world_size, message):
    with pytest.raises(UserError, match=message):
        IndexSampler(num_items, batch_size, seed=0, world_size=world_size)
    IndexSampler(num_items, max(1, num_items // world_size), seed=0)
