"""Distances between sets against other implementations and closed forms; FID's network."""

import hashlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import mmd2
from torchmetrics.image.kid import poly_kernel, poly_mmd

from latentvae.errors import UserError
from latentvae.metrics import inception
from latentvae.metrics.distribution import (
    FrechetDistance,
    KernelDistance,
    trunk_features,
)
from latentvae.metrics.inception import load_inception


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pairs(n: int, dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features far from zero, and reconstructions that differ a little."""
    real = normal(n, dim, seed=seed) @ normal(dim, dim, seed=seed + 1) + 20
    return real, real * 0.9 + normal(n, dim, seed=seed + 2) + 1


def collect(distance, real: Tensor, recon: Tensor, *, batch: int = 16):
    for x, y in zip(real.split(batch), recon.split(batch), strict=True):
        distance.update(x, y)
    return distance


def resume(distance, fresh, folder: Path):
    np.savez(folder / "state.npz", **distance.state_dict())
    with np.load(folder / "state.npz", allow_pickle=False) as state:
        fresh.load_state_dict(dict(state))
    return fresh


def test_frechet_equals_torch_fidelity_and_the_matrix_root() -> None:
    real, recon = pairs(100, 12)
    ours = collect(FrechetDistance(12), real, recon).result()
    statistics = [fid_features_to_statistics(x) for x in (real, recon)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-8)

    s1, s2 = (np.cov(x.numpy(), rowvar=False) for x in (real, recon))
    shift = (real.mean(0) - recon.mean(0)).square().sum().item()
    root = scipy.linalg.sqrtm(s1 @ s2)
    assert ours == pytest.approx(shift + np.trace(s1 + s2 - 2 * root).real, rel=1e-8)


def test_frechet_of_diagonal_gaussians_has_a_closed_form() -> None:
    """|m1 - m2|^2 + sum (sigma1 - sigma2)^2, exact on whitened rows."""
    rows = normal(64, 5)
    rows = torch.linalg.qr(rows - rows.mean(0)).Q * 63**0.5  # covariance I, mean 0
    sigmas = torch.tensor([[1, 2, 3, 0.1, 0], [2, 2, 1, 0, 0.5]], dtype=torch.float64)
    sigma1, sigma2 = sigmas
    distance = collect(FrechetDistance(5), rows * sigma1 + 3, rows.flip(0) * sigma2 + 1)
    expected = 5 * 2**2 + (sigma1 - sigma2).square().sum().item()
    assert distance.result() == pytest.approx(expected, rel=1e-10)


def test_frechet_of_few_images_is_sound() -> None:
    """Covariances of rank 7 in 64 dimensions; turned copies of each other in a subspace."""
    rows = normal(8, 64)
    moved = collect(FrechetDistance(64), rows, rows + 0.5)
    assert moved.result() == pytest.approx(64 * 0.25, rel=1e-10)
    zeros = torch.zeros(8, 32, dtype=torch.float64)
    left, right = rows[:, :32], rows[:, 32:]  # orthogonal supports: the root's trace is 0
    apart = collect(FrechetDistance(64), torch.cat([left, zeros], 1), torch.cat([zeros, right], 1))
    spread = left.var(0).sum() + right.var(0).sum()
    shift = left.mean(0).square().sum() + right.mean(0).square().sum()
    assert apart.result() == pytest.approx((spread + shift).item(), rel=1e-9)


def test_frechet_from_points_to_a_cloud() -> None:
    """Equal reconstructions have no covariance: |m1 - m2|^2 + Tr(S1) is left."""
    rows, point = normal(8, 4), torch.full((8, 4), 2.0, dtype=torch.float64)
    expected = (rows.mean(0) - 2).square().sum() + rows.var(0).sum()
    distance = collect(FrechetDistance(4), rows, point).result()
    assert distance == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("distance", [FrechetDistance(12), KernelDistance()])
def test_a_perfect_copy_is_at_0(distance) -> None:
    real, _ = pairs(30, 12)
    assert collect(distance, real, real.clone()).result() == 0.0
    assert distance.num_images == 30


def naive_mmd(x: Tensor, y: Tensor) -> float:
    def k(a: Tensor, b: Tensor) -> float:
        return ((a @ b).item() / len(a) + 1) ** 3

    n = len(x)
    total = sum(
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
        for i in range(n)
        for j in range(n)
        if i != j
    )
    return total / (n * (n - 1))


def test_kernel_equals_the_definition_and_other_implementations() -> None:
    x, y = (z.float().double() for z in pairs(20, 6))
    ours = collect(KernelDistance(), x, y, batch=7).result()
    assert ours == pytest.approx(naive_mmd(x, y), rel=1e-9)

    kernels = [poly_kernel(a, b) for a, b in ((x, x), (x, y), (y, y))]
    theirs = mmd2(*(k.numpy() for k in kernels), mmd_est="u-statistic")
    assert ours == pytest.approx(theirs, rel=1e-9)
    # KID is the same but for the pairs' own kernels.
    cross, n = kernels[1], 20
    dropped = 2 * cross.sum() / n**2 - 2 * (cross.sum() - cross.trace()) / (n * (n - 1))
    assert ours == pytest.approx((poly_mmd(x, y) + dropped).item(), rel=1e-9)


def test_kernel_is_unbiased_for_pairs_where_kid_is_not() -> None:
    """x and y have one distribution and are almost the same images: MMD is 0."""
    ours, kid = [], []
    for seed in range(300):
        common, noise = normal(10, 4, seed=seed), normal(20, 4, seed=1000 + seed)
        x, y = common + 0.1 * noise[:10], common + 0.1 * noise[10:]
        ours.append(collect(KernelDistance(), x, y).result())
        kid.append(poly_mmd(x, y).item())
    error = np.std(ours) / len(ours) ** 0.5
    assert abs(np.mean(ours)) < 4 * error
    assert np.mean(kid) < -100 * error


def test_kernel_keeps_the_first_images_only() -> None:
    x, y = pairs(30, 6)
    bounded = collect(KernelDistance(max_images=10), x, y, batch=4)
    assert bounded.num_images == 10
    assert bounded.result() == collect(KernelDistance(), x[:10], y[:10]).result()


@pytest.mark.parametrize("build", [lambda: FrechetDistance(8), lambda: KernelDistance()])
@pytest.mark.parametrize("seen", [0, 32])
def test_continues_exactly(build, seen: int, tmp_path: Path) -> None:
    x, y = pairs(64, 8)
    started = collect(build(), x[:seen], y[:seen]) if seen else build()
    resumed = resume(started, build(), tmp_path)
    assert collect(resumed, x[seen:], y[seen:]).result() == collect(build(), x, y).result()


@pytest.mark.parametrize("distance", [FrechetDistance(4), KernelDistance()])
def test_wrong_features_are_refused(distance) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        collect(distance, torch.ones(1, 4), torch.zeros(1, 4)).result()
    with pytest.raises(ValueError, match="pairs"):
        distance.update(torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"\(B, 4\) .*\(got \(2, 5\)\)"):
        distance.update(torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(ValueError, match="infinite or NaN"):
        distance.update(torch.full((2, 4), torch.inf), torch.ones(2, 4))


def test_trunk_features_are_the_mean_over_space_of_the_last_level() -> None:
    last = torch.arange(24, dtype=torch.float16).view(1, 4, 2, 3)
    features = trunk_features([torch.full((1, 2, 9, 9), torch.nan), last])
    assert features.dtype == torch.float32
    assert features.tolist() == [[2.5, 8.5, 14.5, 20.5]]


def test_inception_needs_a_path_or_leave_to_download(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"path .* or allow the download from https"):
        load_inception()
    (tmp_path / "inception.pth").touch()
    with pytest.raises(UserError, match=r"did you mean 'inception.pth'"):
        load_inception(tmp_path / "inceptoin.pth")


def test_inception_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install latentvae\[fid\]"):
        load_inception()


class Evil:
    """A file's content that runs something when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_inception_takes_its_own_file_only_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "was-run"
    torch.save(Evil(trace), path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"begins with {found[:8]}, .* begins with 6726825d"):
        load_inception(path)
    monkeypatch.setattr(inception, "SHA256", found)  # as if it had the true digest
    with pytest.raises(pickle.UnpicklingError):
        load_inception(path)
    assert not trace.exists()


def test_a_failed_download_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str, target: str, *, hash_prefix: str) -> None:
        raise OSError(f"no route to {url} for {hash_prefix[:8]}")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"Could not download .* for 6726825d"):
        load_inception(allow_download=True)


@pytest.mark.slow
def test_features_are_those_of_torch_fidelity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On weights that stand in for the true ones; no test can fetch those."""
    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
        lambda *_args, **_options: {},
    )
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_args: None)
    torch.manual_seed(0)
    expected = FeatureExtractorInceptionV3("random", ["2048"])
    monkeypatch.undo()
    path = tmp_path / "weights.pth"
    torch.save(expected.state_dict(), path)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())

    pixels = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8)
    images = pixels.float() / 127.5 - 1
    ours = load_inception(path).train()
    with torch.no_grad():
        (theirs,) = expected(pixels)
    assert torch.equal(ours.features(images), theirs)
    beyond = torch.where(pixels == 255, 3.0, images + 0.3 / 127.5)  # clamps, and rounds
    assert torch.equal(ours.features(beyond), theirs)
    assert not any(value.requires_grad for value in ours.parameters())
    assert theirs.shape == (2, 2048) and theirs.std() > 0
