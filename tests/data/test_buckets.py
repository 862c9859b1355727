"""Aspect-ratio buckets: sizes, who goes where, and the order, by exhaustive check."""

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from latentvae.data import (
    BucketSampler,
    DatasetSpec,
    HubImages,
    ImageFolder,
    SamplePhotos,
    TarShards,
    TrainImages,
    TrainTransform,
    UnreadableImage,
    aspect_ratios,
    assign,
    bucket_sizes,
    train_loader,
)
from latentvae.data.sizes import read_size
from latentvae.data.transforms import Window

RATIOS = np.exp(np.random.default_rng(0).normal(0, 0.5, 97))
SIZES = bucket_sizes((64, 64), 5, multiple=8)


def test_sizes_have_about_the_area_and_sides_that_divide():
    assert bucket_sizes((256, 256), 1, multiple=8) == ((256, 256),)
    sizes = bucket_sizes((256, 256), 5, multiple=16)
    assert sizes == ((368, 176), (304, 208), (256, 256), (208, 304), (176, 368))
    for resolution, count, multiple in [((512, 512), 9, 8), ((256, 384), 7, 32), ((64, 64), 3, 8)]:
        sizes = bucket_sizes(resolution, count, multiple=multiple)
        ratios = [width / height for height, width in sizes]
        assert ratios == sorted(set(ratios)) and len(sizes) <= count
        area = resolution[0] * resolution[1]
        for height, width in sizes:
            assert height % multiple == width % multiple == 0
            assert abs(height * width / area - 1) < 0.2


