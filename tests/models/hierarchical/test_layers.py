"""The strings that describe the blocks of a hierarchical VAE."""

import pytest

from latentvae.errors import UserError
from latentvae.models.hierarchical.layers import (
    Layer,
    check_blocks,
    decoder_layers,
    encoder_layers,
    fit,
    resolution_widths,
)


def test_an_encoder_reads_counts_and_poolings():
    layers = encoder_layers("28x2,28d2,14,14d2, 7d7,1x2")
    plain = [Layer(28), Layer(28), Layer(28, pool=2), Layer(14), Layer(14, pool=2)]
    assert layers == [*plain, Layer(7, pool=7), Layer(1), Layer(1)]


def test_a_decoder_reads_counts_and_sources():
    layers = decoder_layers("1x2,7m1,7x2,14m7,28m7")
    coarse = [Layer(1), Layer(1), Layer(7, source=1), Layer(7), Layer(7)]
    assert layers == [*coarse, Layer(14, source=7), Layer(28, source=7)]


def test_very_deep_vaes_string_has_its_43_groups():
    text = "1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21"
    assert len(decoder_layers(text)) == 43


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "got ''"),
        ("32y2", "'32y2'"),
        ("32m2", "such as 32x11 or 32d2"),
        ("32x0", "1 or above"),
        ("32d2,8x2", "'8x2' where the maps have side 16"),
        ("32d2,32x1", "'32x1' where the maps have side 16"),
        ("32d3", "3 does not divide 32"),
        ("32x1001", "at most 1000"),
    ],
)
def test_a_wrong_encoder_is_named(text: str, words: str):
    with pytest.raises(UserError, match="enc_blocks") as error:
        encoder_layers(text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4d2", "such as 4x2 or 8m4"),
        ("1x1,4m2", "resolution of an earlier block (1)"),
        ("3x1,4m3", "that divides 4"),
        ("4m4", "(none)"),
        ("1x1,4x2", "Put '4m1' before it"),
    ],
)
def test_a_wrong_decoder_is_named(text: str, words: str):
    with pytest.raises(UserError, match="dec_blocks") as error:
        decoder_layers(text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("side", "encoder", "decoder", "fitted"),
    [(32, 32, 32, 32), (28, 32, 32, 32), (28, 7, 14, 28), (28, 28, 14, 28), (30, 32, 16, 32)],
)
def test_edges_are_added_where_maps_do_not_fit(side: int, encoder: int, decoder: int, fitted: int):
    assert fit(side, encoder=encoder, decoder=decoder) == fitted


@pytest.mark.parametrize(("encoder", "decoder"), [(33, 33), (32, 28), (64, 64), (16, 14)])
def test_maps_that_fit_no_image_are_named(encoder: int, decoder: int):
    with pytest.raises(UserError, match=f"starts at resolution {encoder} and .* at {decoder}"):
        fit(28, encoder=encoder, decoder=decoder)


def test_widths_of_some_resolutions_differ():
    assert resolution_widths("32:8, 4:64", 16, {32, 16, 4}) == {4: 64, 16: 16, 32: 8}


@pytest.mark.parametrize("text", ["8:16", "32", "32:0", "32:a", "32:8;4:64"])
def test_wrong_widths_are_named(text: str):
    with pytest.raises(UserError, match="custom_widths"):
        resolution_widths(text, 16, {32, 16, 4})


def test_encoder_blocks_that_nothing_reads_are_named():
    with pytest.raises(UserError, match="goes down to resolution 1, but dec_blocks starts at 4"):
        check_blocks("8x1,8d2,4x1,4d4,1x2", "4x1,8m4", "")
