import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentvae.bottlenecks import nearest_codes


def exact(vectors: Tensor, codebook: Tensor) -> Tensor:
    """By differences in float64: no expanded squares."""
    return (vectors.double()[:, None] - codebook.double()).square().sum(2).argmin(1)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple) else (out,)
        sizes = [
            t.untyped_storage().size() // t.element_size() for t in made if isinstance(t, Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize(("N", "K", "D"), [(300, 1000, 8), (37, 33, 3), (5, 1, 2), (0, 4, 2)])
@pytest.mark.parametrize("chunk", [None, 100, 50_000])
def test_equals_differences_in_float64(N: int, K: int, D: int, chunk: int | None) -> None:
    vectors, codebook = torch.randn(N, D), torch.randn(K, D)
    found = nearest_codes(vectors, codebook, chunk=chunk)
    assert found.dtype == torch.int64
    assert torch.equal(found, exact(vectors, codebook))


@pytest.mark.parametrize("chunk", [640, 3000, None])
def test_the_lowest_of_equal_codes(chunk: int | None) -> None:
    vectors, codebook = torch.randn(200, 8), torch.randn(100, 8)
    found = nearest_codes(vectors, codebook.repeat(20, 1), chunk=chunk)
    assert torch.equal(found, exact(vectors, codebook))


def test_a_common_offset_costs_no_digits() -> None:
    offset = 1e4 * torch.randn(16)
    vectors, codebook = torch.randn(500, 16) + offset, torch.randn(700, 16) + offset
    expected = exact(vectors, codebook)
    assert torch.equal(nearest_codes(vectors, codebook), expected)
    expanded = codebook.square().sum(1) - 2 * vectors @ codebook.T
    assert (expanded.argmin(1) == expected).float().mean() < 0.5  # what it is a remedy for


def test_memory_is_that_of_a_chunk() -> None:
    vectors, codebook = torch.randn(1000, 4), torch.randn(5000, 4)
    with LargestTensor() as largest:
        nearest_codes(vectors, codebook, chunk=30_000)
    assert largest.elements <= 30_000


def test_low_precision_and_autocast_are_searched_in_float32() -> None:
    vectors, codebook = torch.randn(500, 8).bfloat16(), torch.randn(500, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_codes(vectors, codebook)
    assert torch.equal(found, exact(vectors, codebook))


@pytest.mark.parametrize("value", [0.0, 1e30, torch.inf, torch.nan])
def test_any_vector_gets_an_index(value: float) -> None:
    found = nearest_codes(torch.full((3, 4), value), torch.randn(33, 4))
    assert ((found >= 0) & (found < 33)).all()
