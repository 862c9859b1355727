"""Windows resized by torch beside Pillow's, to the level; and the one way from 8 bits to floats."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.data import EvalTransform, TrainTransform, normalised, read_image
from latentvae.data.resampling import INTERPOLATIONS, resized_window
from latentvae.data.transforms import Window
from latentvae.errors import UserError


def noisy(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours under noise, as photos have them."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 4), dtype=np.uint8), "RGBA")
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    noise = smooth + rng.normal(0, 12, smooth.shape)
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8)).convert(mode)


def both(image, box, size, name):
    return (
        resized_window(image, box, size, interpolation=name, resize_with=by).int()
        for by in ("torch", "pillow")
    )


@pytest.mark.parametrize("name", INTERPOLATIONS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(64, 64), (120, 50), (160, 140)])  # (width, height)
def test_torch_is_at_most_a_level_from_pillow(name, mode, size):
    for box in ((0, 0, 250, 180), (30, 10, 190, 150), (0, 2, 250, 180), (90, 0, 250, 150)):
        ours, pillows = both(noisy(250, 180, mode), box, size, name)
        off = (ours - pillows).abs()  # also at the window's edges, over which Pillow looks
        assert off.max() <= 1 and (off > 0).float().mean() < 0.03


@pytest.mark.parametrize("name", INTERPOLATIONS)
@pytest.mark.parametrize("resize_with", ["torch", "pillow"])
def test_a_window_of_the_right_size_is_not_resampled(name, resize_with):
    image, box = noisy(90, 70), (11, 3, 71, 53)
    window = resized_window(image, box, (60, 50), interpolation=name, resize_with=resize_with)
    assert np.array_equal(window.permute(1, 2, 0), np.asarray(image.crop(box)))
    assert window.is_contiguous()


@pytest.mark.parametrize(
    ("mode", "box", "size"),
    [
        ("RGBA", (5, 5, 85, 65), (40, 30)),
        ("RGB", (0, 0, 90, 70), (20, 17)),
        ("RGB", (10, 10, 50, 50), (40, 41)),
    ],
)
def test_alpha_and_windows_that_shrink_much_or_grow_are_left_to_pillow(mode, box, size):
    ours, pillows = both(noisy(90, 70, mode), box, size, "lanczos")
    assert torch.equal(ours, pillows)


def test_a_picture_of_several_blocks_of_memory_gives_what_its_window_gives():
    image = noisy(400, 300).resize((2400, 2100))  # Pillow's blocks are of 16 MiB
    box = (100, 900, 700, 1500)
    with pytest.raises(ValueError):
        image.__arrow_c_array__()
    ours, pillows = both(image, box, (256, 256), "bicubic")
    assert (ours - pillows).abs().max() == 1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pillows_windows_are_the_plain_way_to_the_bit(mode, flip):
    """What every training crop was before torch resized them."""
    image, window = noisy(140, 100, mode), Window(0.8, 0.3, 0.6, flip=flip)
    plain = image.resize(
        (32, 32), Image.Resampling.LANCZOS, box=window.box(image.size), reducing_gap=2.0
    )
    if flip:
        plain = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    expected = torch.from_numpy(np.array(plain)).float().div(127.5).sub(1)
    expected = expected[None] if mode == "L" else expected.permute(2, 0, 1)
    found = TrainTransform(32, resize_with="pillow").apply(image, window)
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert torch.equal(normalised(found), expected)


def test_every_level_becomes_the_float_nearest_to_it():
    levels = torch.arange(256, dtype=torch.uint8)
    expected = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(normalised(levels).numpy(), expected)
    floats = torch.rand(3)
    assert normalised(floats) is floats


def test_a_jpeg_decoded_smaller_gives_nearly_what_the_whole_file_gives():
    """At least 40 dB, far above what JPEG itself loses of so much noise; and only where allowed."""
    file = io.BytesIO()
    noisy(1200, 900, seed=1).save(file, "JPEG", quality=90)
    window, sides, shown = Window(0.9, 0.4, 0.7), [], []
    for draft in (True, False):
        transform = TrainTransform(192, jpeg_draft=draft)
        image = read_image(file.getvalue(), at_least=transform.needed_side([window]))
        sides.append(min(image.size))
        shown.append(transform.apply(image, window).float())
    assert sides == [450, 900]
    error = (shown[0] - shown[1]).square().mean().item()
    assert 0 < error and 10 * np.log10(255**2 / error) > 40
    near = TrainTransform(256).needed_side([window])  # not two times as many pixels as are needed
    assert min(read_image(file.getvalue(), at_least=near).size) == 900


def test_several_windows_need_what_the_narrowest_needs():
    transform = TrainTransform(100)
    assert transform.needed_side([Window(1.0), Window(0.5), Window(0.8)]) == 400
    assert TrainTransform(100, jpeg_draft=False).needed_side([Window()]) is None


def test_evaluation_is_pillows_to_the_bit():
    image = noisy(150, 100)
    plain = image.resize((40, 40), Image.Resampling.LANCZOS, box=(25, 0, 125, 100))
    expected = torch.from_numpy(np.array(plain)).permute(2, 0, 1).float().div(127.5).sub(1)
    assert torch.equal(EvalTransform(40)(image), expected)


def test_an_unknown_resizer_is_refused():
    with pytest.raises(
        UserError, match=r"resize_with must be .*\(got 'pilow'\).*did you mean 'pillow'"
    ):
        TrainTransform(32, resize_with="pilow")
