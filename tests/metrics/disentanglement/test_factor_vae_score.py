import numpy as np
import pytest

from latentvae.errors import UserError
from latentvae.metrics.disentanglement import factor_vae_score
from tests.metrics.disentanglement.made_codes import SIZES, changed, entangled, perfect

FEW = {"num_train": 300, "num_test": 300, "num_variance": 2000}


def test_a_perfect_code_has_one_in_any_order_and_scale() -> None:
    result = factor_vae_score(perfect, SIZES, **FEW)
    assert result.score == result.train_accuracy == 1
    assert (result.votes > 0).sum() == 4 and result.votes.sum() == 300 and result.active.all()
    again = factor_vae_score(lambda factors: changed(perfect(factors)), SIZES, **FEW)
    assert (again.votes == result.votes[[2, 0, 3, 1]]).all()


def test_an_entangled_code_is_near_guessing() -> None:
    result = factor_vae_score(entangled, SIZES, **FEW)
    assert 0.15 < result.score < 0.4  # of 1/4


def test_noise_is_near_guessing_on_unseen_votes() -> None:
    rng = np.random.default_rng(0)
    result = factor_vae_score(lambda factors: rng.normal(size=(len(factors), 6)), SIZES, **FEW)
    assert 0.15 < result.score < 0.35


def test_two_factors_in_one_dimension_cannot_be_told_apart() -> None:
    """Of the votes for factors 0 and 1, the classifier takes the more frequent one."""

    def represent(factors: np.ndarray) -> np.ndarray:
        codes = perfect(factors)
        return np.column_stack([codes[:, 0] + codes[:, 1], codes[:, 2:]])

    result = factor_vae_score(represent, SIZES, **FEW)
    assert 0.65 < result.score < 0.85
    assert (result.votes[1:] > 0).sum() == 2


def test_a_collapsed_dimension_does_not_vote() -> None:
    """Its noise is small but relative to its variance it could win."""
    rng = np.random.default_rng(0)

    def represent(factors: np.ndarray) -> np.ndarray:
        dead = rng.normal(size=(len(factors), 1)) * 0.01
        return np.column_stack([dead, entangled(factors)])

    result = factor_vae_score(represent, SIZES, **FEW)
    assert result.active.tolist() == [False, True, True, True, True]
    assert result.votes[0].sum() == 0
    voting = factor_vae_score(represent, SIZES, min_std=0.0, **FEW)
    assert voting.active.all() and voting.votes[0].sum() > 0
    dead = factor_vae_score(lambda factors: np.zeros((len(factors), 3)), SIZES, min_std=0, **FEW)
    assert dead.score == 0 and not dead.active.any()


def test_one_seed_gives_one_score_and_factors_of_one_value_are_never_fixed() -> None:
    seen: list[np.ndarray] = []

    def represent(factors: np.ndarray) -> np.ndarray:
        seen.append(factors)
        return factors + 0.1 * entangled(factors)

    sizes = (6, 1, 5, 7)
    first, second = (factor_vae_score(represent, sizes, seed=3, **FEW) for _ in range(2))
    assert (first.votes == second.votes).all() and first.score == second.score
    assert first.votes[:, 1].sum() == 0
    votes = np.concatenate(seen[1:])[: 300 * 64].reshape(300, 64, 4)
    fixed = (votes == votes[:, :1]).all(1)
    assert fixed[:, 1].all() and (fixed.sum(1) == 2).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images_per_vote": 1}, "images_per_vote must be at least 2"),
        ({"num_train": 0}, "num_train must be at least 1"),
        ({"sizes": (1, 5)}, "two factors"),
        ({"represent": lambda factors: np.zeros(len(factors))}, "one code"),
        ({"represent": lambda factors: np.full((len(factors), 2), np.nan)}, "finite"),
    ],
)
def test_wrong_options_are_named(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        factor_vae_score(**{"represent": perfect, "sizes": SIZES, **FEW, **options})
