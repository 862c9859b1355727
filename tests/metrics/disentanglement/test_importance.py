import math

import numpy as np
import pytest
import scipy.stats

from latentvae.errors import UserError
from latentvae.metrics.disentanglement import dci
from latentvae.metrics.disentanglement.importance import concentration
from tests.metrics.disentanglement.made_codes import changed, entangled, make_factors, perfect


def test_a_perfect_code_has_ones() -> None:
    factors = make_factors(900)
    result = dci(perfect(factors), factors, categorical=[0])
    assert result.disentanglement > 0.99 and result.completeness > 0.99
    assert result.informativeness > 0.99
    assert result.importance.argmax(0).tolist() == [0, 1, 2, 3]
    again = dci(changed(perfect(factors)), factors, categorical=[0])
    assert again.importance == pytest.approx(result.importance[[2, 0, 3, 1]], abs=0.01)
    assert again.disentanglement == pytest.approx(result.disentanglement, abs=0.01)


def test_an_entangled_code_is_informative_but_not_disentangled() -> None:
    factors = make_factors(1500)
    result = dci(entangled(factors), factors, categorical=())
    assert result.disentanglement < 0.1 and result.completeness < 0.1
    assert result.informativeness > 0.7


def test_a_factor_that_is_in_two_dimensions_is_less_complete() -> None:
    """The dimensions stay pure. Half the importance in each of two of four: 1 - log 2 / log 4."""
    importance = np.array([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]])
    assert concentration(importance) == pytest.approx(1)
    assert concentration(importance.T) == pytest.approx(1 - math.log(2) / math.log(4))


def test_rows_count_by_their_sums() -> None:
    importance = np.array([[3.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    assert concentration(importance) == pytest.approx((3 * 1 + 1 * 0 + 0) / 4)
    assert concentration(np.zeros((2, 3))) == 0
    matrix = np.random.default_rng(0).random((7, 3))
    rows = 1 - scipy.stats.entropy(matrix.T, base=3)
    assert concentration(matrix) == pytest.approx((rows * matrix.sum(1)).sum() / matrix.sum())


def test_noise_is_not_informative_and_one_dimension_is_too_few() -> None:
    factors = make_factors(300)[:, :2]
    noise = np.random.default_rng(5).normal(size=(300, 2))
    assert dci(noise, factors, categorical=()).informativeness < 0.05
    with pytest.raises(UserError, match="two dimensions"):
        dci(noise[:, :1], factors, categorical=())
