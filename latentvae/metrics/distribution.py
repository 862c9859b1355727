"""How far the set of reconstructions lies from the set of originals, in a network's features.

The Frechet distance (Heusel et al. 2017, https://arxiv.org/abs/1706.08500) compares two Gaussians;
with fewer images than features its covariances are singular and it is biased upwards. The kernel
distance, an unbiased MMD^2 (Gretton et al. 2012, https://jmlr.org/papers/v13/gretton12a.html;
Binkowski et al. 2018, https://arxiv.org/abs/1801.01401), holds for few images too. Both are only
comparable among equal features: see `trunk_features` and `inception`.

`N` images, `B` batch, `D` features.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentvae.moments import RunningMoments


class FrechetDistance:
    """Frechet distance between the features of originals and of reconstructions.

    |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al. 2017, equation 6; the covariances
    have the divisor n - 1, as in the usual implementations.

    frechet = FrechetDistance(2048)
    frechet.update(features(images), features(recon))  # (B, D) each
    """

    def __init__(self, dim: int) -> None:
        self._real = RunningMoments(dim, covariance=True)
        self._recon = RunningMoments(dim, covariance=True)

    @property
    def num_images(self) -> int:
        return self._real.count

    def update(self, real: Tensor, recon: Tensor) -> None:
        """Take in the features of a batch, (B, D) each."""
        _check_pairs(real, recon)
        self._real.update(_checked(real, self._real.num_features))
        self._recon.update(_checked(recon, self._recon.num_features))

    def result(self) -> float:
        """At least 0, and 0 for a perfect copy; needs 2 images, and means something from D on."""
        mean, other_mean = self._real.mean, self._recon.mean
        covariance, other = self._real.covariance(), self._recon.covariance()
        if torch.equal(mean, other_mean) and torch.equal(covariance, other):
            return 0.0  # whatever rounding would make of it
        shift = (mean - other_mean).square().sum()
        spread = covariance.trace() + other.trace() - 2 * _trace_of_root(covariance, other)
        return max(0.0, (shift + spread).item())

    def state_dict(self) -> dict[str, np.ndarray]:
        parts = {"real": self._real, "recon": self._recon}
        return {f"{p}_{k}": v for p, part in parts.items() for k, v in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        for prefix, part in (("real_", self._real), ("recon_", self._recon)):
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )


class KernelDistance:
    """Unbiased MMD^2 of the kernel (x . y / D + 1)^3 between originals and reconstructions.

    A reconstruction depends on its original, so the two sets are no independent samples, and a
    pair's own k(x_i, y_i) must not count: Gretton et al. 2012, lemma 6, equation 4. KID, which
    counts it, falls below zero for near copies. Memory is bounded: the features of the first
    `max_images` are kept and later ones are ignored.

    kernel = KernelDistance()
    kernel.update(features(images), features(recon))  # (B, D) each
    """

    def __init__(self, *, max_images: int = 2000) -> None:
        self.max_images = max_images
        self._real: list[Tensor] = []  # (b, D) float32 each
        self._recon: list[Tensor] = []

    @property
    def num_images(self) -> int:
        return sum(map(len, self._real))

    def update(self, real: Tensor, recon: Tensor) -> None:
        """Take in the features of a batch, (B, D) each."""
        _check_pairs(real, recon)
        room = self.max_images - self.num_images
        if room > 0:
            dim = self._real[0].shape[1] if self._real else real.shape[1]
            # Copies, not views: a view would keep the whole batch of a cut one.
            self._real.append(_checked(real[:room], dim).float())
            self._recon.append(_checked(recon[:room], dim).float())

    def result(self) -> float:
        """0 for a perfect copy; for close sets it may be a little below 0. Needs 2 images."""
        n = self.num_images
        if n < 2:
            raise ValueError(f"a kernel distance needs at least 2 images, not {n}")
        x, y = torch.cat(self._real).double(), torch.cat(self._recon).double()
        if torch.equal(x, y):
            return 0.0  # whatever rounding would make of it
        cross = _kernel(x, y)
        h = _kernel(x, x) + _kernel(y, y) - cross - cross.T  # (n, n)
        return ((h.sum() - h.trace()) / (n * (n - 1))).item()

    def state_dict(self) -> dict[str, np.ndarray]:
        if not self._real:
            return {"real": np.zeros((0, 0), np.float32), "recon": np.zeros((0, 0), np.float32)}
        return {"real": torch.cat(self._real).numpy(), "recon": torch.cat(self._recon).numpy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        empty = len(state["real"]) == 0
        self._real = [] if empty else [torch.from_numpy(state["real"].copy())]
        self._recon = [] if empty else [torch.from_numpy(state["recon"].copy())]


def trunk_features(levels: Sequence[Tensor]) -> Tensor:
    """Spatial mean of the last level of LPIPS' VGG16 trunk (relu5_3), (B, 512), float32.

    Args:
        levels: from `PerceptualLoss.features(images)`, each (B, C, h, w).
    """
    return levels[-1].float().mean(dim=(2, 3))


def _trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    """Tr((a b)^(1/2)) of two covariances.

    It is the sum of the square roots of the eigenvalues of a^(1/2) b a^(1/2), that is of the
    singular values of a^(1/2) b^(1/2); these need no root of an eigenvalue that is rounding noise.
    """
    return torch.linalg.svdvals(_root(a).T @ _root(b)).sum()


def _root(covariance: Tensor) -> Tensor:
    """R with R R^T = covariance, (D, rank): few images leave most eigenvalues at rounding noise."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = len(values) * torch.finfo(values.dtype).eps * values.abs().amax()
    real = values > noise
    return vectors[:, real] * values[real].sqrt()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _check_pairs(real: Tensor, recon: Tensor) -> None:
    if real.shape != recon.shape:
        shapes = f"{tuple(real.shape)} and {tuple(recon.shape)}"
        raise ValueError(f"originals and reconstructions come in pairs, not {shapes}")


def _checked(rows: Tensor, dim: int) -> Tensor:
    """The rows in float64 on the CPU."""
    if rows.ndim != 2 or rows.shape[1] != dim or len(rows) == 0:
        raise ValueError(f"features are (B, {dim}), not {tuple(rows.shape)}")
    rows = rows.detach().cpu().double()
    if not rows.isfinite().all():
        raise ValueError("features hold values that are not finite: nothing can be measured")
    return rows
