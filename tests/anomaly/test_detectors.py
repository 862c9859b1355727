"""The scikit-learn interface of all detectors, their scores against oracles, and saving."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks

from latentvae.anomaly import (
    DAGMM,
    Detector,
    LatentDensity,
    VAEDetector,
    load_detector,
    save_detector,
)
from latentvae.anomaly.detector import clean_threshold
from latentvae.anomaly.vae import SCORES
from latentvae.errors import UserError

QUICK: list[Detector] = [
    DAGMM(hidden=(8,), num_components=2, epochs=3),
    VAEDetector(hidden=(8,), latent_dim=2, epochs=3, num_samples=8),
    LatentDensity(),
    LatentDensity(density="knn"),
]
NAMES = ["dagmm", "vae", "gmm", "knn"]
each = pytest.mark.parametrize("detector", QUICK, ids=NAMES)


def line(num_rows: int, seed: int = 0) -> np.ndarray:
    """Rows close to a line in four dimensions."""
    rng = np.random.default_rng(seed)
    place = rng.normal(size=(num_rows, 1))
    return place * [1.0, -2.0, 0.5, 3.0] + 0.1 * rng.normal(size=(num_rows, 4))


@parametrize_with_checks(QUICK)
def test_scikit_learns_checks_pass(estimator, check) -> None:
    check(estimator)


@each
def test_same_seed_same_scores_and_no_global_randomness(detector: Detector) -> None:
    rows = line(60)
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(3), np.random.rand(3)

    torch.manual_seed(3)
    np.random.seed(3)
    first = clone(detector).fit(rows).score_samples(rows)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()
    assert (clone(detector).fit(rows).score_samples(rows) == first).all()


@pytest.mark.parametrize("detector", QUICK[:2], ids=NAMES[:2])
def test_another_seed_gives_other_scores(detector: Detector) -> None:
    rows = line(60)
    first, second = (clone(detector).set_params(random_state=seed).fit(rows) for seed in (0, 1))
    assert (first.score_samples(rows) != second.score_samples(rows)).all()


@each
def test_rows_off_the_line_score_lower(detector: Detector) -> None:
    wrong = line(200, seed=1)[:, [1, 0, 2, 3]]
    options = {"epochs": 150, "learning_rate": 1e-2, "scaling": "standard"}
    options = options if hasattr(detector, "epochs") else {}
    fitted = clone(detector).set_params(**options).fit(line(400))
    scores = -fitted.score_samples(np.concatenate([line(200, seed=2), wrong]))
    assert roc_auc_score(np.repeat([0, 1], 200), scores) > 0.9


@each
def test_saved_detectors_give_the_same_scores(detector: Detector, tmp_path: Path) -> None:
    table = pd.DataFrame(line(60), columns=list("abcd"))
    fitted = clone(detector).fit(table)
    save_detector(fitted, tmp_path)
    loaded = load_detector(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert (loaded.decision_function(table) == fitted.decision_function(table)).all()
    assert (loaded.predict(table) == fitted.predict(table)).all()
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in fitted.get_params().items()}
    assert loaded.get_params() == given
    with pytest.raises(ValueError, match="feature names"):
        loaded.score_samples(table.rename(columns={"a": "z"}))


def test_damaged_saves_are_one_sentence(tmp_path: Path) -> None:
    save_detector(clone(QUICK[0]).fit(line(30)), tmp_path)
    content = json.loads((tmp_path / "detector.json").read_text())
    (tmp_path / "detector.json").write_text(json.dumps(content | {"class": "DAGM"}))
    with pytest.raises(UserError, match="did you mean 'DAGMM'"):
        load_detector(tmp_path)
    (tmp_path / "detector.json").write_text(json.dumps(content))
    (tmp_path / "detector.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read"):
        load_detector(tmp_path)


@each
def test_held_out_rows_keep_the_false_alarm_rate(detector: Detector) -> None:
    fitted = clone(detector).fit(line(300)).calibrate(line(999, seed=4), false_alarm_rate=0.05)
    alarms = fitted.predict(line(4000, seed=5)) == -1
    assert 0.02 < alarms.mean() < 0.08


def test_the_threshold_is_the_conformal_quantile() -> None:
    """With 99 scores and a rate of 1 %, no clean score lies below: rank 1 of 100."""
    scores = np.random.default_rng(0).permutation(99).astype(float)
    assert -1e-8 < clean_threshold(scores, 0.01) < 0
    assert clean_threshold(scores, 0.05) == pytest.approx(4)
    assert clean_threshold(scores[:5], 0.01) == pytest.approx(scores[:5].min())
    rng, alarms = np.random.default_rng(1), []
    for _ in range(1500):
        drawn = rng.normal(size=60)
        alarms.append(norm.cdf(clean_threshold(drawn, 0.1)))  # chance of a new row below
    assert 0.09 < np.mean(alarms) <= 0.1


def test_too_few_rows_for_the_rate_warn() -> None:
    with pytest.warns(UserWarning, match="at least 99 held-out rows"):
        LatentDensity().fit(line(50)).calibrate(line(20, seed=1))


def test_gmm_and_knn_are_scikit_learns() -> None:
    rows, new = line(80), line(20, seed=1)
    scaled, other = ((r - rows.mean(axis=0)) / rows.std(axis=0) for r in (rows, new))
    mixture = GaussianMixture(2, reg_covar=1e-3, random_state=0).fit(scaled)
    ours = LatentDensity().fit(rows).score_samples(new)
    np.testing.assert_allclose(ours, mixture.score_samples(other), rtol=1e-8)
    distance = NearestNeighbors(n_neighbors=5).fit(scaled).kneighbors(other)[0].mean(axis=1)
    ours = LatentDensity(density="knn").fit(rows).score_samples(new)
    np.testing.assert_allclose(ours, -distance, rtol=1e-10)


def test_dagmms_mixture_is_that_of_all_training_rows() -> None:
    rows = line(60)
    fitted = clone(QUICK[0]).fit(rows)
    z = fitted.latents(rows)
    with torch.no_grad():
        share = fitted.networks_[0](torch.from_numpy(fitted._scaled(rows))).assignments.numpy()
    mean = (share[:, :1] * z).sum(axis=0) / share[:, 0].sum()
    np.testing.assert_allclose(fitted.mixtures_[0].means[0], mean, rtol=1e-10)
    energy = fitted.mixtures_[0].energy(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(-fitted.score_samples(rows), energy, rtol=1e-12)


def test_several_networks_score_by_the_mean_of_their_energies(tmp_path: Path) -> None:
    rows = line(60)
    fitted = clone(QUICK[0]).set_params(num_networks=3).fit(rows)
    first = clone(QUICK[0]).fit(rows)
    torch.testing.assert_close(fitted.networks_[0].state_dict(), first.networks_[0].state_dict())
    z = np.split(fitted.latents(rows), 3, axis=1)
    assert not np.allclose(z[0], z[1])  # other random weights
    energies = [
        mixture.energy(torch.from_numpy(own)).numpy()
        for mixture, own in zip(fitted.mixtures_, z, strict=True)
    ]
    np.testing.assert_allclose(-fitted.score_samples(rows), np.mean(energies, axis=0), rtol=1e-12)
    save_detector(fitted, tmp_path)
    again = load_detector(tmp_path).score_samples(rows)
    np.testing.assert_array_equal(again, fitted.score_samples(rows))


def test_vae_scores_have_the_known_order() -> None:
    """ELBO <= importance-weighted bound, and ELBO <= reconstruction probability."""
    rows = line(60)
    fitted = clone(QUICK[1]).fit(rows)
    scores = {kind: fitted.set_params(criterion=kind).score_samples(rows) for kind in SCORES}
    assert (scores["elbo"] < scores["reconstruction_probability"]).all()
    # in the mean, because the KL of the ELBO is exact and that of the bound is sampled
    assert scores["elbo"].mean() < scores["importance"].mean()


def test_vaes_importance_score_is_the_density_of_a_linear_model() -> None:
    """With a linear decoder p(x) is a Gaussian, and the posterior is known."""
    fitted = VAEDetector(hidden=(), latent_dim=1, epochs=1, scaling="none", num_samples=4096)
    fitted.set_params(criterion="importance").fit(line(20)[:, :2])
    network, load = fitted.network_, torch.tensor([[0.8], [-0.5]]).double()
    noise_variance = 0.25
    with torch.no_grad():
        network.decoder[0].weight.copy_(load)
        network.decoder[0].bias.zero_()
        network.log_std.fill_(0.5 * np.log(noise_variance))
        # posterior of a linear Gaussian model, and a log std that does not depend on x
        precision = 1 + (load.T @ load / noise_variance).item()
        network.encoder[0].weight.zero_()
        network.encoder[0].weight[0] = load[:, 0] / noise_variance / precision
        network.encoder[0].bias.zero_()
        network.encoder[0].bias[1] = -0.5 * np.log(precision)
    rows = line(10, seed=3)[:, :2]
    covariance = (load @ load.T).numpy() + noise_variance * np.eye(2)
    from scipy.stats import multivariate_normal

    expected = multivariate_normal(np.zeros(2), covariance).logpdf(rows)
    np.testing.assert_allclose(fitted.score_samples(rows), expected, rtol=1e-8)


@each
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.c_[line(30), np.ones(30)], "column 4 has the same value in all 30"),
        (np.where(line(30) > 5, np.nan, np.r_[[[np.nan] * 4], line(29)]), "NaN"),
        ([["a", "b"]] * 30, "hold the text 'a'"),
        (line(1), "1 sample"),
    ],
)
def test_wrong_rows_are_one_sentence(detector: Detector, rows, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        clone(detector).fit(rows)


@pytest.mark.parametrize(
    ("detector", "said"),
    [
        (DAGMM(num_components=16), "num_components=16: give at least 32 rows"),
        (LatentDensity(num_components=16), "num_components=16: give at least 32 rows"),
        (LatentDensity(density="knn", num_neighbours=31), "num_neighbours=31"),
        (LatentDensity(density="kde"), "density must be one of gmm, knn"),
        (VAEDetector(criterion="score"), "reconstruction_probability, elbo, importance"),
        (VAEDetector(scaling="max"), "standard, minmax, none"),
        (DAGMM(epochs=0), "epochs must be at least 1"),
        (VAEDetector(epochs=1.5), r"whole number of at least 1 \(got 1\.5\)"),  # type: ignore[arg-type]
        (VAEDetector(epochs=True), r"whole number of at least 1 \(got True\)"),
        (DAGMM(learning_rate=0), "learning_rate must be more than 0"),
        (DAGMM(false_alarm_rate=0.7), "at most 0.5"),
        (DAGMM(epochs=5, learning_rate=1e30, scaling="none"), "smaller learning_rate"),
    ],
)
def test_wrong_options_are_one_sentence(detector: Detector, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        detector.fit(line(30))


def test_a_kept_constant_column_counts_when_it_changes() -> None:
    rows = np.c_[line(60), np.full(60, 7.0)]
    fitted = LatentDensity(constant_columns="keep").fit(rows)
    changed = rows.copy()
    changed[:, 4] = 8
    assert fitted.score_samples(changed).max() < fitted.score_samples(rows).min()
