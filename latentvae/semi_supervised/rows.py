"""Turn rows of numbers into images for the networks, and draw binary images for training.

Symbols: `N` rows, `F` columns, `B` batch, `C H W` shape of an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentvae.likelihoods import PixelDistribution, pixel_distribution
from latentvae.likelihoods.real import RealGaussian

LIKELIHOODS = ("bernoulli", "gaussian")
READ_ROWS = 4096  # number of rows per batch of a computation without gradients


def row_distribution(likelihood: str) -> PixelDistribution:
    """Return the decoder's distribution of a row's values: binary (-1 and 1) or real values."""
    return RealGaussian() if likelihood == "gaussian" else pixel_distribution("bernoulli")


@dataclass(frozen=True)
class RowImages:
    """Scales rows, and turns them into images of shape (B, C, H, W).

    Attributes:
        likelihood: "bernoulli" (values in [0, 1] become [-1, 1]) or "gaussian" (columns are
            standardised).
        shape: (C, H, W) with C H W = F.
        shift, scale: (F,) each. A value x becomes (x - shift) / scale, with shift and scale of
            its column.
    """

    likelihood: str
    shape: tuple[int, int, int]
    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rows: Tensor, likelihood: str, shape: tuple[int, int, int]) -> "RowImages":
        """Return a `RowImages` with the shift and scale for training rows (N, F).

        With `gaussian`, a constant column has scale 1.
        """
        if likelihood == "bernoulli":
            half = torch.full(rows.shape[1:], 0.5)
            return cls(likelihood, shape, half, half.clone())
        deviation = rows.std(0, correction=0)
        constant = rows.amax(0) == rows.amin(0)
        return cls(likelihood, shape, rows.mean(0), torch.where(constant, 1.0, deviation))

    def images(self, rows: Tensor) -> Tensor:
        """Return rows (B, F) as images (B, C, H, W)."""
        return ((rows - self.shift) / self.scale).unflatten(1, self.shape)

    def drawn(self, rows: Tensor) -> Tensor:
        """Return rows (B, F) as images for one update of the training.

        With `bernoulli`, a value v is first replaced by 1 with probability v, else by 0.
        """
        return self.images(torch.bernoulli(rows) if self.likelihood == "bernoulli" else rows)

    def rows(self, images: Tensor) -> Tensor:
        """Return images (B, C, H, W) as rows (B, F)."""
        return images.flatten(1) * self.scale + self.shift
