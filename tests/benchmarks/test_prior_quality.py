"""The measures of samples: no distance between equal distributions, classes, and copies."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))  # where it finds the modules beside it
    yield importlib.import_module("prior_quality")
    sys.path.remove(str(BENCHMARKS))


def test_neighbours_vote_for_the_class(script: ModuleType) -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    classes = torch.arange(2).repeat_interleave(20)
    train = centres[classes] + torch.randn(40, 2)
    images = centres[torch.tensor([0, 0, 1, 1])]
    assert script.class_share(images, torch.tensor([0, 0, 1, 0]), train, classes) == pytest.approx(
        0.75
    )


def test_copies_are_seen_in_a_large_training_set(script: ModuleType) -> None:
    train = script.Images(
        torch.randn(400, 16), torch.randn(400, 16), torch.zeros(400, dtype=torch.int64)
    )
    own, new = (
        script.Images(torch.randn(80, 16), torch.randn(80, 16), torch.zeros(80, dtype=torch.int64))
        for _ in range(2)
    )
    copied = script.Images(train.vgg[:80] + 1e-3, train.codes[:80] + 1e-3, new.classes)
    fresh, copies = script.measured(new, train, own), script.measured(copied, train, own)
    assert fresh["near vgg"] == pytest.approx(1.0, abs=0.1) and fresh["copies vgg"] < 0.1
    assert copies["near vgg"] < 0.01 and copies["copies codes"] == 1.0
