"""Save and load detectors: options as JSON, learned tensors as safetensors. No pickle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from latentvae.anomaly.dagmm import DAGMM
from latentvae.anomaly.detector import Detector
from latentvae.anomaly.latent_density import LatentDensity
from latentvae.anomaly.vae import VAEDetector
from latentvae.errors import UserError, first_line, nearest
from latentvae.files import read_json

FORMAT = 1
JSON_NAME, TENSORS_NAME = "detector.json", "detector.safetensors"
CLASSES: dict[str, type[Detector]] = {
    kind.__name__: kind for kind in (DAGMM, VAEDetector, LatentDensity)
}


def save_detector(detector: Detector, folder: str | Path) -> None:
    """Write a fitted detector as detector.json and detector.safetensors.

    Args:
        detector: the fitted detector. A `random_state` that is not a number is stored as None.
        folder: folder for both files, created if it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = getattr(detector, "feature_names_in_", None)
    content = {
        "format": FORMAT,
        "class": type(detector).__name__,
        "options": {name: _plain(value) for name, value in detector.get_params().items()},
        "columns": None if names is None else list(names),
    }
    tensors = {name: value.contiguous() for name, value in detector.learned().items()}
    save_file(tensors, folder / TENSORS_NAME)
    (folder / JSON_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_detector(folder: str | Path) -> Detector:
    """Load a detector that `save_detector` wrote. Loading does not change the detector's scores.

    Raises:
        UserError: a file is missing, damaged or of another format.
    """
    folder = Path(folder)
    content = read_json(folder / JSON_NAME)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"'{folder / JSON_NAME}' is not a detector of format {FORMAT}.")
    name = str(content.get("class"))
    if name not in CLASSES:
        raise UserError(
            f"'{folder}' holds a '{name}', not one of {', '.join(CLASSES)}{nearest(name, CLASSES)}"
        )
    try:
        tensors = load_file(folder / TENSORS_NAME)
        detector = CLASSES[name](**content["options"]).relearn(tensors)
        if content["columns"] is not None:
            detector.feature_names_in_ = np.array(content["columns"], dtype=object)
        return detector
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"the detector in '{folder}' cannot be read: {reason}") from error


def _plain(value: Any) -> Any:
    """Return an option as a value that JSON can store."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (str, int, float, bool)) else None
