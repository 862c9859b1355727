"""Split the KL of a Gaussian posterior into three parts, as beta-TCVAE does.

The source of this split is Chen et al. 2018, arXiv:1802.04942. A code z has dimensions z_k,
q(z | n) is the posterior of image n, and q(z) = E_n[q(z | n)] is the aggregate posterior over all
images. Then:

    KL(q(z|n) | p(z))  =  log q(z|n) / q(z)            index-code mutual information
                       +  log q(z) / prod_k q(z_k)     total correlation
                       +  sum_k log q(z_k) / p(z_k)    dimension-wise KL

This equation for the KL holds in the mean over images n and codes z. beta-TCVAE multiplies the
total correlation by beta. q(z) is estimated from a batch, so the three parts are estimates too. In
the sum of the three parts, q(z) cancels: the sum is log q(z|n) - log p(z), whose mean is the KL.

`B` images of a batch, `M` posteriors whose mean is the aggregate posterior, `N` images of the data
set, `D` dimensions of a code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentvae.errors import UserError, nearest

Sampling = Literal["stratified", "weighted"]
CHUNK = 64  # number of codes that are compared with all posteriors at a time


@dataclass(frozen=True)
class KLParts:
    """The three parts of the KL, in nats per image: (B,), or scalars if they are means.

    Attributes:
        information: mutual information between the index of an image and its code. The mutual
            information is at most log N for a data set of N images.
        total_correlation: dependence between the dimensions of the code, 0 if they are independent.
        dimension_kl: sum over dimensions k of the KL from q(z_k) to the prior p(z_k).
    """

    information: Tensor
    total_correlation: Tensor
    dimension_kl: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of the three parts, which estimates the KL."""
        return self.information + self.total_correlation + self.dimension_kl


def split_kl(
    z: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    num_images: int,
    sampling: Sampling = "stratified",
) -> KLParts:
    """Return the three parts of the KL for each code of a batch, with their graph.

    q(z) is the mean of the posteriors of all N images of the data set, and is estimated from the B
    images of the batch. Stratified sampling estimates q(z) without bias, and is exact if the batch
    is the data set. Weighted sampling is the simpler estimate of the paper (arXiv:1802.04942). If
    the batch is the data set, weighted sampling gives parts that are wrong by multiples of log N,
    but exact gradients. For N much larger than B, the two sampling methods have different
    gradients.

    With several processes, give the codes and posteriors of all ranks
    (`distributed.gather_with_gradient`). The estimate is then the same as that of one process with
    the images of all ranks.

    Args:
        z: one sample from the posterior of each image, (B, D) for codes of D dimensions.
        mean: means of the posteriors, (B, D).
        logvar: log-variances of the posteriors, (B, D).
        num_images: number of images N of the data set, at least B.
        sampling: "stratified" or "weighted".

    Returns:
        Three tensors (B,), float64 if `z` is float64, else float32.

    Raises:
        UserError: the shapes differ, `sampling` is unknown, or B is too large or too small.
    """
    _check(z, mean, logvar, num_images, sampling)

    z, mean, logvar = (_float(t) for t in (z, mean, logvar))
    weights = LOG_WEIGHTS[sampling](len(z), num_images).to(z.dtype).to(z.device)
    return _parts(z, mean, logvar, posterior=(mean, logvar), log_weights=weights)


