"""Detect anomalies in tables, with the outlier interface of scikit-learn, and in images.

detector = DAGMM().fit(clean)  # clean: rows without anomalies
detector.score_samples(new)  # larger means more normal
detector.predict(new)  # 1 for normal rows, -1 for anomalies
"""

from latentvae.anomaly.dagmm import DAGMM
from latentvae.anomaly.detector import Detector
from latentvae.anomaly.latent_density import LatentDensity
from latentvae.anomaly.saving import load_detector, save_detector
from latentvae.anomaly.vae import VAEDetector

__all__ = [
    "DAGMM",
    "Detector",
    "LatentDensity",
    "VAEDetector",
    "load_detector",
    "save_detector",
]
