import math

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from latentvae.errors import UserError
from latentvae.metrics.disentanglement import mig, mutual_information
from tests.metrics.disentanglement.made_codes import changed, entangled, make_factors, perfect


def test_a_perfect_code_has_one_and_an_entangled_code_almost_nothing() -> None:
    factors = make_factors(20_000)
    assert mig(perfect(factors), factors) > 0.99
    assert mig(entangled(factors), factors) < 0.03


def test_scale_order_and_sign_of_dimensions_do_not_matter() -> None:
    factors = make_factors(2000)
    codes = perfect(factors) + np.random.default_rng(1).normal(size=factors.shape) / 4
    assert mig(changed(codes), factors) == pytest.approx(mig(codes, factors), abs=0.003)


def test_two_copies_of_a_dimension_leave_no_gap() -> None:
    factors = make_factors(2000)
    codes = np.repeat(perfect(factors), 2, axis=1)
    assert mig(codes, factors) == pytest.approx(0, abs=1e-12)


def test_a_case_by_hand() -> None:
    """A binary factor, a dimension that tells it, and one that tells it of half of the images."""
    factors = np.array([[0], [0], [1], [1]])
    codes = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 1.0], [9.0, 1.0]])
    information = mutual_information(codes, factors)
    half = math.log(2) - 0.75 * (-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3))
    assert information[:, 0] == pytest.approx([math.log(2), half])
    assert mig(codes, factors) == pytest.approx((math.log(2) - half) / math.log(2))
    assert mig(codes[:, :1], factors) == pytest.approx(1)  # no second dimension


def test_the_information_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    factors = make_factors(3000)
    codes = perfect(factors) + rng.normal(size=factors.shape)
    found = mutual_information(codes, factors, bins=20)
    for d in range(4):
        edges = np.histogram(codes[:, d], 20)[1][:-1]
        binned = np.digitize(codes[:, d], edges)
        for f in range(4):
            assert found[d, f] == pytest.approx(mutual_info_score(factors[:, f], binned), abs=1e-9)


def test_a_collapsed_dimension_knows_nothing() -> None:
    factors = make_factors(500)
    codes = np.column_stack([perfect(factors), np.full(500, 3.0)])
    assert (np.abs(mutual_information(codes, factors)[-1]) < 1e-12).all()
    assert mig(codes, factors) == pytest.approx(mig(perfect(factors), factors))


@pytest.mark.parametrize(
    ("codes", "factors", "said"),
    [
        (np.zeros((3, 2)), np.array([[0], [1]]), r"\(3, 2\) and \(2, 1\)"),
        (np.zeros((2, 2)), np.array([[0.5], [1]]), "integers"),
        (np.full((2, 2), np.nan), np.array([[0], [1]]), "finite"),
        (np.zeros((2, 2)), np.array([[0, 4], [1, 4]]), "factor 1 has the value 4 in all 2 rows"),
    ],
)
def test_wrong_arrays_are_named(codes: np.ndarray, factors: np.ndarray, said: str) -> None:
    with pytest.raises(UserError, match=said):
        mig(codes, factors)
