"""Measure the distance between a set of reconstructions and their originals by image features.

The Frechet distance (Heusel et al. 2017, https://arxiv.org/abs/1706.08500) compares two Gaussians.
With fewer images than features, the covariances are singular, and the distance is biased upwards.
The kernel distance is an unbiased MMD^2, so it has no bias even for few images (Gretton et al.
2012, https://jmlr.org/papers/v13/gretton12a.html, and Binkowski et al. 2018,
https://arxiv.org/abs/1801.01401). Compare distances only if they use the same features. See
`trunk_features` and `inception`.

`N` images, `B` batch, `D` features.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentvae.moments import RunningMoments


class FrechetDistance:
    """The Frechet distance between the features of originals and of reconstructions.

    The distance is |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), equation 6 of Heusel et al. 2017.
    The covariances have the divisor n - 1, as in the usual implementations.

        frechet = FrechetDistance(2048)
        frechet.update(features(images), features(recon))  # (B, D) each

    Args:
        dim: number of features D.
    """

    def __init__(self, dim: int) -> None:
        self._real = RunningMoments(dim, covariance=True)
        self._recon = RunningMoments(dim, covariance=True)

    @property
    def num_images(self) -> int:
        """Number of pairs (original, reconstruction) so far."""
        return self._real.count

    def update(self, real: Tensor, recon: Tensor) -> None:
        """Add the features of a batch of originals and their reconstructions, (B, D) each."""
        _check_pairs(real, recon)
        self._real.update(_checked(real, self._real.num_features))
        self._recon.update(_checked(recon, self._recon.num_features))

    def result(self) -> float:
        """Return the distance, which is at least 0, and is 0 if the reconstructions are perfect.

        With fewer than D images, the distance is biased upwards.

        Raises:
            ValueError: there are fewer than 2 images.
        """
        mean, other_mean = self._real.mean, self._recon.mean
        covariance, other = self._real.covariance(), self._recon.covariance()
        if torch.equal(mean, other_mean) and torch.equal(covariance, other):
            return 0.0  # The formula would give a small rounding error instead of 0.
        shift = (mean - other_mean).square().sum()
        spread = covariance.trace() + other.trace() - 2 * _trace_of_root(covariance, other)
        return max(0.0, (shift + spread).item())

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the moments of originals and reconstructions by name."""
        parts = {"real": self._real, "recon": self._recon}
        return {f"{p}_{k}": v for p, part in parts.items() for k, v in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Set the moments to the values that `state_dict` returned."""
        for prefix, part in (("real_", self._real), ("recon_", self._recon)):
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )


class KernelDistance:
    """The unbiased MMD^2 of the kernel (x . y / D + 1)^3 between originals and reconstructions.

    A reconstruction depends on its original, so the two sets are not independent samples. The sum
    of kernels k must therefore leave out k(x_i, y_i), the kernel of an original and its own
    reconstruction (Gretton et al. 2012, lemma 6, equation 4).
    The usual kernel Inception distance (KID) includes these kernels k(x_i, y_i), so KID is negative
    if the reconstructions are almost equal to the originals.

        kernel = KernelDistance()
        kernel.update(features(images), features(recon))  # (B, D) each

    Args:
        max_images: largest number of images whose features are kept. Later images are ignored,
            which bounds the memory.
    """

    def __init__(self, *, max_images: int = 2000) -> None:
        self.max_images = max_images
        self._real: list[Tensor] = []  # (b, D) float32 each
        self._recon: list[Tensor] = []

    @property
    def num_images(self) -> int:
        """Number of pairs (original, reconstruction) whose features are kept."""
        return sum(map(len, self._real))

    def update(self, real: Tensor, recon: Tensor) -> None:
        """Add the features of a batch of originals and their reconstructions, (B, D) each."""
        _check_pairs(real, recon)
        room = self.max_images - self.num_images
        if room > 0:
            dim = self._real[0].shape[1] if self._real else real.shape[1]
            # These are copies. A view of a part would keep the complete batch in memory.
            self._real.append(_checked(real[:room], dim).float())
            self._recon.append(_checked(recon[:room], dim).float())

    def result(self) -> float:
        """Return the distance, which is 0 if the reconstructions are perfect.

        For very similar sets, the distance may be slightly below 0.

        Raises:
            ValueError: there are fewer than 2 images.
        """
        n = self.num_images
        if n < 2:
            raise ValueError(f"A kernel distance needs at least 2 images (got {n}).")
        x, y = torch.cat(self._real).double(), torch.cat(self._recon).double()
        if torch.equal(x, y):
            return 0.0  # The formula would give a small rounding error instead of 0.
        cross = _kernel(x, y)
        h = _kernel(x, x) + _kernel(y, y) - cross - cross.T  # (n, n)
        return ((h.sum() - h.trace()) / (n * (n - 1))).item()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the kept features of originals and reconstructions by name."""
        if not self._real:
            return {"real": np.zeros((0, 0), np.float32), "recon": np.zeros((0, 0), np.float32)}
        return {"real": torch.cat(self._real).numpy(), "recon": torch.cat(self._recon).numpy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Set the kept features to the values that `state_dict` returned."""
        empty = len(state["real"]) == 0
        self._real = [] if empty else [torch.from_numpy(state["real"].copy())]
        self._recon = [] if empty else [torch.from_numpy(state["recon"].copy())]


def kernel_matrix(x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel (x . y / D + 1)^3 of all pairs of rows of `x` and `y`, (N, M), float64.

    `x` is (N, D), and `y` is (M, D).
    """
    return _kernel(x.double(), y.double())


def unbiased_mmd(x: Tensor, y: Tensor) -> float:
    """Return the unbiased MMD^2 of two independent sets of features, (N, D) and (M, D).

    The kernel is that of `kernel_matrix`. For sets of pairs, such as images and their
    reconstructions, use `KernelDistance`.

    Raises:
        ValueError: a set has fewer than 2 rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"A kernel distance needs 2 images in each set (got {len(x)}, {len(y)}).")

    def within(rows: Tensor) -> Tensor:
        k = kernel_matrix(rows, rows)
        return (k.sum() - k.trace()) / (len(rows) * (len(rows) - 1))

    return (within(x) + within(y) - 2 * kernel_matrix(x, y).mean()).item()


def trunk_features(levels: Sequence[Tensor]) -> Tensor:
    """Return the spatial mean of relu5_3, the last level of LPIPS' VGG16, (B, 512), float32.

    Args:
        levels: features of all levels, from `PerceptualLoss.features(images)`, each (B, C, h, w).
    """
    return levels[-1].float().mean(dim=(2, 3))


def _trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    """Return Tr((a b)^(1/2)) of two covariances.

    The trace is the sum of the square roots of the eigenvalues of a^(1/2) b a^(1/2). These square
    roots are the singular values of a^(1/2) b^(1/2). The function computes the singular values, so
    that it needs no square root of an eigenvalue that is only rounding noise.
    """
    return torch.linalg.svdvals(_root(a).T @ _root(b)).sum()


def _root(covariance: Tensor) -> Tensor:
    """Return R with R R^T = covariance, (D, rank).

    Eigenvalues that are only rounding noise are left out of R. With few images, most eigenvalues
    are noise.
    """
    values, vectors = torch.linalg.eigh(covariance)
    noise = len(values) * torch.finfo(values.dtype).eps * values.abs().amax()
    real = values > noise
    return vectors[:, real] * values[real].sqrt()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _check_pairs(real: Tensor, recon: Tensor) -> None:
    if real.shape != recon.shape:
        shapes = f"{tuple(real.shape)} and {tuple(recon.shape)}"
        raise ValueError(
            f"Features of originals and reconstructions must come in pairs (got {shapes})."
        )


def _checked(rows: Tensor, dim: int) -> Tensor:
    """Return the features `rows` in float64 on the CPU. Raise ValueError if they are not valid."""
    if rows.ndim != 2 or rows.shape[1] != dim or len(rows) == 0:
        raise ValueError(
            f"Features must be (B, {dim}) with B at least 1 (got {tuple(rows.shape)})."
        )
    rows = rows.detach().cpu().double()
    if not rows.isfinite().all():
        raise ValueError("Features must be finite numbers, but some are infinite or NaN.")
    return rows
