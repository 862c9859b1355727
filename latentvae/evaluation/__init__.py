"""Measure autoencoders beside image codecs: `evaluate` returns a `report.Report`."""

from latentvae.evaluation.evaluate import evaluate
from latentvae.evaluation.settings import FULL, METRICS_ONLY, QUICK, Plan

__all__ = ["FULL", "METRICS_ONLY", "QUICK", "Plan", "evaluate"]
