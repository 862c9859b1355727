"""Image codecs: real files, more bits for more quality."""

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.coding.image_codecs import (
    CODECS,
    Codec,
    available_codecs,
    bits_per_pixel,
    encode_at_rate,
)
from latentvae.evaluation.codec_rows import codec_rows, encode_picture
from latentvae.evaluation.measures import Judge
from tests.evaluation.conftest import photo


@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
def test_more_quality_costs_more_and_is_closer(codec: Codec) -> None:
    source = np.asarray(photo(), dtype=float)
    files = [codec.encode(photo(), quality=quality) for quality in (5, 50, 95)]
    errors = [
        np.square(np.asarray(codec.decode(file), dtype=float) - source).mean() for file in files
    ]
    assert [len(file) for file in files] == sorted(len(file) for file in files)
    assert errors == sorted(errors, reverse=True)
    assert codec.describe()["library"].split()[1] != "None"


def test_encode_at_rate_takes_the_smallest_file_that_is_large_enough() -> None:
    codec, picture = CODECS["jpeg"], photo()
    content, quality = encode_at_rate(codec, picture, bpp=3.0)
    assert bits_per_pixel(content, picture) >= 3.0
    assert bits_per_pixel(codec.encode(picture, quality=quality - 1), picture) < 3.0
    largest = max(len(codec.encode(picture, quality=q)) for q in range(1, 101))
    assert len(encode_at_rate(codec, picture, bpp=1000.0)[0]) == largest


@pytest.mark.parametrize("known", [(), (10, 50, 90), (1, 100)])
def test_encode_at_rate_finds_the_quality_in_few_files(known: tuple[int, ...]) -> None:
    rng, picture = np.random.default_rng(0), Image.new("RGB", (10, 8))
    encoded = 0
    for bpp in rng.uniform(0.1, 400, size=60):
        sizes = np.sort(np.exp(rng.uniform(0, 8, size=101)).astype(int) + 1)
        codec: Any = SimpleNamespace(encode=lambda _, quality, sizes=sizes: bytes(sizes[quality]))
        files = {quality: bytes(sizes[quality]) for quality in known}
        content, quality = encode_at_rate(codec, picture, bpp=bpp, files=files)
        enough = [q for q in range(1, 101) if 8 * sizes[q] / 80 >= bpp]
        assert quality == min(enough, default=100) and len(content) == sizes[quality]
        encoded += len(files) - len(known)
    assert encoded / 60 < 7.5  # halving needs 7 files, if none is known


def test_rows_are_of_real_files() -> None:
    pixels = np.asarray(photo(), dtype=np.float32)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    judge = Judge({})
    original = judge.original("a", 0, images)
    codecs = {"jpeg": Codec("JPEG", (20,))}
    files = encode_picture(photo(), codecs, rates=[])
    (row,), _ = codec_rows(judge, original, codecs, files, rates={})
    buffer = io.BytesIO()
    photo().save(buffer, format="JPEG", quality=20)
    error = np.mean((np.asarray(Image.open(buffer), dtype=np.float64) - pixels) ** 2)
    assert (row.kind, row.coder, row.setting) == ("codec", "jpeg", 20)
    assert row.bpp == 8 * len(buffer.getvalue()) / (64 * 48)
    assert row.metrics["psnr"] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-4)


def test_a_codec_that_pillow_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentvae.coding.image_codecs.features.check", lambda name: name != "avif")
    assert set(available_codecs((50,))) == {"jpeg", "webp"}
    assert available_codecs((50,))["jpeg"].qualities == (50,)
