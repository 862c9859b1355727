"""Measure image codecs on a picture: at fixed quality settings, and at the raw rates of models.

The raw rate of a model is the size of its latent in bits per pixel without entropy coding. Encoding
runs on the CPU and computes no metrics, so encoding can run in a thread while the models compute:

    files = thread.submit(encode_picture, picture, codecs, rates=[1.0])
    rows, at_rates = codec_rows(judge, original, codecs, files.result(), rates={"mine": 1.0})
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from PIL import Image

from latentvae.coding.image_codecs import Codec, encode_at_rate
from latentvae.data import to_tensor
from latentvae.evaluation.measures import Judge, Original, Row, row


@dataclass(frozen=True)
class Files:
    """The files that one codec made from a picture.

    Attributes:
        by_quality: dict from a quality setting to the bytes of the file.
        at_rate: dict from the raw rate of a model to the lowest quality that reaches this rate, or
            to 100 if no quality does. The raw rate is the size of the latent in bits per pixel
            without entropy coding.
    """

    by_quality: Mapping[int, bytes]
    at_rate: Mapping[float, int]


def encode_picture(
    picture: Image.Image, codecs: Mapping[str, Codec], *, rates: Collection[float]
) -> dict[str, Files]:
    """Encode a picture with every codec whose format supports the picture's size.

    Args:
        rates: bits per pixel of the models' latents without entropy coding. For each of these
            rates, `Files.at_rate` gets a quality.
    """
    found: dict[str, Files] = {}
    for name, codec in codecs.items():
        if max(picture.size) > codec.max_side:
            continue
        files = {quality: codec.encode(picture, quality=quality) for quality in codec.qualities}
        at_rate = {
            rate: encode_at_rate(codec, picture, bpp=rate, files=files)[1] for rate in set(rates)
        }
        kept = {*codec.qualities, *at_rate.values()}
        found[name] = Files({quality: files[quality] for quality in kept}, at_rate)
    return found


def codec_rows(
    judge: Judge,
    original: Original,
    codecs: Mapping[str, Codec],
    encoded: Mapping[str, Files],
    *,
    rates: Mapping[str, float],
) -> tuple[list[Row], dict[str, list[Row]]]:
    """Decode the files of a picture, and return the rates and metrics as rows.

    Args:
        encoded: the result of `encode_picture`.
        rates: dict from a model's name to the bits per pixel of its latent without entropy coding.

    Returns:
        First, the rows of all codecs at fixed quality settings. Second, for each model, one row per
        codec at the quality that `Files.at_rate` has for the model's rate.
    """
    rows: list[Row] = []
    matched: dict[str, list[Row]] = {model: [] for model in rates}

    for name, files in encoded.items():
        measured = _rows_by_quality(judge, original, name, codecs[name], files.by_quality)
        rows += [measured[quality] for quality in codecs[name].qualities]
        for model, rate in rates.items():
            found, label = measured[files.at_rate[rate]], f"{name} at {model}"
            matched[model].append(replace(found, kind="codec_at_rate", coder=label))
    return rows, matched


def _rows_by_quality(
    judge: Judge, original: Original, name: str, codec: Codec, files: Mapping[int, bytes]
) -> dict[int, Row]:
    device = original.images.device
    recons = [to_tensor(codec.decode(content))[None].to(device) for content in files.values()]
    metrics = judge.compare_points(original, recons)
    return {
        quality: row(
            original,
            "codec",
            name,
            setting=quality,
            bpp=8 * len(content) / original.pixels,
            **found,
        )
        for (quality, content), found in zip(files.items(), metrics, strict=True)
    }
