"""Examine a model: half precision and tiles on a few pictures, speed and memory on noise."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from latentvae.autoencoder import Autoencoder
from latentvae.evaluation.passport import passport
from latentvae.evaluation.picture_source import Pictures, center_crop
from latentvae.evaluation.settings import Plan
from latentvae.evaluation.speed import MIN_REPEATS, measure_speed


@dataclass(frozen=True)
class Examination:
    """A measurement that needs no pass over all pictures.

    Attributes:
        title: what is measured, for the line that is printed when the measurement begins.
        run: returns the results for a model.
        pixels: approximate number of pixels that `run` encodes and decodes, from which its time is
            estimated.
    """

    title: str
    run: Callable[[Autoencoder], dict[str, Any]]
    pixels: float


def examinations(plan: Plan, pictures: Pictures, *, mean_pixels: float) -> dict[str, Examination]:
    """Return the plan's examinations by the report's sections that they fill (passport, speed).

    Args:
        mean_pixels: mean number of pixels of the pictures.
    """
    found = {}
    sides = {"passport": (plan.passport_side**2, 3), "tiling": (math.prod(plan.tiling_size), 2)}
    checks = [sides[name] for name in sides if name in plan.sections]
    if checks and plan.passport_images:
        once = sum(min(most, mean_pixels) * runs for most, runs in checks)
        found["passport"] = Examination(
            "half precision and tiles",
            lambda model: _passport(model, plan, pictures),
            plan.passport_images * once,
        )
    if "speed" in plan.sections and plan.speed_sizes:
        found["speed"] = Examination(
            "speed and memory",
            lambda model: _speed(model, plan),
            sum(side**2 for side in plan.speed_sizes) * (MIN_REPEATS + 2),
        )
    return found


def _passport(model: Autoencoder, plan: Plan, pictures: Pictures) -> dict[str, Any]:
    sides = {
        "passport": model.fixed_size or plan.passport_side,
        "tiling": model.fixed_size or plan.tiling_size,
    }
    multiple = model.f * model.normalization.fold
    some = [images for _, images in pictures.some(plan.passport_images)]
    crops = {
        section: [
            center_crop(picture, side=side, multiple=multiple).to(model.net.device)
            for picture in some
            if section in plan.sections
        ]
        for section, side in sides.items()
    }
    net = model.net if model.net.dtype == torch.float32 else copy.deepcopy(model.net).float()
    return passport(net, crops["passport"], f=model.f, for_tiling=crops["tiling"])


def _speed(model: Autoencoder, plan: Plan) -> dict[str, Any]:
    return measure_speed(
        model.net,
        sizes=plan.speed_sizes if model.fixed_size is None else (model.fixed_size,),
        f=model.f * model.normalization.fold,
        budget_s=plan.speed_budget,
        device=model.net.device,
    )
