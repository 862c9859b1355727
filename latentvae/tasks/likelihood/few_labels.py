"""Train M2, a VAE that also models the class y of an image x, if only some images have a label.

The loss is the objective in equation 9 of arXiv:1406.5298, divided by the number of images N:

    alpha E[-ln q(y|x)] - share E[L(x, y)] - (1 - share) E[U(x)]

Here q(y|x) is the classifier, and alpha is the weight of the classification loss. L(x, y) is the
lower bound of ln p(x, y) for an image with a label, and U(x) is the lower bound of ln p(x) for an
image without a label. In the paper, L and U have the opposite sign. The means E of -ln q(y|x) and
of L(x, y) are over the images with a label, which are the fraction `share` of all images. The mean
E[U(x)] is over the batch, which may hold images with a label too. In the first `label_warmup_steps`
updates, and if all images have a label, the loss is E[-ln q(y|x)] - E[L(x, y)].

Symbols: `B` batch, `C` channels, `H W` image size.
"""

import hashlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.data.image_folder import ImageSource
from latentvae.errors import UserError
from latentvae.latents.items import UNLABELLED_FOLDER, find_labels
from latentvae.losses.variational import VariationalConfig

NO_LABEL = -1
LABELLED_IMAGES = 100  # largest number of images with a label in an update


class ClassTraining(nn.Module):
    """The loss terms of M2 in one module, so that DDP averages all gradients over processes.

    M2 is a VAE that also models the class y of an image x (arXiv:1406.5298).
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, images: Tensor, labelled: Tensor, classes: Tensor, *, least: float, all_images: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the means of the loss terms -ln q(y|x), L(x, y) and U(x).

        q(y|x) is the classifier. L and U are the lower bounds of ln p(x, y) and of ln p(x).

        Args:
            images: images of the batch, (B, C, H, W), used without their labels.
            labelled, classes: images with a label, (n, C, H, W), and their classes, (n,).
            least: classes with q(y|x) below `least` are left out of U(x), see
                `ClassVAE.unlabelled_bound`.
            all_images: whether to compute U(x). If false, the third result is None.
        """
        error = F.cross_entropy(self.net.logits(labelled), classes)
        bound = self.net.labelled_bound(labelled, classes).mean()
        if not all_images:
            return error, bound, None
        return error, bound, self.net.unlabelled_bound(images, least=least).mean()


class Classes:
    """The classes of training and validation images.

    Attributes:
        names: names of the classes.
        train: class of each training image, -1 for an image without a class.
        validation: class of each validation image, -1 for an image without a class.

    Raises:
        UserError: the training images have no classes, or a validation image has a class that the
            training images do not have.
    """

    def __init__(self, train: ImageSource, validation: ImageSource) -> None:
        own = class_names_of(train)
        if own is None:
            raise UserError(
                "this network needs training images with classes. Put the images of each class "
                "into a folder of its own, and images without a class into a folder "
                f"'{UNLABELLED_FOLDER}'."
            )
        others = class_names_of(validation) or [None] * len(validation)
        self.names = sorted({name for name in own if name is not None}, key=_by_number)
        place: dict[str | None, int] = {name: k for k, name in enumerate(self.names)}
        place[None] = NO_LABEL
        if unknown := next((name for name in others if name not in place), None):
            raise UserError(
                f"validation images have the class '{unknown}', which no training image has. The "
                f"classes are {', '.join(self.names)}."
            )
        self.train, self.validation = (
            torch.tensor([place[name] for name in part]) for part in (own, others)
        )

    def identity(self) -> str:
        """Return a hash of the classes of the training images."""
        return hashlib.sha256(self.train.numpy().tobytes()).hexdigest()[:16]


def class_names_of(source: ImageSource) -> list[str | None] | None:
    """Return the class name of each image. An image without a class has the name None.

    If `find_labels` finds no classes, return None instead of a list.
    """
    found = find_labels(source, label_column=None)
    if found is None:
        return None
    names = found.class_names

    def name_of(number: int) -> str | None:
        if number < 0 or (names is not None and number >= len(names)):
            return None
        name = str(number) if names is None else names[number]
        return None if name == UNLABELLED_FOLDER else name

    return [name_of(number) for number in found.values]


def _by_number(name: str) -> tuple[int, str]:
    """Return a sort key, by which names that are numbers are sorted by value."""
    return (int(name), "") if name.isdecimal() else (sys.maxsize, name)


def some_labels(classes: Tensor, names: list[str], *, per_class: int, seed: int) -> Tensor:
    """Keep `per_class` labels of each class, drawn at random. All other labels become -1.

    Raises:
        UserError: a class has fewer labels than `per_class`.
    """
    generator, kept = torch.Generator().manual_seed(seed), torch.full_like(classes, NO_LABEL)
    for number, name in enumerate(names):
        places = (classes == number).nonzero().squeeze(1)
        if len(places) < per_class:
            raise UserError(
                f"labels_per_class {per_class} is more than the {len(places)} readable images of "
                f"class '{name}'."
            )
        kept[places[torch.randperm(len(places), generator=generator)[:per_class]]] = number
    return kept


class ClassLoss:
    """The loss of M2, a VAE that also models the class of an image (arXiv:1406.5298).

    Args:
        classes: class of each training image in memory, -1 without a label.
        options: options of the loss, with its weights.
        num_classes: number of classes.
    """

    def __init__(self, classes: Tensor, options: VariationalConfig, num_classes: int) -> None:
        self.classes, self.options = classes, options
        self.labelled = (classes != NO_LABEL).nonzero().squeeze(1)
        if not len(self.labelled):
            raise UserError("none of the training images that can be read has a label.")
        self.share = len(self.labelled) / len(classes)
        self.least = options.class_floor / num_classes

    def draw(self, batch: Tensor) -> Tensor:
        """Draw images with a label by torch's global generator, and return their indices.

        At most `LABELLED_IMAGES` images are drawn.

        Args:
            batch: indices of the images of the batch. If all images have a label, `draw` returns
                `batch`.
        """
        if self.share == 1.0:
            return batch
        order = torch.randperm(len(self.labelled))[:LABELLED_IMAGES]
        return self.labelled[order]

    def __call__(
        self, prepared: nn.Module, images: Tensor, labelled: Tensor, drawn: Tensor, *, update: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar, and values to log.

        Args:
            prepared: `ClassTraining`, wrapped by DDP if there are several processes.
            images: images of the batch.
            labelled: the drawn images with a label.
            drawn: result of `draw`.
            update: number of updates done.
        """
        classes = self.classes[drawn].to(labelled.device)
        all_images = self.share < 1.0 and update >= self.options.label_warmup_steps
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
    """Return the number of wrongly classified images, and the number of images with a class."""
    known = classes != NO_LABEL
    if not known.any():
        return 0, 0
    found = net.logits(images[known.to(images.device)]).argmax(-1).cpu()
    return int((found != classes[known]).sum()), int(known.sum())
