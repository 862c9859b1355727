"""Train a VAE with a class (M2) on images of which only some have a label.

The loss is the objective of Kingma et al. (arXiv:1406.5298, equation 9), negated and divided by the
number of images N:

    alpha E[-ln q(y|x)] - share E[L(x, y)] - (1 - share) E[U(x)]

The first two means are over the images with a label, whose share of N is `share`. The last mean is
over the batch, which may hold images with a label too.

Symbols: `B` batch, `C` channels, `H W` image size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.data.image_folder import ImageSource
from latentvae.errors import UserError
from latentvae.latents.items import find_labels
from latentvae.losses.variational import VariationalConfig

NO_LABEL = -1
UNLABELLED_FOLDER = "unlabelled"
LABELLED_IMAGES = 100  # largest number of images with a label in an update


class ClassTraining(nn.Module):
    """The terms of the loss as one module, so that all processes share its gradients."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, images: Tensor, labelled: Tensor, classes: Tensor, *, least: float, all_images: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the means of -ln q(y|x) and L(x, y), and of U(x) unless `all_images` is False.

        Args:
            images: images without a label, (B, C, H, W).
            labelled, classes: images with a label, and their classes.
            least: see `ClassVAE.unlabelled_bound`.
            all_images: compute U(x).
        """
        error = F.cross_entropy(self.net.logits(labelled), classes)
        bound = self.net.labelled_bound(labelled, classes).mean()
        if not all_images:
            return error, bound, None
        return error, bound, self.net.unlabelled_bound(images, least=least).mean()


class Classes:
    """The classes of training and validation images, and which labels the training sees.

    Attributes:
        names: names of the classes.
        train: class of each training image that the training sees, -1 for all others.
        validation: class of each validation image, -1 without one.
    """

    def __init__(
        self, train: ImageSource, validation: ImageSource, *, per_class: int, seed: int
    ) -> None:
        found = [find_labels(source, label_column=None) for source in (train, validation)]
        if found[0] is None or found[1] is None:
            raise UserError(
                "this network needs images with classes. Put the images of each class into a "
                f"folder of its own, and those without a class into a folder '{UNLABELLED_FOLDER}'."
            )
        names = found[0].class_names or [str(k) for k in range(max(found[0].values) + 1)]
        given = [
            [NO_LABEL if k < 0 or k >= len(names) else k for k in part.values]
            for part in found
            if part is not None
        ]
        self.names = [name for name in names if name != UNLABELLED_FOLDER]
        place = {name: k for k, name in enumerate(self.names)}
        numbers = torch.tensor([*(place.get(name, NO_LABEL) for name in names), NO_LABEL])
        self.train, self.validation = (numbers[torch.tensor(part)] for part in given)
        if per_class:
            self.train = some_labels(self.train, self.names, per_class=per_class, seed=seed)


def some_labels(classes: Tensor, names: list[str], *, per_class: int, seed: int) -> Tensor:
    """Keep `per_class` labels of each class, drawn at random. The others become -1.

    Raises:
        UserError: a class has fewer.
    """
    generator, kept = torch.Generator().manual_seed(seed), torch.full_like(classes, NO_LABEL)
    for number, name in enumerate(names):
        places = (classes == number).nonzero().squeeze(1)
        if len(places) < per_class:
            raise UserError(
                f"labels_per_class {per_class} is more than class '{name}' has ({len(places)} "
                "images)."
            )
        kept[places[torch.randperm(len(places), generator=generator)[:per_class]]] = number
    return kept


class ClassLoss:
    """The loss of a training with classes.

    Args:
        classes: class of each training image in memory, -1 without a label.
        options: the weights.
        num_classes: K.
    """

    def __init__(self, classes: Tensor, options: VariationalConfig, num_classes: int) -> None:
        self.classes, self.options = classes, options
        self.labelled = (classes != NO_LABEL).nonzero().squeeze(1)
        self.share = len(self.labelled) / len(classes)
        self.least = options.class_floor / num_classes

    def draw(self) -> Tensor:
        """Draw numbers of images with a label, by the global generator."""
        order = torch.randperm(len(self.labelled))[:LABELLED_IMAGES]
        return self.labelled[order]

    def __call__(
        self, prepared: nn.Module, images: Tensor, labelled: Tensor, drawn: Tensor, *, update: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar, and values to log.

        Args:
            prepared: `ClassTraining`, wrapped for all processes.
            images: images of the batch.
            labelled: the drawn images with a label.
            drawn: result of `draw`.
            update: number of updates done.
        """
        classes = self.classes[drawn].to(labelled.device)
        all_images = update >= self.options.label_warmup_steps
        error, bound, free = prepared(
            images, labelled, classes, least=self.least, all_images=all_images
        )

        logged = {"loss/labels": error.detach(), "loss/labelled_nats": -bound.detach()}
        if free is None:
            loss = error - bound
        else:
            loss = self.options.label_scale * error
            loss = loss - self.share * bound - (1.0 - self.share) * free
            logged["loss/unlabelled_nats"] = -free.detach()
        return loss, logged | {"loss/total": loss.detach()}


@torch.no_grad()
def count_errors(net: Any, images: Tensor, classes: Tensor) -> tuple[int, int]:
    """Return the numbers of wrong classes and of images that have a class."""
    known = classes != NO_LABEL
    if not known.any():
        return 0, 0
    found = net.logits(images[known.to(images.device)]).argmax(-1).cpu()
    return int((found != classes[known]).sum()), int(known.sum())
