"""A traversal changes one dimension in each row, and the rows are sorted by KL."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.errors import UserError
from latentvae.latents.traversal import save_traversal, traverse

MEAN = torch.tensor([0.5, -0.25, 0.1])


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Paint each dimension into its own column of 2 x 3 pixels: (N, 1, 2, 3)."""
    return (codes / 4)[:, None, None, :].expand(-1, 1, 2, -1)


def test_one_dimension_takes_the_values_and_the_others_stay() -> None:
    images = traverse(decode, MEAN, dimensions=[2, 0])
    assert images.shape == (2, 9, 1, 2, 3)
    for row, number in enumerate((2, 0)):
        found = images[row, :, 0, 0] * 4
        assert torch.allclose(found[:, number], torch.linspace(-2, 2, 9))
        others = [other for other in range(3) if other != number]
        assert torch.allclose(found[:, others], MEAN[others].expand(9, 2))
    assert MEAN.tolist() == pytest.approx([0.5, -0.25, 0.1])


def test_the_picture_has_a_labelled_row_for_each_dimension_by_kl(tmp_path: Path) -> None:
    path = tmp_path / "a" / "traversal.png"
    order = save_traversal(decode, MEAN, path, kl=torch.tensor([0.1, 2.0, 1.0]), values=[-2, 2])
    assert order == [1, 2, 0]
    picture = np.asarray(Image.open(path))
    height, left = picture.shape[0] // 3, 110
    assert picture[:height, :left].min() < 128  # a label
    cell = (picture.shape[1] - left) // 2
    for row, number in enumerate(order):
        middle = row * height + height // 4
        places = [left + c * cell + int((number + 0.5) * cell / 5) for c in range(2)]
        dark, light = (int(picture[middle, x]) for x in places)
        assert (dark, light) == (64, 191), number  # -2 / 4 and 2 / 4


def test_all_dimensions_without_kl_and_some_of_them(tmp_path: Path) -> None:
    assert save_traversal(decode, MEAN, tmp_path / "a.png") == [0, 1, 2]
    kl = torch.tensor([0.1, 2.0, 1.0])
    assert save_traversal(decode, MEAN, tmp_path / "b.png", kl=kl, dimensions=[0, 2]) == [2, 0]


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="from 0 to 2"):
        traverse(decode, MEAN, dimensions=[3])
    with pytest.raises(UserError, match="one image"):
        traverse(decode, MEAN[None], dimensions=[0])
    with pytest.raises(UserError, match="one value per dimension"):
        save_traversal(decode, MEAN, tmp_path / "a.png", kl=torch.zeros(2))
    with pytest.raises(UserError, match="from 0 to 2"):
        save_traversal(decode, MEAN, tmp_path / "a.png", kl=torch.zeros(3), dimensions=[9])
