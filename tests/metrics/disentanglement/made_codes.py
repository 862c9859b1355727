"""Codes whose scores are known: perfect, entangled, and scaled and permuted."""

import numpy as np

SIZES = (6, 8, 5, 7)
# Rows are orthogonal, and each dimension has an equal share of each factor.
MIX = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def make_factors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES, size=(count, len(SIZES)))


def perfect(factors: np.ndarray) -> np.ndarray:
    """One dimension per factor, each with standard deviation 1."""
    sizes = np.array(SIZES)
    return (factors - (sizes - 1) / 2) / np.sqrt((sizes**2 - 1) / 12)


def entangled(factors: np.ndarray) -> np.ndarray:
    """Every dimension has an equal share of every factor."""
    return perfect(factors) @ MIX


def changed(codes: np.ndarray) -> np.ndarray:
    """The same code with its dimensions in another order, scaled, shifted and flipped."""
    return codes[:, [2, 0, 3, 1]] * [4.0, -0.5, 2.0, 8.0] + [0.0, 3.0, -1.0, 16.0]
