"""The sprites are the shapes that their factors say, the same bytes everywhere, read as asked."""

import hashlib
import pickle

import numpy as np
import pytest
import torch

from latentvae.data import (
    EvalTransform,
    PixelFormat,
    Sprites,
    Subset,
    TrainImages,
    TrainTransform,
    open_images,
    open_source,
    to_tensor,
    train_loader,
)
from latentvae.data.sprites import (
    COUNT,
    FACTORS,
    SIZES,
    draw_sprites,
    sample_sprite_factors,
    sprite_factors,
    sprite_indices,
)
from latentvae.errors import UserError

SQUARE, ELLIPSE, HEART = range(3)


def grid(**fixed: int) -> np.ndarray:
    """All combinations of the factors that are not fixed, (N, 5)."""
    values = [np.arange(n) for n in SIZES]
    for name, value in fixed.items():
        values[FACTORS.index(name)] = np.array([value])
    return np.stack(np.meshgrid(*values, indexing="ij"), axis=-1).reshape(-1, 5)


def center(images: np.ndarray) -> np.ndarray:
    """Centre of mass of each image, (N, 2): x and y in pixels."""
    mass = images / images.sum((1, 2), keepdims=True)
    pixels = np.arange(64)
    return np.stack([(mass.sum(1) * pixels).sum(1), (mass.sum(2) * pixels).sum(1)], axis=1)


def test_numbers_and_factors_are_inverse_and_the_last_changes_fastest() -> None:
    assert COUNT == 737_280
    numbers = np.random.default_rng(0).integers(0, COUNT, 1000)
    assert (sprite_indices(sprite_factors(numbers)) == numbers).all()
    assert sprite_factors([0, 1, 32, COUNT - 1]).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 1, 0],
        [2, 5, 39, 31, 31],
    ]


def test_every_byte_is_the_same_everywhere() -> None:
    images = draw_sprites(grid(x=7, y=20))
    assert images.shape == (720, 64, 64) and set(np.unique(images)) == {0, 255}
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    assert digest == "ac1c1cbfc7a451ad91dbb7b0cc879d4dead65329762f7b71b22d3c2966401519"


def test_positions_move_the_same_pixels_by_one() -> None:
    images = draw_sprites(grid(shape=HEART, scale=3, rotation=11)).reshape(32, 32, 64, 64)
    assert (images[5, 9] == np.roll(images[4, 9], 1, axis=1)).all()  # x: to the right
    assert (images[5, 9] == np.roll(images[5, 8], 1, axis=0)).all()  # y: down
    assert len({image.tobytes() for image in images.reshape(-1, 64, 64)}) == 1024
    for edge in (images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]):
        assert not edge.any()


def test_the_centre_of_mass_is_the_position() -> None:
    factors = grid(x=3, y=28)
    assert np.abs(center(draw_sprites(factors)) - [16 + 3, 16 + 28]).max() < 0.4


def test_the_area_grows_with_the_square_of_the_scale() -> None:
    area = (draw_sprites(grid(x=0, y=0)) > 0).sum((1, 2)).reshape(3, 6, 40).mean(2)
    exact = np.array([(2 * 9.2) ** 2, np.pi * 12.9 * 7.7, 3.6595 * 9.25**2])  # formulas
    scale = np.arange(5, 11) / 10
    assert np.allclose(area, exact[:, None] * scale**2, rtol=0.03)


def test_shapes_have_their_symmetries_and_no_others() -> None:
    images = draw_sprites(grid(x=16, y=16)).reshape(3, 6, 40, 64, 64)
    for shape, turns in ((SQUARE, 10), (ELLIPSE, 20), (HEART, 40)):
        repeated = images[shape, :, np.arange(40) % turns].swapaxes(0, 1)
        assert (images[shape] == repeated).all()
        assert len({image.tobytes() for image in images[shape].reshape(-1, 64, 64)}) == 6 * turns
    heart = images[HEART, 2, :, 1:, 1:]  # the centre is in the middle
    assert (np.rot90(heart[0], k=-1) == heart[10]).all()  # clockwise
    upright = images[HEART, 5, 0]
    assert (upright[:, 1:] == upright[:, :0:-1]).all()  # left and right
    width = (upright > 0).sum(1)
    assert width[width > 0][-1] < 4 < width[width > 0][1]  # the tip is below


def test_wrong_factors_and_numbers_are_named() -> None:
    with pytest.raises(UserError, match=r"rotation must lie in 0\.\.39 \(got 0 to 40\)"):
        draw_sprites(np.array([[0, 0, 0, 0, 0], [0, 0, 40, 0, 0]]))
    with pytest.raises(UserError, match=r"integers \(N, 5\)"):
        draw_sprites(np.zeros((2, 5)))
    with pytest.raises(UserError, match="0 to 737279"):
        sprite_factors([COUNT])


def test_sampled_factors_cover_every_value() -> None:
    factors = sample_sprite_factors(5000, np.random.default_rng(0))
    assert [len(np.unique(column)) for column in factors.T] == list(SIZES)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_source_reads_what_is_drawn_in_the_channels_asked_for(channels: int) -> None:
    source = open_source("sprites", pixels=PixelFormat(channels))
    assert isinstance(source, Sprites)
    for number in (0, 123_456, COUNT - 1):
        drawn = torch.from_numpy(draw_sprites(sprite_factors([number]))[0]) / 127.5 - 1
        read = to_tensor(source.read(number))
        assert source.size(number) == source.read(number).size == (64, 64)
        assert torch.equal(read[: min(channels, 3)], drawn.expand(min(channels, 3), 64, 64))
        assert channels < 4 or (read[3] == 1).all()
    assert to_tensor(open_source("sprites").read(5)).shape == (3, 64, 64)


def test_names_are_sorted_and_some_images_are_held_out() -> None:
    source = Sprites()
    names = [source.name(i) for i in (0, 9, 10, 99_999, 100_000, COUNT - 1)]
    assert names == sorted(names)
    train, held_out = open_images("sprites", max_train_samples=100, seed=3)
    assert len(train) == 100 and abs(len(held_out) / COUNT - 0.02) < 0.002


def test_half_the_size_keeps_the_shape() -> None:
    source = Sprites(pixels=PixelFormat(1))
    number = int(sprite_indices(np.array([[HEART, 5, 0, 10, 20]]))[0])
    small = (EvalTransform(32)(source.read(number))[0] + 1) / 2
    large = (to_tensor(source.read(number))[0] + 1) / 2
    pooled = large.unflatten(0, (32, 2)).unflatten(2, (32, 2)).mean((1, 3))
    assert (small - pooled).abs().max() < 0.3 and (small - pooled).abs().mean() < 0.01
    assert abs(small.sum() * 4 / large.sum() - 1) < 0.02


def test_workers_read_the_same_images() -> None:
    source = Subset(Sprites(pixels=PixelFormat(1)), [5, 70_000, 700_000, 8])
    copy = pickle.loads(pickle.dumps(source))
    dataset = TrainImages(copy, TrainTransform(64, crop="center"), seed=0)
    (batch,) = train_loader(dataset, [[(0, 1), (0, 2)]], num_workers=1)
    assert (batch.images[:, 0].numpy() == draw_sprites(sprite_factors([70_000, 700_000]))).all()


def test_a_folder_of_the_same_name_is_not_taken_silently(tmp_path, monkeypatch) -> None:
    (tmp_path / "sprites").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Write './sprites' for the folder"):
        open_source("sprites")
