"""Reports: models measured beside image codecs, in one schema, as tables and figures."""

from latentvae.report.codecs import CODECS, Codec
from latentvae.report.compare import compare, unique_names
from latentvae.report.evaluate import Evaluation, Reconstructor, measure
from latentvae.report.schema import Report

__all__ = [
    "CODECS",
    "Codec",
    "Evaluation",
    "Reconstructor",
    "Report",
    "compare",
    "measure",
    "unique_names",
]
