"""Measure autoencoders and image codecs on the same images: `evaluate` returns a `Report`."""

from latentvae.evaluation.evaluate import evaluate
from latentvae.evaluation.settings import FULL, METRICS_ONLY, QUICK, Plan

__all__ = ["FULL", "METRICS_ONLY", "QUICK", "Plan", "evaluate"]
