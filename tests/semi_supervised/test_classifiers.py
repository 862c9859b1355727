"""The classifiers as a user of scikit-learn meets them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from latentvae.errors import UserError
from latentvae.semi_supervised import (
    M1Classifier,
    M1M2Classifier,
    M2Classifier,
    load_classifier,
    save_classifier,
)

SMALL: dict[str, Any] = {
    "latent_units": 2,
    "hidden_units": 16,
    "batch_size": 50,
    "learning_rate": 1e-2,
}


def maker(kind: Any, **small: Any) -> Callable[..., Any]:
    """Return a function that makes a small classifier, with some other options."""
    return lambda **more: kind(**SMALL | small | more)


MAKERS = {
    "m1": maker(M1Classifier, epochs=5, neighbours=1),
    "m2": maker(M2Classifier, epochs=5, warmup=20),
    "m1m2": maker(M1M2Classifier, epochs=5, warmup=20, vae_epochs=30, vae_units=4),
}
QUICK: dict[str, dict[str, Any]] = {
    "m1": {"epochs": 1},
    "m2": {"epochs": 1, "warmup": 2},
    "m1m2": {"epochs": 1, "warmup": 2, "vae_epochs": 1},
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))


def rows(kind: str = "bernoulli", *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows of two kinds (200, 12), all labels, and labels with 4 known per class."""
    rng = np.random.default_rng(seed)
    truth = np.repeat([3, 7], 100)
    shares = np.where(np.arange(12) < 6, 0.9, 0.1)
    chance = np.where(truth[:, None] == 3, shares, 1.0 - shares)
    x = (rng.random((200, 12)) < chance).astype(float)
    if kind == "gaussian":
        x = 50.0 + 9.0 * (x + 0.1 * rng.standard_normal(x.shape))
    known = np.full(200, -1)
    known[:4], known[100:104] = 3, 7
    return x, truth, known


@every
@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_learns_from_eight_labels(make: Callable[..., Any], kind: str) -> None:
    x, truth, known = rows(kind)
    model = make(likelihood=kind, random_state=0).fit(x, known)
    assert model.classes_.tolist() == [3, 7]
    assert model.score(x, truth) > 0.8
    chances = model.predict_proba(x)
    np.testing.assert_allclose(chances.sum(1), 1.0, rtol=1e-5)
    assert (model.classes_[chances.argmax(1)] == model.predict(x)).all()


