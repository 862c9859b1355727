import numpy as np
import pytest

from latentvae.errors import UserError
from latentvae.metrics.disentanglement import dci, predictability, sap
from latentvae.metrics.disentanglement.codes import split_rows
from tests.metrics.disentanglement.made_codes import changed, entangled, make_factors, perfect


def test_a_perfect_code_has_one_and_an_entangled_code_nothing() -> None:
    factors = make_factors(4000)
    assert sap(perfect(factors), factors, categorical=()) > 0.99
    scores = predictability(entangled(factors), factors, categorical=())
    assert scores == pytest.approx(np.full((4, 4), 0.25), abs=0.05)  # each has a quarter of each
    assert sap(entangled(factors), factors, categorical=()) < 0.03


def test_a_factor_without_order_is_classified() -> None:
    """Two classes that a line separates, and a dimension that tells nothing."""
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 2, size=(900, 2))
    codes = np.column_stack([factors[:, 0] * 2.0 - 1, rng.normal(size=900)])
    scores = predictability(codes, factors, categorical=[0])
    assert scores[0, 0] == 1 and abs(scores[1, 0] - 0.5) < 0.1  # accuracy
    assert scores[:, 1].max() < 0.02  # R^2


def test_scale_order_and_sign_of_dimensions_do_not_matter() -> None:
    factors = make_factors(600)
    codes = perfect(factors) + np.random.default_rng(1).normal(size=factors.shape)
    scores = [sap(c, factors, categorical=[0]) for c in (codes, changed(codes))]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_regression_is_the_squared_correlation() -> None:
    factors = make_factors(300)
    codes = perfect(factors) + np.random.default_rng(1).normal(size=factors.shape)
    expected = np.corrcoef(codes.T, factors.T)[:4, 4:] ** 2
    assert np.allclose(predictability(codes, factors, categorical=()), expected)


def test_a_collapsed_dimension_and_an_unknown_factor() -> None:
    factors = make_factors(300)
    codes = np.column_stack([perfect(factors)[:, 0], np.zeros(300)])
    assert (predictability(codes, factors, categorical=())[1] == 0).all()
    with pytest.raises(UserError, match=r"0 to 3 \(got 4\)"):
        sap(codes, factors, categorical=[4])
    with pytest.raises(UserError, match="test_share"):
        sap(codes[:2], np.array([[0], [1]]), categorical=[0], test_share=0.1)


def test_a_class_that_only_test_rows_have_is_named() -> None:
    factors = make_factors(30)[:, :2]
    codes = np.random.default_rng(0).normal(size=(30, 2))
    _, test = split_rows(factors, categorical=(), test_share=1 / 3, seed=0)
    factors[:, 1] = 0
    factors[test[0], 1] = 1
    for score in (sap, dci):
        with pytest.raises(UserError, match="factor 1 has the value 0 in all 20 rows"):
            score(codes, factors, categorical=[1])
        score(codes, factors, categorical=())
