"""Embedded colour profiles become sRGB at every depth, and broken ones cost one line."""

import io
import re

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from latentvae.data import PixelFormat, read_image
from latentvae.data.colour_profiles import _say_ignored, _say_mismatch, profile_space
from latentvae.data.pixels import DeepImage
from tests.icc import ADOBE_RGB, CURVES, LINEAR_GREY, rgb_profile

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREEN = (60, 180, 60)
RAW = PixelFormat(ignore_icc=True, keep_depth=False)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep_tiff(values: np.ndarray, profile: bytes) -> bytes:
    file = io.BytesIO()
    kind = "rgb" if values.ndim == 3 else "minisblack"
    tifffile.imwrite(file, values, photometric=kind, iccprofile=profile)
    return file.getvalue()


@pytest.fixture(autouse=True)
def _say_again():
    for cached in (_say_ignored, _say_mismatch, profile_space):
        cached.cache_clear()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_adobe_rgb_becomes_srgb_in_every_mode(kind, mode):
    if kind == "WEBP" and mode == "P":
        pytest.skip("WebP has no palette mode")
    image = Image.new("RGB", (8, 8), GREEN)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(image, kind, icc_profile=ADOBE_RGB, **options)
    for pixels in (None, PixelFormat()):
        found = read_image(data, pixels=pixels)
        assert found.getpixel((4, 4)) == (0, 181, 42) and "icc_profile" not in found.info
    assert read_image(data, pixels=RAW).getpixel((4, 4)) == GREEN
    assert read_image(data, pixels=PixelFormat(ignore_icc=True)).getpixel((4, 4)) == GREEN


def test_a_jpeg_of_adobe_rgb_becomes_srgb_also_when_decoded_smaller():
    data = saved(Image.new("RGB", (64, 64), GREEN), "JPEG", icc_profile=ADOBE_RGB, quality=100)
    for at_least in (None, 16):
        found = np.asarray(read_image(data, at_least=at_least))
        assert np.abs(found[0, 0].astype(int) - (0, 181, 42)).max() <= 3


