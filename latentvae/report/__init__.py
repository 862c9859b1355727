"""Reports, read from report.json: tables, figures and comparison."""

from latentvae.report.comparison import compare, markdown
from latentvae.report.schema import Report

__all__ = ["Report", "compare", "markdown"]
