"""Measure generated pictures: kernel distance, share with the wanted class, and share of copies.

All measures use features of the layer relu5_3 of LPIPS' VGG16, averaged over positions. So the
distances of this module are not FIDs, which use Inception features. The kernel distance is the
unbiased MMD^2 with the kernel (x^T y / D + 1)^3.

`N` pictures, `D` features.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.metrics.distribution import kernel_matrix, trunk_features, unbiased_mmd

NEIGHBOURS = 10
SUBSETS = 100  # number of random subsets of the samples, which give the spread of a distance
FEATURES = "relu5_3 of LPIPS' VGG16, mean over positions, pictures at their own size"


class PictureFeatures:
    """Computes the VGG16 features of pictures.

    Args:
        device: device of the computation.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._net = PerceptualLoss(load_lpips("vgg")).to(self.device)

    @torch.inference_mode()
    def of(self, batches: Iterable[Tensor]) -> Tensor:
        """Return the features (N, D), float32, of batches (B, C, H, W) in [-1, 1]."""
        found = []
        for images in batches:
            pictures = images.to(self.device)
            pictures = pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures
            found.append(trunk_features(self._net.features(pictures)).cpu())
        return torch.cat(found)


@dataclass(frozen=True)
class References:
    """Features of real pictures and reconstructions, with which generated pictures are compared.

    Attributes:
        train, held: features of real training pictures and of real held-out pictures.
        train_recon, held_recon: features of the reconstructions of the training pictures and of the
            held-out pictures.
        train_classes: classes of the training pictures, (N,).
    """

    train: Tensor
    held: Tensor
    train_recon: Tensor
    held_recon: Tensor
    train_classes: Tensor

    def measure(self, found: Tensor, classes: Tensor) -> dict[str, Any]:
        """Return the measures of generated pictures.

        Args:
            found: features of the pictures, (N, D).
            classes: class that each picture should show, (N,), -1 for none.

        Returns:
            - kd, kd_train: kernel distance to the held-out pictures, and to the training pictures.
            - kd_subsets: standard deviation of kd over random halves of the samples.
            - class_accuracy_plain: share of the pictures that show the class in `classes`. Left out
              if a value in `classes` is -1.
            - copies: share of the pictures that may be copies of training pictures. A possible copy
              is nearer to the reconstruction of a training picture than 99 % of the reconstructions
              of held-out pictures are.
            - near_train, near_held: median distance of the pictures to the nearest reconstruction
              of a training picture, and of a held-out picture. Equally many training and held-out
              pictures are compared, if there are enough training pictures.
        """
        result = {
            "kd": unbiased_mmd(found, self.held),
            "kd_subsets": spread_of_subsets(found, self.held),
            "kd_train": unbiased_mmd(found, self.train),
        }
        if bool((classes >= 0).all()):
            result["class_accuracy_plain"] = self.class_accuracy(found, classes)

        near, usual = nearest(found, self.train_recon), nearest(self.held_recon, self.train_recon)
        result["copies"] = (near < usual.quantile(0.01)).double().mean().item()
        step = max(len(self.train_recon) // len(self.held_recon), 1)
        some = self.train_recon[::step][: len(self.held_recon)]
        result["near_train"] = nearest(found, some).median().item()
        result["near_held"] = nearest(found, self.held_recon).median().item()
        return result

    def class_accuracy(self, found: Tensor, classes: Tensor) -> float:
        """Return the share of pictures that show the class in `classes`.

        The class that a picture shows is the most common class of its nearest training pictures.
        """
        return class_share(found, classes, self.train, self.train_classes)


def spread_of_subsets(x: Tensor, y: Tensor) -> float:
    """Return the standard deviation of the kernel distance of x and y over random halves of x.

    `x` is (N, D), and `y` is (M, D). With fewer than four rows in `x`, the result is 0.
    """
    size = len(x) // 2
    if size < 2:
        return 0.0
    within, cross, other = kernel_matrix(x, x), kernel_matrix(x, y), kernel_matrix(y, y)
    draws, found = torch.Generator().manual_seed(0), []
    own = (other.sum() - other.trace()) / (len(y) * (len(y) - 1))
    for _ in range(SUBSETS):
        chosen = torch.randperm(len(x), generator=draws)[:size]
        part = within[chosen][:, chosen]
        mean = (part.sum() - part.trace()) / (size * (size - 1))
        found.append(mean + own - 2 * cross[chosen].mean())
    return torch.stack(found).std().item()


def class_share(found: Tensor, classes: Tensor, train: Tensor, train_classes: Tensor) -> float:
    """Return the share of pictures that show the class in `classes`.

    The class that a picture shows is the most common class of its nearest neighbours in `train`.
    """
    count = min(NEIGHBOURS, len(train))
    places = torch.cdist(found, train).topk(count, largest=False).indices
    total = int(max(train_classes.max(), classes.max())) + 1
    known = train_classes[places]
    votes = F.one_hot(known.clamp(min=0), total) * (known >= 0)[..., None]
    return (votes.sum(dim=1).argmax(dim=1) == classes).double().mean().item()


def nearest(found: Tensor, others: Tensor) -> Tensor:
    """Return the feature distance of each picture to its nearest picture in `others`, (N,)."""
    return torch.cdist(found, others).amin(dim=1)
