"""Distil an autoencoder (the teacher) into a small one (the student)."""

from latentvae.tasks.distill.config import DistillConfig
from latentvae.tasks.distill.task import DistillTask

__all__ = ["DistillConfig", "DistillTask"]
