"""Rows and labels of a user's own folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentvae.errors import UserError
from latentvae.semi_supervised import M2Classifier, keep_labels, read_images


def write(folder: Path, name: str, grey: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 4), grey).save(path)


def test_folders_are_classes_and_unlabelled_is_none(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", 0)
    write(tmp_path, "unlabelled/2.png", 51)
    write(tmp_path, "z/3.png", 255)
    found = read_images(tmp_path, resolution=(2, 3))
    assert found.names == ["a/1.png", "unlabelled/2.png", "z/3.png"]
    assert found.labels.tolist() == [0, -1, 1] and found.classes == ["a", "z"]
    assert found.rows.shape == (3, 6) and found.rows.dtype == np.float32
    np.testing.assert_allclose(found.rows[:, 0], [0.0, 0.2, 1.0], atol=1e-6)

    model = M2Classifier(epochs=1, hidden_units=4, latent_units=1, random_state=0)
    assert set(model.fit(found.rows, found.labels).predict(found.rows)) <= {0, 1}


def test_an_unreadable_file_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", 0)
    write(tmp_path, "b/2.png", 9)
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    found = read_images(tmp_path, resolution=4, channels=3)
    assert found.names == ["a/1.png", "b/2.png"] and found.labels.tolist() == [0, 1]
    assert found.rows.shape == (2, 48)


def test_no_classes_is_said(tmp_path: Path) -> None:
    write(tmp_path, "1.png", 0)
    with pytest.raises(UserError, match="has no classes"):
        read_images(tmp_path, resolution=4)


def test_kept_labels_are_right_and_as_many() -> None:
    labels = np.array([0, 1] * 20 + [-1] * 5)
    kept = keep_labels(labels, per_class=3, seed=0)
    assert np.bincount(kept[kept >= 0]).tolist() == [3, 3]
    assert (kept == labels)[kept >= 0].all()
    assert (kept != keep_labels(labels, per_class=3, seed=1)).any()
    with pytest.raises(UserError, match="class 0 has only 20"):
        keep_labels(labels, per_class=21, seed=0)
