"""Save and load classifiers: options as JSON, learned tensors as safetensors. No pickle.

classifier.json            options, labels, shape
classifier.safetensors     scaling, network (M2, M1+M2) or latents of labelled rows (M1)
vae/                       the VAE of M1 and M1+M2, as diffusers saves a model
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.utils.validation import check_is_fitted

from latentvae.errors import UserError, first_line
from latentvae.files import read_json
from latentvae.models.dense.network import VectorVAE
from latentvae.semi_supervised.classifier import SemiSupervisedClassifier
from latentvae.semi_supervised.m1 import LatentModel, M1Classifier
from latentvae.semi_supervised.m1m2 import M1M2Classifier
from latentvae.semi_supervised.m2 import M2Classifier
from latentvae.semi_supervised.rows import RowImages, row_distribution

FORMAT = 1
JSON_NAME, TENSORS_NAME, VAE_NAME = "classifier.json", "classifier.safetensors", "vae"
CLASSIFIERS: dict[str, type[SemiSupervisedClassifier]] = {
    kind.__name__: kind for kind in (M1Classifier, M2Classifier, M1M2Classifier)
}


def save_classifier(classifier: SemiSupervisedClassifier, folder: str | Path) -> None:
    """Write a fitted classifier as files in a folder.

    Args:
        classifier: the fitted classifier. A `random_state` that is not a number is stored as None.
        folder: folder for the files, created if it does not exist.
    """
    check_is_fitted(classifier, "classes_")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = classifier.rows_
    content = {
        "format": FORMAT,
        "class": type(classifier).__name__,
        "options": {name: _plain(value) for name, value in classifier.get_params().items()},
        "labels": classifier.classes_.tolist(),
        "shape": list(rows.shape),
    }
    tensors = {f"learned.{name}": value for name, value in classifier._learned().items()}
    tensors |= {"rows.shift": rows.shift, "rows.scale": rows.scale}

    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS_NAME)
    if isinstance(classifier, LatentModel):
        classifier.vae_.save_pretrained(folder / VAE_NAME)
    (folder / JSON_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_classifier(folder: str | Path) -> SemiSupervisedClassifier:
    """Load a classifier that `save_classifier` wrote.

    The loaded classifier makes the same predictions as the saved classifier.

    Raises:
        UserError: a file is missing, damaged or of another format.
    """
    folder = Path(folder)
    content = read_json(folder / JSON_NAME)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"'{folder / JSON_NAME}' is not a classifier of format {FORMAT}.")
    if content.get("class") not in CLASSIFIERS:
        raise UserError(f"'{folder}' holds none of the classifiers {', '.join(CLASSIFIERS)}.")
    try:
        return _restored(content, load_file(folder / TENSORS_NAME), folder)
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"the classifier in '{folder}' cannot be read: {reason}") from error


def _restored(
    content: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path
) -> SemiSupervisedClassifier:
    classifier = CLASSIFIERS[content["class"]](**content["options"])
    classifier.classes_ = np.array(content["labels"], dtype=np.int64)
    classifier.rows_ = RowImages(
        classifier.likelihood,
        tuple(content["shape"]),
        tensors["rows.shift"],
        tensors["rows.scale"],
    )
    classifier.n_features_in_ = len(tensors["rows.shift"])

    if isinstance(classifier, LatentModel):
        net = VectorVAE.from_pretrained(folder / VAE_NAME, use_safetensors=True)
        if classifier.vae is None:
            net.pixels = row_distribution(classifier.likelihood)
        classifier.vae_ = net.eval()
    learned = {k.removeprefix("learned."): v for k, v in tensors.items() if k.startswith("learned")}
    classifier._relearn(learned)
    return classifier


def _plain(value: Any) -> Any:
    """Return an option as a value that JSON can store."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, (str, int, float, bool)) else None
