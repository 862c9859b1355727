"""Export a trained network of any architecture: a tokenizer or an autoencoder."""

from pathlib import Path

from torch import Tensor

from latentvae.compute.precision import full_float32
from latentvae.export.card import ModelCard
from latentvae.export.continuous import export_autoencoder
from latentvae.export.discrete import TokenizerReport, export_tokenizer
from latentvae.export.export_report import ExportReport, Profile
from latentvae.latents import LatentStatistics
from latentvae.models import Network, calls


@full_float32()
def export_network(
    net: Network,
    out: Path,
    *,
    statistics: LatentStatistics,
    sample_size: int,
    probe: Tensor,
    profile: Profile = "sd",
    card: ModelCard | None = None,
    frozen_encoder: bool = False,
    lookup_from_codebook: bool = False,
    overwrite: bool = False,
) -> ExportReport | TokenizerReport:
    """Export `net` to the folder `out` with `export_tokenizer` or `export_autoencoder`.

    `export_tokenizer` exports networks with discrete codes, and `export_autoencoder` exports all
    other networks. The docstrings of these two functions describe the options that are missing in
    this docstring.

    Args:
        sample_size: the `resolution` of `export_tokenizer`, or the `sample_size` of
            `export_autoencoder`.
        profile: the pipelines to export for, see `export_autoencoder`. Tokenizers ignore this
            option.
        lookup_from_codebook: see `export_tokenizer`. Networks without codes ignore this option.
    """
    # a tokenizer
    if calls.codes(net) is not None:
        return export_tokenizer(
            net,
            out,
            statistics=statistics,
            resolution=sample_size,
            probe=probe,
            card=card,
            frozen_encoder=frozen_encoder,
            lookup_from_codebook=lookup_from_codebook,
            overwrite=overwrite,
        )

    # an autoencoder with continuous latents
    return export_autoencoder(
        net,
        out,
        statistics=statistics,
        sample_size=sample_size,
        probe=probe,
        profile=profile,
        card=card,
        frozen_encoder=frozen_encoder,
        overwrite=overwrite,
    )
