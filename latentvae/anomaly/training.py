"""Train small dense networks on rows in memory, without changing global random generators.

Symbols: `N` rows, `B` rows of a batch, `F` columns.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from latentvae.errors import UserError

SCORE_ROWS = 8192  # rows per batch of a computation without gradients


@contextmanager
def own_randomness(seed: int) -> Iterator[torch.Generator]:
    """Seed torch's global generator of the CPU in a `with` block, then restore its state.

    The global generator is seeded because weight initialisation and dropout draw from it. The block
    also gets a separate generator with the same seed, for all other draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def train_network(
    network: nn.Module,
    rows: np.ndarray,
    loss: Callable[[Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    cosine: bool = False,
) -> list[float]:
    """Train by Adam in float32. Return the mean loss of each epoch.

    Each epoch splits the shuffled rows into batches of almost equal size, with at most `batch_size`
    rows. If only the last batch were smaller, it could have one row, from which no mixture can be
    estimated.

    Args:
        network: the network, changed in place.
        rows: scaled rows, (N, F).
        loss: function that returns the loss of a batch (B, F), a scalar.
        epochs: number of passes over the rows.
        batch_size: largest number of rows of a batch.
        learning_rate: Adam's learning rate.
        generator: generator that draws the order of the rows.
        cosine: whether the learning rate falls to 0 along half a cosine.

    Raises:
        UserError: the loss becomes NaN or infinite.
    """
    data = torch.from_numpy(rows).float()
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, fused=True)
    batches = math.ceil(len(data) / batch_size)
    falling = CosineAnnealingLR(optimizer, epochs * batches) if cosine else None
    network.train()

    means = []
    for epoch in range(epochs):
        total = torch.zeros((), dtype=torch.float64)
        for picked in torch.randperm(len(data), generator=generator).tensor_split(batches):
            try:
                value = loss(data[picked])
            except torch.linalg.LinAlgError as error:  # the covariance has infinite values
                raise UserError(_diverged(epoch)) from error
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            if falling is not None:
                falling.step()
            total += value.detach() / batches

        means.append(total.item())
        if not math.isfinite(means[-1]):
            raise UserError(_diverged(epoch))
    network.eval()
    return means


def _diverged(epoch: int) -> str:
    return (
        f"the loss is NaN or infinite after {epoch + 1} epoch(s). Use a smaller learning_rate, or "
        "scaling='standard'."
    )


@torch.no_grad()
def in_batches(
    rows: np.ndarray, function: Callable[[Tensor], Tensor], *, num_rows: int = SCORE_ROWS
) -> Tensor:
    """Return the results of a function on all rows, computed for `num_rows` rows at a time."""
    data = torch.from_numpy(np.ascontiguousarray(rows))
    return torch.cat([function(batch) for batch in data.split(num_rows)])


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, and remove the prefix from the names."""
    found = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}
