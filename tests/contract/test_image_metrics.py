"""What every metric of images keeps, so that a new one is a file, a line and a column.

Its numbers are tested against other implementations in tests/metrics.
"""

from typing import get_args

import pytest
import torch
from torch import Tensor

from latentvae.losses.lpips_weights import Net
from latentvae.metrics.table import IMAGE_METRICS
from latentvae.report.schema import IMAGE_COLUMNS

EVERY = pytest.mark.parametrize("name", IMAGE_METRICS)


def pairs(name: str, *, count: int = 3, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Images of an odd size, as small as it takes them, and noisy copies."""
    side = max(IMAGE_METRICS[name].min_size, 12)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, side, side + 1, generator=generator) * 2 - 1
    noise = torch.randn(images.shape, generator=generator)
    return images, (images + 0.1 * noise).clamp(-1, 1)


def measured(name: str, images: Tensor, recon: Tensor) -> Tensor:
    values = IMAGE_METRICS[name].measure(images, recon)
    assert values is not None
    return values


def test_reports_have_a_column_for_each() -> None:
    assert set(IMAGE_COLUMNS) == {*IMAGE_METRICS, *(f"lpips_{net}" for net in get_args(Net))}
    headings = [column.heading for column in IMAGE_COLUMNS.values()]
    assert len(set(headings)) == len(headings)


@EVERY
def test_it_says_how_it_is_measured(name: str) -> None:
    assert IMAGE_METRICS[name].protocol.isprintable() and IMAGE_METRICS[name].protocol


@EVERY
@pytest.mark.parametrize("channels", [1, 3])
def test_a_float32_value_per_image_whatever_the_batch(name: str, channels: int) -> None:
    images, recon = pairs(name, channels=channels)
    values = measured(name, images, recon)
    assert values.shape == (3,) and values.dtype == torch.float32 and values.isfinite().all()
    alone = [measured(name, images[i : i + 1], recon[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), values, rtol=1e-4, atol=1e-5)


@EVERY
def test_nothing_is_better_than_a_copy(name: str) -> None:
    images, recon = pairs(name)
    far = (recon - images) * 3 + images
    best, good, worse = (measured(name, images, other) for other in (images, recon, far))
    rising, falling = best - good, good - worse
    assert bool(((rising > 0) & (falling > 0)).all() or ((rising < 0) & (falling < 0)).all())


@EVERY
def test_it_keeps_no_graph_and_changes_nothing(name: str) -> None:
    images, recon = pairs(name)
    before = images.clone(), recon.clone()
    values = measured(name, images, recon.requires_grad_())
    assert not values.requires_grad
    assert torch.equal(images, before[0]) and torch.equal(recon.detach(), before[1])
