"""Reports: models measured beside image codecs, in one schema, as tables and figures."""

from latentvae.report.codecs import CODECS, Codec
from latentvae.report.comparison import compare, markdown
from latentvae.report.engine import evaluate
from latentvae.report.plan import FULL, METRICS_ONLY, QUICK, Plan
from latentvae.report.schema import Report

__all__ = [
    "CODECS",
    "FULL",
    "METRICS_ONLY",
    "QUICK",
    "Codec",
    "Plan",
    "Report",
    "compare",
    "evaluate",
    "markdown",
]
