"""Batches: the same whatever the workers, ranks or past; bad files replaced and reported."""

import logging
import os
import signal
from itertools import islice

import numpy as np
import pytest
import torch

from latentvae.data import (
    BadImages,
    Batch,
    EvalTransform,
    ImageFolder,
    IndexSampler,
    PixelFormat,
    TrainImages,
    TrainTransform,
    UnreadableImage,
    collate,
    train_loader,
    validation_batches,
)
from latentvae.errors import UserError


def images(root, seed=3, crops=1):
    transform = TrainTransform(16, random_flip=True)
    return TrainImages(ImageFolder(root), transform, seed=seed, crops=crops)


def batches(root, count, *, num_workers=0, seed=3, crops=1, **options) -> list[Batch]:
    dataset = images(root, seed, crops)
    sampler = IndexSampler(len(dataset), seed=seed, **({"batch_size": 3} | options))
    return list(islice(train_loader(dataset, sampler, num_workers=num_workers), count))


def same(first: list[Batch], second: list[Batch]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) and a.bad == b.bad
        for a, b in pairs
    )


def spoil(root, *indices):
    folder = ImageFolder(root)
    for index in indices:
        (root / folder.name(index)).write_bytes(b"<html>")
    return [folder.name(index) for index in indices]


def test_a_batch(photos):
    batch = batches(photos, 1)[0]
    assert batch.images.shape == (3, 3, 16, 16) and batch.images.dtype == torch.uint8
    images = batch.on("cpu")
    assert torch.equal(images, batch.images.float() / 127.5 - 1) and batch.bad == []
    sampler = IndexSampler(12, 3, seed=3)
    assert batch.indices.tolist() == sampler.order(0)[:3]


