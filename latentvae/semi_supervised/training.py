"""Train the networks of the classifiers on rows in memory.

Use `own_randomness`, so that a training does not change torch's global random generator of the CPU.

Symbols: `N` rows, `F` columns, `B` batch, `K` classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.errors import UserError
from latentvae.models.dense.class_network import ClassVAE
from latentvae.models.dense.network import VectorVAE

LABELLED_ROWS = 100  # largest number of labelled rows of an update

Draw = Callable[[Tensor], Tensor]
"""Returns newly drawn images (B, C, H, W) of the rows with the given indices (B,)."""


@dataclass(frozen=True)
class Schedule:
    """The number of epochs, the batch size, the learning rate and the precision of a training.

    Attributes:
        epochs: number of passes over the rows.
        batch_size: number of rows in an update.
        learning_rate: first learning rate of Adam. The rate falls to 0 along half a cosine.
        bf16: multiply in bfloat16. Densities stay in float32.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    bf16: bool = False


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed torch's global generator of the CPU in a `with` block, then restore its state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def train_vae(net: VectorVAE, draw: Draw, *, count: int, schedule: Schedule) -> None:
    """Train a VAE on N = `count` rows by its ELBO. The VAE ends in eval mode.

    Args:
        net: the VAE, changed in place.
        draw: function that returns images (B, C, H, W) of the rows with given indices (B,).
        count: number of rows N.
        schedule: epochs, batch size, learning rate and precision.
    """

    def loss(picked: Tensor) -> Tensor:
        return -net(draw(picked)).elbo().mean()

    run(net, loss, torch.arange(count), schedule=schedule)


def train_classes(
    net: ClassVAE,
    draw: Draw,
    classes: Tensor,
    *,
    schedule: Schedule,
    alpha: float,
    least: float,
    warmup: int,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train M2, a VAE that also models the class, on rows with and without labels.

    The loss is the mean negative ELBO over all N rows, plus `alpha` times the mean cross entropy of
    the labelled rows. The ELBO is the lower bound of ln p(x, y) for a row x with the label y, and
    of ln p(x) for a row without a label. This loss equals the objective of arXiv:1406.5298
    (equation 9), divided by N. So the paper's weight of the mean cross entropy is `alpha` times N.

    Args:
        net: the network, changed in place. The network ends in eval mode.
        draw: function that returns images (B, C, H, W) of the rows with given indices (B,).
        classes: class of each row, -1 without a label, (N,), int64.
        schedule: epochs, batch size, learning rate and precision.
        alpha: weight of the cross entropy. The weight is 1 in the warm-up, and if all rows have a
            label.
        least: for a row without a label, classes with a probability below `least` are left out, see
            `ClassVAE.unlabelled_bound`.
        warmup: number of passes over the labelled rows alone, at the start. In the warm-up, the
            network learns the classes. Later, the network also learns from rows without a label.
        after_epoch: function that is called with the number of each finished epoch, from 1. Epochs
            of the warm-up do not count.
    """
    labelled = (classes >= 0).nonzero().squeeze(1)
    unlabelled = (classes < 0).nonzero().squeeze(1)
    share = len(labelled) / len(classes)

    def labelled_terms(picked: Tensor) -> tuple[Tensor, Tensor]:
        images = draw(picked)
        bound = net.labelled_bound(images, classes[picked]).mean()
        return bound, F.cross_entropy(net.logits(images), classes[picked])

    def loss(picked: Tensor) -> Tensor:
        few = labelled[torch.randperm(len(labelled))[:LABELLED_ROWS]]
        bound, cross_entropy = labelled_terms(few)
        free = net.unlabelled_bound(draw(picked), least=least).mean()
        return alpha * cross_entropy - share * bound - (1.0 - share) * free

    def labelled_loss(picked: Tensor) -> Tensor:
        bound, cross_entropy = labelled_terms(picked)
        return cross_entropy - bound

    if not len(unlabelled):
        run(net, labelled_loss, labelled, schedule=schedule, after_epoch=after_epoch)
        return
    short = replace(schedule, epochs=warmup, batch_size=LABELLED_ROWS)
    run(net, labelled_loss, labelled, schedule=short)
    run(net, loss, unlabelled, schedule=schedule, after_epoch=after_epoch)


def run(
    net: nn.Module,
    loss: Callable[[Tensor], Tensor],
    rows: Tensor,
    *,
    schedule: Schedule,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Minimise a loss by Adam. The loss is a function of row indices (B,).

    Args:
        net: the network, changed in place. The network ends in eval mode.
        loss: function from row indices to a scalar.
        rows: indices of the rows to train on.
        schedule: epochs, batch size, learning rate and precision.
        after_epoch: function that is called with the number of each finished epoch, from 1.

    Raises:
        UserError: the loss is NaN or infinite at the end of an epoch.
    """
    optimizer = torch.optim.Adam(net.parameters(), schedule.learning_rate, fused=True)
    batches = -(-len(rows) // schedule.batch_size)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.epochs * batches)
    value = torch.zeros(())
    net.train()

    for epoch in range(schedule.epochs):
        for picked in rows[torch.randperm(len(rows))].tensor_split(batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bf16):
                value = loss(picked)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            falling.step()
        if not value.isfinite():
            raise UserError(
                f"the loss is NaN or infinite after {epoch + 1} epoch(s); "
                f"use a learning_rate below {schedule.learning_rate:g}."
            )
        if after_epoch is not None:
            after_epoch(epoch + 1)
    net.eval()
