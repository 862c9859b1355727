"""Compute the FactorVAE score of a code (Kim and Mnih 2018, arXiv:1802.05983, section 4).

For a vote, L images are drawn in which one factor is fixed and all other factors are random. In the
codes of these images, the dimension whose variance shrinks most should tell which factor was fixed.
Each variance is first divided by the variance of the same dimension over random images. A vote is a
pair: the dimension whose variance shrinks most, and the fixed factor. For each dimension, a
classifier predicts the factor that occurs most often in the votes with this dimension. The score is
the classifier's accuracy on new votes.

`N` images, `D` dimensions of the code, `F` factors, `L` images of a vote.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from latentvae.errors import UserError

Represent = Callable[[np.ndarray], np.ndarray]
CHUNK = 2048  # number of images whose codes are computed at once


@dataclass(frozen=True)
class FactorVAEScore:
    """The result of `factor_vae_score`.

    A vote is a pair: the factor that is fixed in some images, and the dimension whose variance
    shrinks most in their codes. The classifier predicts the factor from the dimension.

    Attributes:
        score: accuracy on votes that the classifier has not seen, from 0 to 1. Guessing gives 1/F.
            If all dimensions are pruned, the score is 0.
        train_accuracy: accuracy on the training votes, from which the classifier was made.
        votes: (D, F), number of training votes for each pair of dimension and factor. A pruned
            dimension has no votes.
        active: (D,), True for each dimension that was not pruned. A dimension is pruned if its
            standard deviation is 0 or below `min_std`.
    """

    score: float
    train_accuracy: float
    votes: np.ndarray
    active: np.ndarray


def factor_vae_score(
    represent: Represent,
    sizes: Sequence[int],
    *,
    num_train: int = 800,
    num_test: int = 800,
    images_per_vote: int = 64,
    num_variance: int = 10_000,
    min_std: float = 0.05,
    seed: int = 0,
) -> FactorVAEScore:
    """Return how well the codes of images with one fixed factor tell which factor is fixed.

    Each group of images gives a vote: its fixed factor, and the dimension of the code whose
    variance shrinks most. A classifier predicts the factor from the dimension.

    The library disentanglement_lib (arXiv:1811.12359) makes 10,000 votes for the classifier and
    5,000 for the test. With 800 test votes, the standard error of a score is at most 0.018. By
    default, disentanglement_lib also lets collapsed dimensions vote. The study of the library's
    authors leaves out (prunes) dimensions with a standard deviation below 0.05, as this function
    does.

    Args:
        represent: function from factors (N, F) to codes (N, D) of images with these factors.
        sizes: the number of values of each factor. Factors are drawn uniformly.
        num_train: number of votes for the classifier.
        num_test: number of votes for the test. By default, training and test need 1,600 votes of 64
            images, which are 102,400 images.
        images_per_vote: number of images L of a vote, at least 2.
        num_variance: number of images from which the variance of each dimension is measured.
        min_std: a dimension whose codes have a standard deviation below `min_std` counts as
            collapsed to the prior, and is pruned.
        seed: seed of the random factors.

    Raises:
        UserError: an option is too small, or codes have a wrong shape or are not finite.
    """
    _check(sizes, num_train, num_test, images_per_vote, num_variance)
    rng = np.random.default_rng(seed)
    codes = _represent(represent, rng.integers(0, sizes, size=(num_variance, len(sizes))))
    variance = codes.var(0, ddof=1)
    active = (variance > 0) & (np.sqrt(variance) >= min_std)
    if not active.any():
        nothing = np.zeros((len(variance), len(sizes)), dtype=np.int64)
        return FactorVAEScore(0.0, 0.0, nothing, active)

    def count(num_votes: int) -> np.ndarray:
        factors, fixed = _fixed_factors(sizes, num_votes, images_per_vote, rng)
        spread = _represent(represent, factors).reshape(num_votes, images_per_vote, -1).var(1)
        ratio = np.where(active, spread / np.where(active, variance, 1.0), np.inf)
        votes = np.zeros((len(variance), len(sizes)), dtype=np.int64)
        np.add.at(votes, (ratio.argmin(1), fixed), 1)
        return votes

    votes, test = count(num_train), count(num_test)
    majority = votes.argmax(1)
    right = [found[np.arange(len(found)), majority].sum() / found.sum() for found in (test, votes)]
    return FactorVAEScore(float(right[0]), float(right[1]), votes, active)


def _fixed_factors(
    sizes: Sequence[int], num_votes: int, images_per_vote: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return factors (num_votes * L, F), and which factor is fixed in each vote, (num_votes,)."""
    varied = [f for f, size in enumerate(sizes) if size > 1]
    fixed = rng.choice(varied, size=num_votes)
    factors = rng.integers(0, sizes, size=(num_votes, images_per_vote, len(sizes)))
    vote = np.arange(num_votes)
    factors[vote, :, fixed] = factors[vote, :1, fixed]
    return factors.reshape(-1, len(sizes)), fixed


def _represent(represent: Represent, factors: np.ndarray) -> np.ndarray:
    parts = [
        np.asarray(represent(factors[start : start + CHUNK]), dtype=np.float64)
        for start in range(0, len(factors), CHUNK)
    ]
    wrong = [part.shape for part in parts if part.ndim != 2]
    if wrong or sum(map(len, parts)) != len(factors):
        raise UserError(
            "represent must return one code (D,) for each row of factors (got an array of shape "
            f"{(wrong or [parts[0].shape])[0]})."
        )
    codes = np.concatenate(parts)
    if not np.isfinite(codes).all():
        raise UserError("codes must be finite, but some are infinite or NaN.")
    return codes


def _check(
    sizes: Sequence[int], num_train: int, num_test: int, images_per_vote: int, num_variance: int
) -> None:
    if sum(size > 1 for size in sizes) < 2:
        raise UserError(f"sizes needs two factors of two or more values (got {list(sizes)}).")
    least = {"num_train": 1, "num_test": 1, "images_per_vote": 2, "num_variance": 2}
    given = (num_train, num_test, images_per_vote, num_variance)
    for (name, smallest), value in zip(least.items(), given, strict=True):
        if value < smallest:
            raise UserError(f"{name} must be at least {smallest} (got {value}).")