@torch.no_grad()
def measure_kl_parts(
    mean: Tensor,
    logvar: Tensor,
    *,
    codes: int | None = None,
    generator: torch.Generator | None = None,
) -> KLParts:
    """Return the mean of each part of the KL over many images, to evaluate a model.

    q(z) is the mean of the given posteriors of M images, so the part `information` cannot exceed
    log M. If `information` comes near log M, the measured total correlation is too large, and more
    images are needed. Compare only models that were measured with the same M. The time grows with
    the number of codes times M: 5,000 codes of 5,000 images with 10 dimensions take 9 seconds on
    one core.

    Args:
        mean: means of the posteriors of M images with D dimensions, (M, D).
        logvar: log-variances of the posteriors, (M, D).
        codes: number of codes over which the parts are averaged. One code is drawn from the
            posterior of each of the first `codes` images. The default is M.
        generator: random generator that draws the codes, on the device of `mean`.

    Returns:
        Three scalars.
    """
    _check(mean, mean, logvar, len(mean), "stratified")
    mean, logvar = _float(mean), _float(logvar)
    own_mean, own_logvar = mean[:codes], logvar[:codes]
    noise = torch.randn(own_mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    z = own_mean + noise * (own_logvar / 2).exp()
    chunk = max(CHUNK * CHUNK // len(mean), 1) if len(mean) > CHUNK**2 else CHUNK
    uniform = torch.full((1, len(mean)), -math.log(len(mean))).to(z)

    parts = [
        _parts(*rows, posterior=(mean, logvar), log_weights=uniform)
        for rows in zip(z.split(chunk), own_mean.split(chunk), own_logvar.split(chunk), strict=True)
    ]
    return KLParts(
        torch.cat([part.information for part in parts]).mean(),
        torch.cat([part.total_correlation for part in parts]).mean(),
        torch.cat([part.dimension_kl for part in parts]).mean(),
    )


def stratified_log_weights(batch: int, num_images: int) -> Tensor:
    """Return the log-weight of each posterior j in the estimate of q(z_i): (B, B).

    q(z_i) is the density of code z_i under the mean of the posteriors of all N images. In the
    estimate of q(z_i) from a batch of B images, the posterior of image i has the weight 1/N. The
    other B - 1 posteriors share the remaining weight 1 - 1/N equally.

    The paper (arXiv:1802.04942, appendix C.2) gives the last of the other posteriors a different
    weight. The order of the images is random, so this function takes the mean of the paper's
    weights over all orders. With the mean weights, the estimate of q(z_i) has the same mean as in
    the paper, and less variance. The authors' first code sets wrong entries of the matrix of
    weights: https://github.com/rtqichen/beta-tcvae/pull/1.
    """
    if batch == 1:
        return torch.zeros(1, 1)  # `num_images` is also 1, see `_check`
    others = math.log((num_images - 1) / (num_images * (batch - 1)))
    weights = torch.full((batch, batch), others, dtype=torch.float64)
    return weights.fill_diagonal_(-math.log(num_images))


def weighted_log_weights(batch: int, num_images: int) -> Tensor:
    """Return the log-weights of weighted sampling (arXiv:1802.04942, section 4.1): (B, B).

    All log-weights are -log(B N), for batches of B images from N images.
    """
    return torch.full((batch, batch), -math.log(batch * num_images), dtype=torch.float64)


LOG_WEIGHTS: dict[Sampling, Callable[[int, int], Tensor]] = {
    "stratified": stratified_log_weights,
    "weighted": weighted_log_weights,
}


def _parts(
    z: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    posterior: tuple[Tensor, Tensor],
    log_weights: Tensor,
) -> KLParts:
    """Return the three parts of the KL for B codes.

    Args:
        z: the codes, (B, D).
        mean, logvar: mean and log-variance of the posterior from which each code was drawn, (B, D).
        posterior: mean and log-variance of the M posteriors whose weighted mean is q(z), (M, D).
        log_weights: log-weights of the M posteriors, (B, M), or (1, M) if they are the same for all
            codes.
    """
    own = _log_normal(z, mean, logvar).sum(1)
    prior = _log_normal(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)

    # log q(z) of whole codes, and the sum over dimensions of log q(z_k)
    densities = _log_normal(z[:, None], posterior[0][None], posterior[1][None])  # (B, M, D)
    joint = (densities.sum(2) + log_weights).logsumexp(1)
    marginals = (densities + log_weights[..., None]).logsumexp(1).sum(1)
    return KLParts(own - joint, joint - marginals, marginals - prior)


def _log_normal(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mean).square() * (-logvar).exp())


def _float(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check(z: Tensor, mean: Tensor, logvar: Tensor, num_images: int, sampling: str) -> None:
    if z.ndim != 2 or not z.shape == mean.shape == logvar.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (z, mean, logvar))
        raise UserError(f"codes, means and log-variances must all be (B, D) (got {shapes}).")
    if sampling not in LOG_WEIGHTS:
        hint = nearest(sampling, LOG_WEIGHTS)
        raise UserError(f"sampling must be stratified or weighted (got '{sampling}'){hint}")
    if len(z) > num_images or len(z) < min(2, num_images):
        raise UserError(
            f"a batch for the total correlation has 2 to num_images ({num_images}) images (got "
            f"{len(z)})."
        )