def test_workers_change_nothing_and_the_global_generator_is_left_alone(photos):
    spoil(photos, 4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    plain = batches(photos, 9)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(plain, batches(photos, 9, num_workers=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_resumed_batches_and_two_ranks_equal_the_unbroken_single_run(photos):
    unbroken = batches(photos, 8)
    assert same(batches(photos, 3, start_step=5), unbroken[5:])
    joined = batches(photos, 5, batch_size=6)
    ranks = [batches(photos, 5, rank=rank, world_size=2) for rank in range(2)]
    for whole, first, second in zip(joined, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([first.images, second.images]))


def test_augmentation_differs_by_epoch_image_and_seed(photos):
    dataset = images(photos)
    first = dataset[(0, 5)]["crops"]
    assert torch.equal(first, dataset[(0, 5)]["crops"])
    for other in (dataset[(1, 5)], dataset[(0, 6)], images(photos, seed=4)[(0, 5)]):
        assert not torch.equal(first, other["crops"])


def test_several_crops_of_each_image_that_is_read(photos):
    single, several = batches(photos, 4), batches(photos, 8, crops=2)
    for batch, alone in zip(several, single, strict=False):
        assert batch.images.shape == (6, 3, 16, 16)
        assert batch.indices.tolist() == alone.indices.repeat_interleave(2).tolist()
        assert torch.equal(batch.images[::2], alone.images)
        for first, second in zip(batch.images[::2], batch.images[1::2], strict=True):
            assert not torch.equal(first, second)
    seen = torch.cat([batch.indices for batch in several[:4]])  # an epoch
    assert seen.bincount().tolist() == [2] * 12


def test_several_crops_are_the_same_for_any_workers_past_and_ranks(photos):
    several = batches(photos, 8, crops=2)
    assert same(batches(photos, 8, crops=2, num_workers=2), several)
    assert same(batches(photos, 3, crops=2, start_step=5), several[5:])
    joined = batches(photos, 4, crops=2, batch_size=6)
    ranks = [batches(photos, 4, crops=2, rank=rank, world_size=2) for rank in range(2)]
    for whole, first, second in zip(joined, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([first.images, second.images]))
        assert not set(first.indices.tolist()) & set(second.indices.tolist())


def test_a_batch_with_a_deep_image_is_of_floats(photos):
    array = np.random.default_rng(0).random((40, 40, 3), dtype=np.float32)
    np.save(photos / "deep.npy", array)
    (photos / "a" / "00.png").rename(photos / "photo.png")
    source = ImageFolder(photos, pixels=PixelFormat(3))
    items = TrainImages(source, TrainTransform(16, resize_with="pillow"), seed=0)
    names = [source.names.index(name) for name in ("deep.npy", "photo.png")]
    mixed = collate([items[(0, index)] for index in names])
    assert mixed.images.dtype == torch.float32 and mixed.on("cpu") is mixed.images
    alone = collate([items[(0, names[1])]])
    assert alone.images.dtype == torch.uint8
    assert torch.equal(mixed.images[1:], alone.on("cpu"))


def test_a_bad_file_is_replaced_and_named_always_in_the_same_way(photos):
    names = spoil(photos, 2, 7)
    item, again = images(photos)[(1, 2)], images(photos)[(1, 2)]
    assert item["index"] not in (2, 7) and torch.equal(item["crops"], again["crops"])
    assert item["bad"][0] == (names[0], "not an image of a known format")
    replacements = {images(photos)[(epoch, 2)]["index"] for epoch in range(30)}
    assert len(replacements) > 5 and not replacements & {2, 7}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_if_nothing_can_be_read_the_loader_stops(photos, num_workers):
    spoil(photos, *range(12))
    with pytest.raises(UnreadableImage, match="19 other images tried in its place"):
        batches(photos, 1, num_workers=num_workers)


def test_workers_are_out_of_reach_of_the_process_groups_signals(photos):
    loader = train_loader(images(photos), IndexSampler(12, 3, seed=3), num_workers=1)
    stream = iter(loader)
    next(stream)
    worker = stream._workers[0]  # pyright: ignore[reportAttributeAccessIssue]
    assert os.getpgid(worker.pid) == worker.pid != os.getpgrp()
    os.kill(worker.pid, signal.SIGTERM)  # from its trainer, as DataLoader does to shut it down
    worker.join(5)
    assert worker.exitcode == 0


def test_bad_images_are_counted_by_name_and_limited():
    bad = BadImages()
    assert bad.update([("a", "x"), ("b", "y"), ("a", "z")]) == [("a", "x"), ("b", "y")]
    assert bad.update([("b", "y"), ("c", "z")]) == [("c", "z")]
    assert len(bad) == 3
    bad.check(total=30, max_share=0.1)
    message = r"3 of 29 images \(10\.3%\) cannot be read\. At most 10\.0% of the .*'a' \(x\)"
    with pytest.raises(UserError, match=message):
        bad.check(total=29, max_share=0.1)


@pytest.mark.parametrize("world_size", [1, 2, 5, 20])
def test_validation_shows_each_image_exactly_once(photos, world_size):
    source, transform = ImageFolder(photos), EvalTransform(16)
    seen = {}
    for rank in range(world_size):
        for shown, names in validation_batches(
            source, transform, batch_size=3, rank=rank, world_size=world_size
        ):
            assert len(shown) == len(names) <= 3
            assert not seen.keys() & set(names)
            seen |= dict(zip(names, shown, strict=True))
    assert sorted(seen) == source.names
    for index, name in enumerate(source.names):
        assert torch.equal(seen[name], transform(source.read(index)))


def test_validation_leaves_out_and_reports_what_it_cannot_read(photos, caplog):
    names = spoil(photos, 0, 5)
    source, bad = ImageFolder(photos), BadImages()
    found = list(validation_batches(source, EvalTransform(8), batch_size=4, bad=bad))
    assert [len(shown) for shown, _ in found] == [4, 4, 2] and list(bad.reasons) == names
    with caplog.at_level(logging.WARNING):
        list(validation_batches(source, EvalTransform(8), batch_size=4))
    assert len(caplog.records) == 2 and all(name in caplog.text for name in names)
