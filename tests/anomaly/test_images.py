"""Scores and heat maps of images, with a small autoencoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import multivariate_normal

import latentvae
from latentvae.anomaly import image_runs
from latentvae.anomaly.image_methods import PooledDensity, Positions, neighbourhoods, pooled
from latentvae.anomaly.image_runs import fit_images, score_images
from latentvae.anomaly.image_sheet import heat_picture, quantile
from latentvae.cli.main import main
from latentvae.errors import UserError
from latentvae.models.likelihood_models import ImagesOfModel
from tests import tiny

SIDE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    tiny.tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clean images of a dark disc, and test images of which some have a bright corner."""
    folder, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    for name, count in (("clean", 40), ("test/good", 6), ("test/scratch", 6)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(90, 110, (SIDE, SIDE, 3)).astype(np.uint8)
            if name.endswith("scratch"):
                pixels[:8, :8] = 255
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_deep_images_are_read_in_the_models_range(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.full((SIDE, SIDE), 3000, np.uint16)).save(tmp_path / "a.tif")
    about = ImagesOfModel(value_range=(0.0, 4000.0))
    monkeypatch.setattr(image_runs, "images_of", lambda model: about)
    pictures = image_runs.Pictures(tmp_path, latentvae.load(model), SIDE)
    ((_, images),) = pictures.batches([0])
    assert images.mean().item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("method", ["positions", "latent_density", "reconstruction"])
def test_bright_corners_are_found_and_shown(
    method: str, model: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", method, "--resolution", str(SIDE), "--false_alarm_rate", "0.1"]
    command = ["anomaly", "fit", "--data", str(parts / "clean"), "--model", str(model)]
    main([*command, *options, "--out", str(tmp_path / "d")])
    said = capsys.readouterr()
    if method == "reconstruction":  # it learns nothing
        assert "from 0 rows or images, 40 held out" in said.out and "warning" not in said.err
    else:
        assert "learned from 32 rows or images, 8 held out" in said.out
        assert "warning: 8 clean rows are too few" in said.err
    command = ["anomaly", "score", str(tmp_path / "d"), "--data", str(parts / "test")]
    out, report = tmp_path / "out", tmp_path / "r.json"
    options = ["--labels", "good", "--json", str(report), "--heat_maps", "--num_pictures", "3"]
    main([*command, "--out", str(out), *options])

    summary = json.loads(report.read_text())
    assert summary["items"] == 12 and summary["auroc"] == 1
    assert set(summary) == {"items", "threshold", "flagged", "auroc", "average_precision", "f1"}
    assert len((out / "scores.csv").read_text().splitlines()) == 13
    assert Image.open(out / "most_anomalous.png").size[0] == 3 * 256 + 16
    heat = np.asarray(Image.open(out / "heat_maps" / "scratch" / "0.png.png").convert("L"))
    assert heat.shape == (SIDE, SIDE)
    assert heat[:8, :8].mean() > heat[16:, 16:].mean() + 20


def test_heat_maps_of_all_batches_share_a_scale(
    model: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": str(model), "method": "reconstruction", "resolution": SIDE}
    fit_images(parts / "clean", tmp_path / "d", false_alarm_rate=0.1, **options)
    pictures = []
    for batch in (16, 5):  # of 5, the first batch has no scratch
        monkeypatch.setattr(image_runs, "BATCH", batch)
        out = tmp_path / str(batch)
        score_images(tmp_path / "d", parts / "test", out, num_pictures=2, heat_maps=True)
        files = sorted((out / "heat_maps").rglob("*.png"))
        pictures.append(np.stack([np.asarray(Image.open(file)) for file in files]).astype(int))
    assert len(pictures[0]) == 12 and np.abs(pictures[0] - pictures[1]).max() <= 2


def test_positions_are_mahalanobis_distances() -> None:
    latents = torch.randn(50, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    fitted = Positions(floor=0.05).fit(latents)
    vectors = neighbourhoods(latents)[:, :, 1, 2].double().numpy()
    covariance = np.cov(vectors, rowvar=False, bias=True)
    all_vectors = neighbourhoods(latents).double()
    variance = all_vectors.var(dim=0, correction=0).mean().item()
    covariance += 0.05 * variance * np.eye(18)
    expected = multivariate_normal(vectors.mean(axis=0), covariance)
    factor = fitted.factors[1, 2]
    np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-6, atol=1e-9)
    offset = torch.from_numpy(vectors).T - fitted.means[:, 1, 2, None]
    white = torch.linalg.solve_triangular(factor, offset, upper=False)
    distance = white.square().sum(dim=0)
    log_density = -0.5 * (distance + 18 * np.log(2 * np.pi)) - factor.diagonal().log().sum()
    np.testing.assert_allclose(log_density, expected.logpdf(vectors), rtol=1e-6)


def test_neighbourhoods_hold_the_latent_in_the_middle() -> None:
    latents = torch.arange(2 * 3 * 16.0).view(2, 3, 4, 4)
    around = neighbourhoods(latents).unflatten(1, (3, 9))
    assert torch.equal(around[:, :, 4], latents)
    assert torch.equal(around[:, :, 5, :, :-1], latents[..., 1:])  # the right neighbour


def test_pooled_latents_are_mean_and_spread() -> None:
    latents = torch.randn(2, 3, 4, 4)
    expected = np.concatenate([latents.numpy().mean((2, 3)), latents.numpy().std((2, 3))], axis=1)
    np.testing.assert_allclose(pooled(latents), expected, rtol=1e-5)


@pytest.mark.parametrize("density", ["gmm", "knn"])
def test_saved_methods_give_the_same_scores(density: str, model: Path) -> None:
    network = latentvae.load(model)
    images = tiny.photos(2, SIDE)
    fitted = PooledDensity(density).fit(torch.randn(20, network.latent_channels, 4, 4))
    again = PooledDensity(density).restore(fitted.tensors())
    for first, second in zip(
        fitted.score(network, images), again.score(network, images), strict=True
    ):
        assert torch.equal(first, second)
    assert fitted.score(network, images).maps.shape == (2, SIDE, SIDE)


def test_heat_pictures_share_a_scale() -> None:
    heat = torch.tensor([[0.0, 1.0, 2.0]])
    levels = np.asarray(heat_picture(heat, low=0, high=2).convert("L")).astype(int)[0]
    assert levels[0] < levels[1] < levels[2]
    flat = np.asarray(heat_picture(torch.ones(1, 2), low=1, high=1))
    assert (flat == np.asarray(heat_picture(torch.zeros(1, 2), low=0, high=2))).all()
    assert quantile(torch.arange(100.0), 0.5).item() == 50


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": 31}, "multiple of"),
        ({"method": "vae"}, "method must be one of"),
        ({"false_alarm_rate": 0.0}, "false_alarm_rate must be more than 0"),
    ],
)
def test_wrong_options_are_one_sentence(
    options: dict, said: str, model: Path, parts: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        fit_images(parts / "clean", tmp_path / "d", model=str(model), **options)
    assert not (tmp_path / "d").exists()


def test_labels_and_weights_are_checked(model: Path, parts: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="too few"):
        fit_images(parts / "clean", tmp_path / "d", model=str(model), resolution=SIDE)
    with pytest.raises(UserError, match="no folder 'goood'"):
        score_images(tmp_path / "d", parts / "test", tmp_path, normal_folder="goood")
    with pytest.raises(UserError, match="one class only, 0"):
        score_images(tmp_path / "d", _only_good(parts, tmp_path), tmp_path, normal_folder="good")
    run = json.loads((tmp_path / "d" / "anomaly.json").read_text())
    (tmp_path / "d" / "anomaly.json").write_text(json.dumps(run | {"weights_sha256": "0"}))
    with pytest.raises(UserError, match="Run the fit again"):
        score_images(tmp_path / "d", parts / "test", tmp_path)


def _only_good(parts: Path, folder: Path) -> Path:
    (folder / "only").mkdir()
    (folder / "only" / "good").symlink_to(parts / "test" / "good")
    return folder / "only"
