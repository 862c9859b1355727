"""Windows, ranges and sizes, against pictures whose result is known."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.data import EvalTransform, TrainTransform, to_tensor
from latentvae.data.resampling import INTERPOLATIONS
from latentvae.data.transforms import CROPS, Window
from latentvae.errors import UserError

array8 = partial(np.array, dtype=np.uint8)
SIZES = [(1, 1), (1, 300), (300, 1), (7, 5), (64, 64), (200, 90), (90, 200)]


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column and green the row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(array8(np.stack([x, y, 0 * x], axis=-1)))


def test_the_range_is_exactly_minus_one_to_one():
    image = to_tensor(Image.fromarray(array8([[[0, 51, 255]]])))
    assert image.shape == (3, 1, 1) and image.dtype == torch.float32
    torch.testing.assert_close(image.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert image[0, 0, 0] == -1 and image[2, 0, 0] == 1


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_becomes_the_resolution(size, interpolation, make_picture):
    image = make_picture(*size)
    transforms = [TrainTransform(24, crop=crop, interpolation=interpolation) for crop in CROPS]
    results = [transform(image, np.random.default_rng(0)) for transform in transforms]
    for result in [*results, EvalTransform(24, interpolation=interpolation)(image)]:
        assert result.shape == (3, 24, 24) and result.is_contiguous()
        assert result.min() >= -1 and result.max() <= 1


def test_evaluation_takes_the_middle_and_does_not_resample_at_its_own_size():
    whole = to_tensor(ramp(31, 20))
    assert torch.equal(EvalTransform(20)(ramp(31, 20)), whole[:, :, 6:26])
    assert torch.equal(EvalTransform(20)(ramp(20, 31)), to_tensor(ramp(20, 31))[:, 6:26])


def test_evaluation_equals_resizing_the_shorter_side_and_cropping(make_picture):
    image = make_picture(120, 80)
    resized = to_tensor(image.resize((60, 40), Image.Resampling.LANCZOS))
    torch.testing.assert_close(EvalTransform(40)(image), resized[:, :, 10:50], atol=1e-6, rtol=0)


def test_downscaling_is_antialiased():
    checks = Image.fromarray(array8(np.indices((128, 128)).sum(0) % 2 * 255)).convert("RGB")
    for interpolation in INTERPOLATIONS:
        transform = TrainTransform(16, crop="center", interpolation=interpolation)
        assert transform(checks, np.random.default_rng(0)).abs().max() < 0.05


def test_a_random_crop_shows_whole_pixels_of_every_place():
    transform = TrainTransform(20, crop="random", random_flip=True)
    seen = set()
    for seed in range(300):
        image = transform(ramp(25, 20), np.random.default_rng(seed))
        columns = ((image[0, 0] + 1) * 127.5).round().int().tolist()
        seen.add((columns[0], columns[1] - columns[0]))
        assert sorted(columns) == list(range(min(columns), min(columns) + 20))
    first_columns = {left for left, step in seen if step == 1}
    assert first_columns == set(range(6)) and {step for _, step in seen} == {1, -1}


def test_a_random_resized_crop_keeps_the_aspect_and_its_scale():
    transform = TrainTransform(32, crop_scale=(0.5, 0.75))
    for seed in range(100):
        window = transform.draw(np.random.default_rng(seed))
        left, top, right, bottom = window.box((400, 300))
        assert right - left == bottom - top and 150 <= right - left <= 225
        assert 0 <= left and right <= 400 and 0 <= top and bottom <= 300


@pytest.mark.parametrize("size", SIZES)
def test_windows_stay_inside(size):
    for place in (0.0, 0.5, 0.999999, 1.0):
        left, top, right, bottom = Window(0.01, place, place).box(size)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_flipping_half_of_the_images_changes_no_other_draw():
    rngs = [np.random.default_rng(seed) for seed in range(1000)]
    plain = [TrainTransform(8).draw(np.random.default_rng(seed)) for seed in range(1000)]
    flipped = [TrainTransform(8, random_flip=True).draw(rng) for rng in rngs]
    assert [w.box((90, 70)) for w in plain] == [w.box((90, 70)) for w in flipped]
    assert not any(w.flip for w in plain) and 430 < sum(w.flip for w in flipped) < 570


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "centre"}, "did you mean 'center'"),
        ({"interpolation": "lanczoz"}, "did you mean 'lanczos'"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale must be two rising"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be two rising"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale must be two rising"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TrainTransform(32, **options)


def test_a_wrong_resolution_is_refused():
    for build in (TrainTransform, EvalTransform):
        with pytest.raises(UserError, match=r"resolution must be at least 1 pixel \(got 0\)"):
            build(0)
