"""Latent health against numpy, scipy and diffusers; constructed faults get their warning."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from latentvae.metrics.latent import LatentHealth, LatentReport


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def z() -> Tensor:
    """Skewed, heavy-tailed and correlated channels, far from zero: raw powers would cancel."""
    noise = normal(24, 4, 5, 3)
    noise[:, 1] = noise[:, 1].exp()
    noise[:, 2] = noise[:, 2] ** 3
    noise[:, 3] = 0.5 * noise[:, 3] - 0.8 * noise[:, 0]
    return noise + torch.tensor([1000.0, 0, -50, 3]).view(4, 1, 1)


def collect(z: Tensor, logvar: Tensor | None = None, *, batch: int = 5) -> LatentHealth:
    health = LatentHealth(num_channels=z.shape[1])
    for i in range(0, len(z), batch):
        part = slice(i, i + batch)
        health.update(z[part], logvar=None if logvar is None else logvar[part])
    return health


def report(z: Tensor, logvar: Tensor | None = None, **config) -> LatentReport:
    return collect(z, logvar).result(**{"scaling_factor": 1.0, "shift_factor": None, **config})


def rows_of(z: Tensor) -> np.ndarray:
    return z.double().transpose(0, 1).flatten(1).numpy()  # (d, B * h * w)


def test_moments_equal_those_of_numpy_and_scipy(z: Tensor) -> None:
    result, rows = report(z), rows_of(z)
    assert result["images"] == 24
    assert result["mean"] == pytest.approx(rows.mean(axis=1), rel=1e-12)
    assert result["std"] == pytest.approx(rows.std(axis=1, ddof=1), rel=1e-10)
    assert result["sample_std"] == result["std"]
    assert result["minimum"] == rows.min(axis=1).tolist()
    assert result["maximum"] == rows.max(axis=1).tolist()
    assert result["kurtosis"] == pytest.approx(scipy.stats.kurtosis(rows, axis=1), rel=1e-8)
    np.testing.assert_allclose(result["correlation"], np.corrcoef(rows), atol=1e-10)
    largest = result["largest_correlation"]
    assert largest is not None and largest["channels"] == [0, 3]
    assert largest["value"] == pytest.approx(np.corrcoef(rows)[0, 3], rel=1e-9)
    for field in ("kl_nats", "kl_bits", "active_units", "active"):
        assert result[field] is None


def test_scale_is_that_of_the_latents_together(z: Tensor) -> None:
    scale, joined = report(z)["scale"], z.double()
    assert scale["measured_scaling_factor"] == pytest.approx(1 / joined.std().item(), rel=1e-10)
    assert scale["measured_shift_factor"] == pytest.approx(joined.mean().item(), rel=1e-12)
    shifted = (joined - 7) * 0.1
    scale = report(z, scaling_factor=0.1, shift_factor=7.0)["scale"]
    assert scale["scaled_mean"] == pytest.approx(shifted.mean().item(), rel=1e-10)
    assert scale["scaled_std"] == pytest.approx(shifted.std().item(), rel=1e-10)
    assert (scale["config_scaling_factor"], scale["config_shift_factor"]) == (0.1, 7.0)


def test_scale_per_channel_is_that_of_the_normalised_latents(z: Tensor) -> None:
    mean, std = [900.0, 1, -40, 3], [2.0, 3, 4, 0.5]
    scale = report(z, scaling_factor=0.5, latents_mean=mean, latents_std=std)["scale"]
    view = (1, 4, 1, 1)
    scaled = (z.double() - torch.tensor(mean).view(view)) * 0.5 / torch.tensor(std).view(view)
    assert scale["scaled_mean"] == pytest.approx(scaled.mean().item(), rel=1e-10)
    assert scale["scaled_std"] == pytest.approx(scaled.std().item(), rel=1e-10)
    with pytest.raises(ValueError, match=r"4 values \(got 4 and 1\)"):
        report(z, latents_mean=mean, latents_std=std[:1])


def test_kl_equals_that_of_diffusers() -> None:
    parameters = normal(6, 4, 5, 3)
    posterior = DiagonalGaussianDistribution(parameters)
    result = report(posterior.mean, posterior.logvar)
    assert result["kl_nats"] is not None and result["kl_bits"] is not None
    assert sum(result["kl_nats"]) * 15 == pytest.approx(posterior.kl().mean().item(), rel=1e-5)
    assert result["kl_bits"] == pytest.approx([kl / math.log(2) for kl in result["kl_nats"]])


def test_kl_of_the_prior_is_0_and_has_a_closed_form() -> None:
    mean, logvar = torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3, 3)
    mean[:, 1], logvar[:, 1] = 2.0, math.log(9.0)
    expected = [0.0, 0.5 * (4 + 9 - 1 - math.log(9))]
    assert report(mean, logvar)["kl_nats"] == pytest.approx(expected, rel=1e-6)


def test_sample_std_is_that_of_posterior_samples() -> None:
    mean, logvar = normal(200, 2, 16, 16), torch.full((200, 2, 16, 16), math.log(4.0))
    logvar[:, 1] = math.log(0.25)
    samples = mean + (logvar / 2).exp() * normal(200, 2, 16, 16, seed=1)
    result = report(mean, logvar)
    assert result["sample_std"] == pytest.approx(rows_of(samples).std(axis=1), rel=0.01)
    measured = result["scale"]["measured_scaling_factor"]
    assert measured == pytest.approx(1 / samples.std().item(), rel=0.01)
    assert result["std"] == pytest.approx(rows_of(mean).std(axis=1, ddof=1), rel=1e-9)


def test_batches_of_any_size_give_one_answer(z: Tensor) -> None:
    logvar = normal(*z.shape, seed=1)
    config = {"scaling_factor": 0.5, "shift_factor": 1.0}
    whole, parts = (collect(z, logvar, batch=batch).result(**config) for batch in (len(z), 1))
    for field in ("mean", "std", "sample_std", "kurtosis", "kl_nats", "active_units"):
        assert parts[field] == pytest.approx(whole[field], rel=1e-8)
    np.testing.assert_allclose(parts["correlation"], whole["correlation"], atol=1e-10)
    assert parts["scale"] == pytest.approx(whole["scale"], rel=1e-10)


def test_rules_hold_for_more_elements_than_an_integer_squared() -> None:
    """10^12 elements and one batch more: what was seen outweighs it."""
    health = collect(normal(64, 2, 8, 8))
    before = health.result(scaling_factor=1.0, shift_factor=None)
    state, many = health.state_dict(), 10**12 / 4096
    for name in ("third", "fourth", "scatter"):
        state[name] = state[name] * many
    state["count"] = np.asarray(10**12)
    health.load_state_dict(state)
    health.update(normal(1, 2, 8, 8, seed=1))
    after = health.result(scaling_factor=1.0, shift_factor=None)
    assert after["kurtosis"] == pytest.approx(before["kurtosis"], abs=1e-6)


@pytest.mark.parametrize("with_posterior", [False, True])
@pytest.mark.parametrize("seen", [0, 10])
def test_continues_exactly(z: Tensor, with_posterior: bool, seen: int, tmp_path: Path) -> None:
    logvar = normal(*z.shape, seed=1) if with_posterior else None
    head = None if logvar is None else logvar[:seen]
    np.savez(tmp_path / "state.npz", **collect(z[:seen], head).state_dict())
    resumed = LatentHealth(num_channels=4)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        resumed.load_state_dict(dict(state))
    for i in range(seen, 24, 5):
        part = slice(i, i + 5)
        resumed.update(z[part], logvar=None if logvar is None else logvar[part])
    config = {"scaling_factor": 0.5, "shift_factor": 1.0}
    assert resumed.result(**config) == collect(z, logvar).result(**config)


def test_good_latents_give_no_warning() -> None:
    z = normal(64, 4, 8, 8) * torch.tensor([2.0, 3, 4, 2.5]).view(4, 1, 1) + 0.5
    factor = 1 / z.std().item()
    assert report(z, scaling_factor=factor)["warnings"] == []
    assert report(z, scaling_factor=None)["warnings"] == []
    assert report(z, scaling_factor=factor * 1.15, shift_factor=0.0)["warnings"] == []
    posterior = report(z, torch.full_like(z, -12.0), scaling_factor=factor)
    assert posterior["warnings"] == [] and posterior["active_units"] == 4
    mean, std = z.mean(dim=(0, 2, 3)).tolist(), z.std(dim=(0, 2, 3)).tolist()
    assert report(z, latents_mean=mean, latents_std=std)["warnings"] == []


def test_a_wrong_scale_or_shift_is_said() -> None:
    z = normal(64, 4, 8, 8)
    z = (z - z.mean()) / z.std() * 5
    (warning,) = report(z, scaling_factor=1.0)["warnings"]
    assert "standard deviation of 5" in warning and "0.2 would give a" in warning
    (warning,) = report(z, scaling_factor=0.2, shift_factor=2.5)["warnings"]
    assert "-0.50 standard deviations from 0" in warning
    (warning,) = report(z + 2.5, scaling_factor=0.2)["warnings"]
    assert (
        "+0.50 standard deviations from 0" in warning
        and "the mean is 2.5, but the config's shift_factor is 0" in warning
    )
    assert len(report(z + 2.5, scaling_factor=0.02)["warnings"]) == 2  # both, each on its own
    wide = {"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}
    (warning,) = report(z, scaling_factor=1.0, **wide)["warnings"]
    assert "standard deviation of 2.5" in warning and "0.4 would give a" in warning


def test_a_dead_channel_is_named() -> None:
    z = normal(64, 4, 8, 8)
    z[:, 2] *= 1e-4
    result = report(z)
    assert result["dead_channels"] == [2]
    assert report(z[:, 1:3])["dead_channels"] == [1]
    (warning,) = [w for w in result["warnings"] if "Dead" in w]
    assert "2 of 4" in warning
    z[:, 2] = 0.1
    result = report(z)
    assert result["dead_channels"] == [2] and result["kurtosis"][2] is None
    assert result["correlation"][2] == [0.0] * 4 == [row[2] for row in result["correlation"]]
    two = report(z[:, 1:3])
    assert two["dead_channels"] == [1] and two["largest_correlation"] is None


def test_a_channel_drowned_by_its_posterior_is_dead() -> None:
    """What a KL term does to a channel: N(0, 1) for every image, its mean a faint copy of one."""
    z, logvar = normal(64, 3, 8, 8), torch.full((64, 3, 8, 8), -6.0)
    z[:, 1], logvar[:, 1] = 0.05 * z[:, 0], 0.0
    result = report(z, logvar)
    assert result["dead_channels"] == [1]
    assert result["active"] == [True, False, True] and result["active_units"] == 2
    assert result["sample_std"] == pytest.approx([1, 1, 1], abs=0.05)
    assert len(result["warnings"]) == 1  # neither of its narrow mean nor of its correlation


def test_unequal_and_doubled_channels_are_said() -> None:
    z = normal(64, 3, 8, 8)
    z[:, 2] = -z[:, 0] + 0.1 * z[:, 2]
    result = report(z)
    assert result["warnings"] == ["Channels 0 and 2 are correlated by -1.00."]
    z = normal(64, 3, 8, 8) * torch.tensor([1.0, 0.2, 0.6]).view(3, 1, 1)
    (warning,) = report(z, scaling_factor=1 / z.std().item())["warnings"]
    assert "deviation of channel 0 " in warning and "channel 1" in warning


def test_constant_latents_give_plain_numbers() -> None:
    for logvar in (None, torch.full((2, 3, 4, 4), -30.0)):
        result = report(torch.full((2, 3, 4, 4), 0.1), logvar, scaling_factor=0.5)
        assert result["dead_channels"] == [0, 1, 2]
        json.dumps(result, allow_nan=False)
    assert "constant" in report(torch.zeros(2, 3, 4, 4))["warnings"][0]


def test_a_report_is_json_without_nan(z: Tensor) -> None:
    result = report(z, normal(*z.shape, seed=1), scaling_factor=0.5, shift_factor=0.0)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_wrong_latents_are_refused(z: Tensor) -> None:
    with pytest.raises(ValueError, match="infinite or NaN"):
        collect(torch.full((1, 2, 2, 2), math.nan))
    with pytest.raises(ValueError, match=r"\(B, 3, h, w\)"):
        LatentHealth(num_channels=3).update(z)
    with pytest.raises(ValueError, match="with none"):
        collect(z).update(z, logvar=z)
    with pytest.raises(ValueError, match="the same shape"):
        LatentHealth(num_channels=4).update(z, logvar=z[:5])
    with pytest.raises(ValueError, match="at least 2"):
        LatentHealth(num_channels=4).result(scaling_factor=1.0, shift_factor=None)
