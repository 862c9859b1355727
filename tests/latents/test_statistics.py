"""Latent statistics against torch's own mean and variance of the joined tensor."""

import math

import pytest
import torch
from diffusers import AutoencoderKL

from latentvae.latents import LatentStatistics, latent_statistics


@pytest.fixture
def z() -> torch.Tensor:
    """Channels of different mean and width, far from zero: sums of squares would cancel."""
    noise = torch.randn(37, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([1.0, 2.0, 0.1, 3.0]).view(4, 1, 1) + 1000.0


def collect(*batches: torch.Tensor) -> LatentStatistics:
    statistics = LatentStatistics()
    for batch in batches:
        statistics.update(batch)
    return statistics


def test_equals_torch_on_the_joined_tensor(z: torch.Tensor) -> None:
    statistics, joined = collect(*z.split(5)), z.double()
    channels = joined.transpose(0, 1).flatten(1)
    assert statistics.num_images == 37
    torch.testing.assert_close(statistics.channel_mean, channels.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.channel_std, channels.std(1), rtol=1e-10, atol=0)
    assert statistics.mean == pytest.approx(joined.mean().item(), rel=1e-12)
    assert statistics.std == pytest.approx(joined.std().item(), rel=1e-10)
    assert statistics.scaling_factor == pytest.approx(1 / joined.std().item(), rel=1e-10)
    assert statistics.shift_factor == statistics.mean


def test_scaled_latents_have_unit_variance(z: torch.Tensor) -> None:
    statistics = collect(z)
    scaled = (z.double() - statistics.shift_factor) * statistics.scaling_factor
    assert scaled.std().item() == pytest.approx(1.0)
    assert scaled.mean().item() == pytest.approx(0.0, abs=1e-9)


def test_merging_parts_in_any_order_is_one_pass(z: torch.Tensor) -> None:
    whole, (a, b, c) = collect(z), (collect(part) for part in z.split(13))
    merged = LatentStatistics()
    for part in (c, LatentStatistics(), a, b):
        merged.merge(part)
    assert merged.num_images == whole.num_images
    assert merged.std == pytest.approx(whole.std, rel=1e-12)
    torch.testing.assert_close(merged.channel_std, whole.channel_std, rtol=1e-12, atol=0)


def test_merging_does_not_change_the_other(z: torch.Tensor) -> None:
    first, second = collect(z[:5]), collect(z[5:])
    before = second.to_dict()
    empty = LatentStatistics()
    empty.merge(second)
    empty.merge(first)
    assert second.to_dict() == before


def test_one_process_joins_to_itself(z: torch.Tensor) -> None:
    assert collect(z).joined().to_dict() == collect(z).to_dict()


def test_wrong_latents_are_refused(z: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not finite"):
        collect(torch.full((1, 2, 2, 2), math.nan))
    with pytest.raises(ValueError, match=r"\(B, d, h, w\)"):
        collect(z[0])
    with pytest.raises(ValueError, match="4 and 2"):
        collect(z, z[:, :2])
    with pytest.raises(ValueError, match="constant"):
        _ = collect(torch.ones(2, 2, 2, 2)).scaling_factor
    with pytest.raises(ValueError, match="at least 2"):
        _ = LatentStatistics().std


def test_measures_posterior_samples_of_the_first_images() -> None:
    torch.manual_seed(0)
    net = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    batches = torch.rand(3, 4, 3, 8, 8) * 2 - 1
    drawn: list[int] = []

    def source():
        for i, batch in enumerate(batches):
            drawn.append(i)
            yield batch

    generator = torch.Generator().manual_seed(1)
    statistics = latent_statistics(net, source(), max_images=6, generator=generator)
    assert (statistics.num_images, drawn) == (6, [0, 1])

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        z = [net.encode(i).latent_dist.sample(generator) for i in (batches[0], batches[1][:2])]
    assert statistics.std == pytest.approx(torch.cat(z).double().std().item())
