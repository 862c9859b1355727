"""Read reports from report.json, compare them, and show them as tables and figures."""

from latentvae.report.comparison import compare, markdown
from latentvae.report.schema import Report

__all__ = ["Report", "compare", "markdown"]