def test_alpha_stays_and_a_hidden_colour_stays_hidden():
    image = Image.new("RGBA", (2, 2), (*GREEN, 77))
    found = read_image(saved(image, "PNG", icc_profile=ADOBE_RGB), pixels=PixelFormat(4))
    assert found.getpixel((0, 0)) == (0, 181, 42, 77)
    keyed = saved(Image.new("RGB", (2, 2), GREEN), "PNG", icc_profile=ADOBE_RGB, transparency=GREEN)
    assert read_image(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_an_srgb_profile_changes_no_bit(make_picture):
    image = make_picture(40, 30)
    plain = np.asarray(read_image(saved(image, "PNG")))
    assert np.array_equal(plain, read_image(saved(image, "PNG", icc_profile=SRGB)))
    grey = image.convert("L")
    assert np.array_equal(grey, read_image(saved(grey, "PNG", icc_profile=SRGB)).convert("L"))


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_profiles_apply_to_grey_pictures(mode):
    image = Image.new("L", (2, 2), 55).convert(mode)  # linear 55 / 255 is 128 in sRGB
    data = saved(image, "PNG", icc_profile=LINEAR_GREY)
    assert read_image(data).getpixel((0, 0)) == (128, 128, 128)
    assert read_image(data, pixels=PixelFormat(1)).getpixel((0, 0)) == 128


def test_a_grey_picture_takes_the_profile_of_colour_ones():
    data = saved(Image.new("L", (2, 2), 55), "PNG", icc_profile=rgb_profile(CURVES["linear"]))
    assert abs(read_image(data, pixels=PixelFormat(1)).getpixel((0, 0)) - 128) <= 1


@pytest.mark.parametrize("name", CURVES)
def test_deep_pictures_agree_with_the_library_to_half_a_level(name, make_picture):
    """Every kind of curve, on 16-bit PNG and TIFF and on float TIFF: the oracle is LittleCMS."""
    profile, photo = rgb_profile(CURVES[name]), make_picture(24, 16)
    expected = np.asarray(read_image(saved(photo, "PNG", icc_profile=profile))).astype(float)
    values = np.asarray(photo)
    files = [deep_tiff(values.astype(np.uint16) * 257, profile)]
    files.append(deep_tiff((values / 255).astype(np.float32), profile))
    for data in files:
        found = read_image(data, pixels=PixelFormat())
        assert isinstance(found, DeepImage)
        levels = (found.to_array().transpose(1, 2, 0) + 1) * 127.5
        assert np.abs(levels - expected).max() < 1.3
        assert np.abs(levels - expected).mean() < 0.5
        raw = read_image(data, pixels=PixelFormat(ignore_icc=True)).to_array()
        assert np.abs((raw.transpose(1, 2, 0) + 1) * 127.5 - values).max() < 0.01


def test_a_range_is_for_the_stored_numbers_of_eight_bits_too():
    """200 is white, so (60, 180, 60) is 0.3 and 0.9 of it, and these are AdobeRGB's numbers."""
    data = saved(Image.new("RGB", (2, 2), GREEN), "PNG", icc_profile=ADOBE_RGB)
    found = read_image(data, pixels=PixelFormat(value_range=(0, 200)))
    full = read_image(saved(Image.new("RGB", (2, 2), (76, 230, 76)), "PNG", icc_profile=ADOBE_RGB))
    assert isinstance(found, DeepImage)
    ours = np.asarray(found.to_8bit())[0, 0].astype(int)
    assert np.abs(ours - np.asarray(full)[0, 0]).max() <= 2


def test_sixteen_bits_keep_their_depth_through_a_profile():
    ramp = np.arange(30000, 30256, dtype=np.uint16)
    for profile, values in (
        (ADOBE_RGB, np.repeat(ramp[None, :, None], 3, axis=2)),
        (LINEAR_GREY, ramp[None]),
    ):
        found = read_image(deep_tiff(values, profile), pixels=PixelFormat())
        assert (np.diff(found.to_array()[1, 0]) > 0).all()
    grey = Image.fromarray(np.full((2, 2), round(65535 * 55 / 255), np.uint16))
    data = saved(grey, "PNG", icc_profile=LINEAR_GREY)
    assert read_image(data).getpixel((0, 0)) == (128, 128, 128)
    deep = read_image(data, pixels=PixelFormat(1)).to_array()
    assert (deep[0, 0, 0] + 1) * 127.5 == pytest.approx(128.1, abs=0.3)


@pytest.mark.parametrize(
    ("mode", "profile", "said"),
    [
        ("RGB", b"not a profile", "cannot be read"),
        ("RGB", ADOBE_RGB[:300], "cannot be read|cannot convert"),
        ("RGB", LINEAR_GREY, "the profile is for GRAY and the picture is RGB"),
        ("CMYK", ADOBE_RGB, "the profile is for RGB and the picture is CMYK"),
        ("L", b"\0" * 200, "cannot be read"),
    ],
)
def test_a_broken_profile_is_ignored_with_one_line(mode, profile, said, caplog):
    image = Image.new(mode, (2, 2), 200 if mode == "L" else 0)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    plain = read_image(saved(image, kind))
    for _ in range(2):
        found = read_image(saved(image, kind, icc_profile=profile))
        assert np.array_equal(found, plain)
    assert len(caplog.messages) == 1
    assert re.search(said, caplog.messages[0]) and "sRGB is assumed" in caplog.messages[0]


def test_a_deep_picture_with_a_broken_profile_is_read_as_it_is():
    values = np.full((2, 2, 3), 40000, np.uint16)
    for profile in (b"junk", ADOBE_RGB[:200]):
        found = read_image(deep_tiff(values, profile), pixels=PixelFormat()).to_array()
        assert np.allclose((found + 1) / 2, 40000 / 65535)
