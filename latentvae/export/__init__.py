"""Export trained networks to folders that other programs can load, and verify the exports."""

from latentvae.export.any_network import export_network
from latentvae.export.card import ModelCard
from latentvae.export.continuous import export_autoencoder
from latentvae.export.discrete import TokenizerReport, export_tokenizer
from latentvae.export.export_report import PROFILES, ExportReport, Profile
from latentvae.export.half_precision import HalfPrecision, check_half_precision

__all__ = [
    "PROFILES",
    "ExportReport",
    "HalfPrecision",
    "ModelCard",
    "Profile",
    "TokenizerReport",
    "check_half_precision",
    "export_autoencoder",
    "export_network",
    "export_tokenizer",
]
