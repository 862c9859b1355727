"""Exports of tiny tokenizers."""

from pathlib import Path
from typing import Any

from latentvae.export import TokenizerReport, export_tokenizer
from latentvae.latents import latent_statistics
from latentvae.models import DiscreteAutoencoder
from tests.tiny import photos


def export(net: DiscreteAutoencoder, out: Path, **options: Any) -> TokenizerReport:
    images = photos()
    statistics = latent_statistics(net, [images])
    return export_tokenizer(net, out, statistics=statistics, resolution=32, probe=images, **options)
