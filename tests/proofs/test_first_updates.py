"""Checks of the first updates that all trainings share."""

from typing import Any

import pytest
import torch

from latentvae.engine.updates import UpdateResult
from latentvae.proofs.first_updates import FirstUpdates, updates_check


@pytest.mark.parametrize("last", [1.5, float("inf"), float("nan")])
def test_losses_must_be_finite_even_if_gradients_are(last: float) -> None:
    results = [UpdateResult(values=[{"loss": torch.tensor(loss)}]) for loss in (2.0, last)]
    training: Any = None
    first = FirstUpdates(
        task=None, training=training, start={}, results=results, before={}, after={}, items=[]
    )
    check = updates_check(first, loss="loss", words="total loss")
    assert check.passed == (last == 1.5)
    assert check.value == f"2.000, {last:.3f} total loss"