@pytest.mark.parametrize("name", MAKERS)
def test_same_seed_gives_the_same_and_leaves_the_generator(name: str) -> None:
    x, _, known = rows()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = MAKERS[name](random_state=1, **QUICK[name])
    copy: Any = clone(model)
    first = copy.fit(x, known).predict_proba(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert np.array_equal(model.fit(x, known).predict_proba(x), first)
    assert not np.array_equal(
        model.set_params(random_state=2).fit(x, known).predict_proba(x), first
    )


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_saved_classifier_predicts_the_same(name: str, kind: str, tmp_path: Path) -> None:
    x, _, known = rows(kind)
    options = {"likelihood": kind, "random_state": 0, "classes": [3, 7]}
    model = MAKERS[name](**QUICK[name] | options).fit(x, known)
    save_classifier(model, tmp_path / "m")
    assert {p.suffix for p in (tmp_path / "m").rglob("*.*")} == {".json", ".safetensors"}
    loaded = load_classifier(tmp_path / "m")
    assert np.array_equal(loaded.predict_proba(x), model.predict_proba(x))
    assert loaded.get_params() == model.get_params()


def test_the_papers_sum_without_warmup_trains_too() -> None:
    x, truth, known = rows()
    assert (
        MAKERS["m2"](random_state=0, skip_below=0.0, warmup=0).fit(x, known).score(x, truth) > 0.9
    )


def test_rows_without_labels_are_used() -> None:
    """One label per class: what the other rows hold decides."""
    x, truth, _ = rows()
    known = np.full(200, -1)
    known[0], known[100] = 3, 7
    x[0, 3:9] = 0.5  # labelled rows that say little
    model = MAKERS["m2"](random_state=0, epochs=15).fit(x, known)
    assert model.score(x, truth) > 0.9


def test_all_rows_may_have_labels() -> None:
    x, truth, _ = rows()
    assert MAKERS["m2"](random_state=0).fit(x, truth).score(x, truth) > 0.9


def test_generated_rows_look_like_their_class() -> None:
    x, _, known = rows()
    model = MAKERS["m2"](random_state=0).fit(x, known)
    made = model.generate([3, 7, 3], random_state=0)
    assert made.shape == (3, 12) and 0 <= made.min() and made.max() <= 1
    assert (made[:, :6].mean(1) > made[:, 6:].mean(1)).tolist() == [True, False, True]
    with pytest.raises(UserError, match="label 4 is not one of"):
        model.generate([3, 4])


def test_grey_values_are_drawn_anew() -> None:
    x, truth, known = rows()
    assert MAKERS["m2"](random_state=0).fit(0.1 + 0.8 * x, known).score(0.1 + 0.8 * x, truth) > 0.9


def test_a_constant_column_is_no_fault() -> None:
    x, truth, known = rows("gaussian")
    x[:, 2] = 4.0
    model = MAKERS["m2"](likelihood="gaussian", random_state=0).fit(x, known)
    assert model.score(x, truth) > 0.9


def _with(x: np.ndarray, value: float) -> np.ndarray:
    changed = x.copy()
    changed[1, 1] = value
    return changed


@pytest.mark.parametrize("make", [M1Classifier, M1M2Classifier])
def test_equal_rows_give_nothing_to_learn_from(make: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="the same latent for all 4 rows"):
        make(random_state=0, epochs=1).fit(np.zeros((4, 3)), [0, 1, -1, -1])


@every
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (_with(x, np.nan), y), "NaN or infinite"),
        (lambda x, y: (255 * x, y), r"\[0, 1\].*got 0 to 255"),
        (lambda x, y: (x.astype(str), y), "must hold numbers"),
        (lambda x, y: (x[0], y), "table of rows and columns"),
        (lambda x, y: ([[1.0], [1.0, 2.0]], y), "different lengths"),
        (lambda x, y: (x, y[:-1]), "one label for each of 200 rows"),
        (lambda x, y: (x, np.where(y == 7, -1, y)), r"at least 2 classes \(got 1: \[3\]"),
        (lambda x, y: (x, np.full_like(y, -1)), r"at least 2 classes \(got 0"),
        (lambda x, y: (x, np.where(y == 7, "dog", "cat")), "whole numbers"),
        (lambda x, y: (x, y + 0.5), "whole numbers"),
        (lambda x, y: (x, np.where(y == 7, np.inf, y)), "whole numbers"),
    ],
)
def test_wrong_rows_and_labels_are_one_sentence(
    make: Callable[..., Any], change: Callable[..., Any], said: str
) -> None:
    x, _, known = rows()
    with pytest.raises(UserError, match=said) as error:
        make(random_state=0).fit(*change(x, known))
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": [3, 5, 7]}, "class 5 has no labelled row"),
        ({"classes": [3]}, "class 7, which is not one of classes"),
        ({"likelihood": "poisson"}, "likelihood must be one of"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0"),
        ({"warmup": -1}, "warmup must be a whole number of at least 1"),
        ({"alpha": -1}, "alpha must be a number above 0"),
        ({"skip_below": 1.0}, r"skip_below must be in \[0, 1\)"),
        ({"random_state": "a"}, "random_state must be"),
        ({"learning_rate": 1e9, "likelihood": "gaussian"}, "loss is NaN or infinite"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], said: str) -> None:
    x, _, known = rows()
    with pytest.raises(UserError, match=said):
        MAKERS["m2"](**{"random_state": 0} | options).fit(x, known)


def test_other_faults_are_one_sentence(tmp_path: Path) -> None:
    x, _, known = rows()
    model = MAKERS["m2"](random_state=0).fit(x, known)
    with pytest.raises(UserError, match="12 columns as in fit"):
        model.predict(x[:, :5])
    with pytest.raises(UserError, match="neighbours must be at most the 8 labelled rows"):
        MAKERS["m1"](classifier="neighbours", neighbours=9).fit(x, known)
    with pytest.raises(UserError, match="holds no network with a likelihood"):
        MAKERS["m1"](vae=str(tmp_path)).fit(x, known)
    with pytest.raises(UserError, match="likelihood must be 'bernoulli'"):
        MAKERS["m1"](vae=str(tmp_path), likelihood="gaussian").fit(x, known)
    with pytest.raises(UserError, match="cannot read"):
        load_classifier(tmp_path)


def test_an_exported_vae_is_the_first_stage(tmp_path: Path) -> None:
    from latentvae.models.dense.network import VectorVAE
    from latentvae.models.likelihood_models import ImagesOfModel, write_images_file

    x, truth, known = rows()
    trained = MAKERS["m1"](random_state=0).fit(x, known).vae_
    net = VectorVAE(
        image_height=3, image_width=4, latent_units=(2,), hidden_channels=(16,), activation="silu"
    )
    net.load_state_dict(trained.state_dict())
    net.save_pretrained(tmp_path / "vae")
    write_images_file(tmp_path / "vae", ImagesOfModel(binarize="static"))

    model = MAKERS["m1m2"](vae=str(tmp_path / "vae"), random_state=0).fit(x, known)
    assert model.score(x, truth) > 0.8
    save_classifier(model, tmp_path / "m")
    assert np.array_equal(load_classifier(tmp_path / "m").predict(x), model.predict(x))
    with pytest.raises(UserError, match="1 x 3 x 4 = 12 values, but X has 5 columns"):
        MAKERS["m1m2"](vae=str(tmp_path / "vae")).fit(x[:, :5], known)


def test_m1_gives_latents() -> None:
    x, _, known = rows()
    model = MAKERS["m1"](random_state=0).fit(x, known)
    assert model.transform(x).shape == (200, len(model.units_))