def test_images_go_to_the_nearest_shape_and_no_bucket_is_too_small():
    free = assign(RATIOS, SIZES, at_least=1)
    for ratio, bucket in zip(RATIOS, free.of, strict=True):
        distances = [abs(np.log(ratio * height / width)) for height, width in free.sizes]
        assert distances[bucket] == min(distances)
    for at_least in (1, 4, 20, 40, 97):
        buckets = assign(RATIOS, SIZES, at_least=at_least)
        assert np.bincount(buckets.of, minlength=len(buckets.sizes)).min() >= at_least
        assert set(buckets.sizes) <= set(SIZES)
    assert len(buckets.sizes) == 1
    counts = np.bincount(free.of, minlength=len(SIZES))
    assert free.describe().count(":") == len(SIZES) and f"64 x 64: {counts[2]}" in free.describe()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch(world_size):
    batch = 4
    buckets = assign(RATIOS, SIZES, at_least=batch * world_size)
    samplers = [
        BucketSampler(buckets, batch, seed=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = samplers[0].steps_per_epoch
    counts = np.bincount(buckets.of)
    assert steps == sum(count // (batch * world_size) for count in counts)

    # batches of three epochs
    rows = [list(islice(sampler, 3 * steps)) for sampler in samplers]
    for epoch in range(3):
        seen: list[int] = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            together = [pair for rank in rows for pair in rank[step]]
            assert all(len(rank[step]) == batch for rank in rows)
            assert {pair[0] for pair in together} == {epoch}
            assert len({buckets.of[index] for _, index in together}) == 1  # on all ranks
            seen += [index for _, index in together]
        assert len(set(seen)) == len(seen) == steps * batch * world_size  # none comes twice
        left_out = counts - np.bincount(buckets.of[seen], minlength=len(counts))
        assert (left_out < batch * world_size).all()

    # one process gives the same order
    one = BucketSampler(buckets, batch * world_size, seed=3)
    joined = [[pair for rank in step for pair in rank] for step in zip(*rows, strict=True)]
    assert joined == list(islice(one, 3 * steps))


def test_the_order_is_mixed_changes_by_epoch_and_shows_every_image_in_time():
    buckets = assign(RATIOS, SIZES, at_least=4)
    sampler = BucketSampler(buckets, 4, seed=3)
    first = [buckets.of[row[0][1]] for row in islice(sampler, sampler.steps_per_epoch)]
    assert first != sorted(first)
    assert sampler.order(0) != sampler.order(1) != BucketSampler(buckets, 4, seed=4).order(1)
    assert {i for epoch in range(20) for i in sampler.order(epoch)} == set(range(97))


@pytest.mark.parametrize("start", [0, 1, 20, 22, 23, 24, 57])
def test_starting_at_a_step_is_the_same_as_getting_there(start):
    buckets = assign(RATIOS, SIZES, at_least=4)
    whole = list(islice(BucketSampler(buckets, 4, seed=3), start + 30))
    assert list(islice(BucketSampler(buckets, 4, seed=3, start_step=start), 30)) == whole[start:]


def test_headers_tell_the_size_that_decoding_gives(tmp_path: Path, make_picture):
    picture, folder = make_picture(37, 21), tmp_path / "images"
    folder.mkdir()
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("jpg", "png", "tif", "webp"):
            picture.save(folder / f"{orientation}.{kind}", exif=exif)
        deep = np.asarray(picture).astype(np.float32)
        tag = [(0x0112, "H", 1, orientation, True)]
        path = folder / f"deep{orientation}.tif"
        tifffile.imwrite(path, deep, photometric="rgb", extratags=tag)
    picture.convert("P").save(folder / "x.gif")
    np.save(folder / "array.npy", np.asarray(picture))
    images = ImageFolder(folder)
    assert len(images) == 22
    for i in range(len(images)):
        assert images.size(i) == images.read(i).size, images.name(i)


def test_every_source_tells_sizes(files: dict[str, bytes], photos: Path, make_tar, make_parquet,
                                  tmp_path: Path):  # fmt: skip
    folder = ImageFolder(photos)
    tar = TarShards(make_tar(tmp_path / "x.tar", files))
    cells = [{"bytes": data, "path": name} for name, data in files.items()]
    spec = DatasetSpec(name=str(make_parquet(tmp_path / "x.parquet", cells)),
                       cache_dir=str(tmp_path / "cache"))  # fmt: skip
    table = HubImages(spec)
    sizes = [folder.size(i) for i in range(12)]
    assert sizes == [folder.read(i).size for i in range(12)]
    assert sizes == [tar.size(i) for i in range(12)] == [table.size(i) for i in range(12)]
    samples = SamplePhotos("validation")
    assert [samples.size(i) for i in range(2)] == [samples.read(i).size for i in range(2)]


def test_headers_that_cannot_be_read(tmp_path: Path, make_picture):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"not an image")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    make_picture(30, 60).save(tmp_path / "good.png")
    images = ImageFolder(tmp_path)
    assert aspect_ratios(images).tolist() == [1, 1, 0.5, 1]
    with pytest.raises(UnreadableImage, match="known format"):
        read_size(io.BytesIO(b"not an image"), name="x")


def test_a_window_is_the_largest_of_its_shape(make_picture):
    assert Window().box((300, 200)) == (50, 0, 250, 200)
    assert Window().box((300, 200), (384, 256)) == (0, 0, 300, 200)
    assert Window().box((300, 200), (2, 1)) == (0, 25, 300, 175)
    assert Window().box((300, 200), (1, 2)) == (100, 0, 200, 200)
    assert Window(0.5, 0.0, 1.0).box((300, 200), (2, 1)) == (0, 125, 150, 200)
    for size in ((1, 9), (9, 1), (3, 2)):
        for shape in ((5, 1), (1, 5), (3, 2)):
            left, top, right, bottom = Window(0.3, 1, 1).box(size, shape)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_batches_are_of_one_size_even_where_an_image_is_replaced(tmp_path: Path, make_picture):
    for i in range(8):
        make_picture(*((60, 40) if i % 2 else (40, 60)), seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "8.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])  # its header is whole
    images = ImageFolder(tmp_path)
    buckets = assign(aspect_ratios(images), bucket_sizes((32, 32), 3, multiple=8), at_least=4)
    assert buckets.sizes == ((48, 24), (24, 48))
    dataset = TrainImages(images, TrainTransform(32), seed=0, buckets=buckets)
    runs = []
    for workers in (0, 2):
        loader = train_loader(dataset, BucketSampler(buckets, 4, seed=0), num_workers=workers)
        runs.append(list(islice(loader, 8)))
    for one, two in zip(*runs, strict=True):
        assert one.images.shape[2:] in buckets.sizes
        assert (one.images == two.images).all() and (one.indices == two.indices).all()
    assert any(batch.bad for batch in runs[0])
    assert {tuple(batch.images.shape[2:]) for batch in runs[0]} == set(buckets.sizes)
