"""Compute the best linear code of image patches, by their principal components.

The code turns each patch of f x f pixels into d numbers: the coordinates of the patch along d
principal components. Decoding computes an approximation of the patch from its d numbers. Among all
linear codes with d numbers, this code has the smallest squared error on the images that it was
fitted on (Eckart and Young 1936). An autoencoder with the same f and d should have a smaller error
than this code.

Symbols: `B` batch size, `C` image channels, `H W` pixels, `f` side of a patch, `d` numbers per
patch, `h w` patches.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from latentvae.moments import RunningMoments


@dataclass(frozen=True)
class LinearCode:
    """A linear code of image patches, which encodes and decodes images by principal components.

    Attributes:
        mean: the mean patch, (C, f, f), with C image channels and f pixels on a side.
        basis: d orthonormal components, the one with the largest variance first, (d, C, f, f).
        variances: variance of each of the d numbers, (d,).
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor

    @property
    def f(self) -> int:
        return self.mean.shape[-1]

    def encode(self, images: Tensor) -> Tensor:
        """Return the code (B, d, h, w) of images (B, C, H, W) of any size.

        If a side of the images is not a multiple of f (the side of a patch), the last row or column
        of pixels is repeated.
        """
        height, width = images.shape[2:]
        right, below = -width % self.f, -height % self.f
        if right or below:
            images = F.pad(images, (0, right, 0, below), mode="replicate")
        offset = -(self.basis * self.mean).flatten(1).sum(1)
        return F.conv2d(images, self.basis, offset, stride=self.f)

    def decode(self, z: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Decode a code (B, d, h, w) to images (B, C, H, W).

        Args:
            size: height and width of the result, which is cropped at the right and at the bottom.
                None means the full size, f * h by f * w, where f is the side of a patch.
        """
        images = F.conv_transpose2d(z, self.basis, stride=self.f)
        images = images + self.mean.repeat(1, z.shape[2], z.shape[3])
        return images if size is None else images[:, :, : size[0], : size[1]]

    def to(self, device: torch.device | str) -> "LinearCode":
        return LinearCode(*(value.to(device) for value in vars(self).values()))


class PatchMoments:
    """Running mean and covariance of the patches of any number of images.

    Args:
        f: side of a patch in pixels.

    Example:
        moments = PatchMoments(8)
        moments.update(images)  # any number of times
        code = moments.linear_code(4)
    """

    def __init__(self, f: int) -> None:
        self.f = f
        self.moments = RunningMoments(covariance=True)
        self.channels = 0

    def update(self, images: Tensor) -> None:
        """Add the patches of images (B, C, H, W). Incomplete patches at the border are left out."""
        height, width = (side // self.f * self.f for side in images.shape[2:])
        self.channels = images.shape[1]
        whole = images[:, :, :height, :width]
        patches = rearrange(whole, "b c (h y) (w x) -> (b h w) (c y x)", y=self.f, x=self.f)
        self.moments.update(patches)

    def linear_code(self, d: int) -> LinearCode:
        """Return the linear code of the first d principal components, in float32.

        The sign of each component is chosen so that its entry with the largest absolute value is
        positive.

        Raises:
            ValueError: d is larger than the number of values in a patch, or there are fewer than
                two patches.
        """
        if d > self.moments.num_features:
            raise ValueError(
                f"d must be at most {self.moments.num_features}, the number of values in a patch "
                f"(got {d})"
            )
        variances, vectors = torch.linalg.eigh(self.moments.covariance())  # in rising order
        basis = vectors.T.flip(0)[:d]
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        basis = basis * largest.sign()

        shape = (self.channels, self.f, self.f)
        return LinearCode(
            mean=self.moments.mean.float().reshape(shape),
            basis=basis.float().reshape(d, *shape),
            variances=variances.flip(0)[:d].clamp_min(0).float(),
        )
