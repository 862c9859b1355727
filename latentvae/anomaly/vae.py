"""Detect anomalies in tables by a variational autoencoder, with one of three scores.

With samples z_1 to z_L from q(z|x), the score of a row x is one of

    reconstruction_probability   mean log p(x|z_l)                            An and Cho 2015
    elbo                         mean log p(x|z_l) - KL(q(z|x) || p(z))
    importance                   log mean p(x|z_l) p(z_l) / q(z_l|x)          arXiv:1509.00519

Symbols: `N` rows, `L` samples of z for each row.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentvae.anomaly.checks import check_choice, check_count, check_range
from latentvae.anomaly.dense_vae import DenseVAE, Terms, gaussian_kl
from latentvae.anomaly.detector import Detector
from latentvae.anomaly.training import in_batches, own_randomness, part_of, train_network


def reconstruction_probability(terms: Terms, kl: Tensor) -> Tensor:
    """Return the mean of log p(x|z) over the samples of z, (N,), in nats."""
    return terms.likelihood.mean(dim=0)


def elbo(terms: Terms, kl: Tensor) -> Tensor:
    """Return the evidence lower bound with the KL in closed form, (N,), in nats."""
    return terms.likelihood.mean(dim=0) - kl


def importance(terms: Terms, kl: Tensor) -> Tensor:
    """Return the importance-weighted bound of log p(x), (N,), in nats."""
    weights = terms.likelihood + terms.prior - terms.posterior
    return torch.logsumexp(weights, dim=0) - math.log(len(weights))


SCORES: dict[str, Callable[[Terms, Tensor], Tensor]] = {
    "reconstruction_probability": reconstruction_probability,
    "elbo": elbo,
    "importance": importance,
}


class VAEDetector(Detector):
    """A dense variational autoencoder that detects anomalies in tables.

        detector = VAEDetector(criterion="importance").fit(clean)
        nats = detector.score_samples(new)

    Every row is scored with the same L draws of noise. The score of a row therefore does not
    depend on the other rows, and the same seed gives the same scores.

    Args:
        hidden: widths of the encoder's hidden layers. The decoder mirrors them.
        latent_dim: number of columns of z.
        min_std: smallest standard deviation of the decoder, in units of the scaled columns.
        decoder_std: "column" learns one standard deviation for each column. "row" computes standard
            deviations for each row, as An and Cho do. Unusual rows may then get large standard
            deviations, so that their scores look normal.
        criterion: the score, "reconstruction_probability", "elbo" or "importance". You can change
            this option after `fit`. Then call `calibrate`, because the threshold is still that of
            the earlier score.
        num_samples: number L of samples of z for the score of a row.
        epochs: number of passes over the training rows.
        batch_size: largest number of rows in an update.
        learning_rate: learning rate of Adam.
        scaling: how columns are scaled, by the training rows: "standard" (mean 0, variance 1),
            "minmax" ([0, 1]) or "none".
        constant_columns: "error" rejects columns with only one value in the training rows, and
            "keep" allows them.
        false_alarm_rate: allowed share of clean (normal) rows that are flagged as anomalies.
        random_state: seed, NumPy RandomState, or None for a new seed in each `fit`.

    Attributes:
        network_: the trained network, in float64.
        losses_: mean negative ELBO of each epoch, in nats.
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (64, 32),
        latent_dim: int = 4,
        min_std: float = 0.1,
        decoder_std: str = "column",
        criterion: str = "elbo",
        num_samples: int = 64,
        epochs: int = 200,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        scaling: str = "standard",
        constant_columns: str = "error",
        false_alarm_rate: float = 0.01,
        random_state: Any = 0,
    ) -> None:
        self.hidden = hidden
        self.latent_dim = latent_dim
        self.min_std = min_std
        self.decoder_std = decoder_std

        self.criterion = criterion
        self.num_samples = num_samples
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate

        self.scaling = scaling
        self.constant_columns = constant_columns
        self.false_alarm_rate = false_alarm_rate
        self.random_state = random_state

    def latents(self, X: Any) -> np.ndarray:
        """Return the mean of q(z|x) of each of N rows, (N, latent_dim)."""
        return in_batches(self._checked(X), lambda rows: self.network_.encode(rows)[0]).numpy()

    def _train(self, rows: np.ndarray, *, seed: int) -> None:
        self._check_options()
        with own_randomness(seed) as generator:
            network = self._new_network(rows.shape[1])

            def loss(batch: Tensor) -> Tensor:
                noise = torch.randn(len(batch), self.latent_dim, generator=generator)
                return -network.elbo(batch, noise).mean()

            self.losses_ = train_network(
                network,
                rows,
                loss,
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                generator=generator,
            )
            self.noise_ = torch.randn(
                self.num_samples, self.latent_dim, generator=generator, dtype=torch.float64
            )
        self.network_ = network.double()

    def _anomaly_scores(self, rows: np.ndarray) -> np.ndarray:
        check_choice("criterion", self.criterion, tuple(SCORES))
        score = SCORES[self.criterion]

        def negative_score(batch: Tensor) -> Tensor:
            kl = gaussian_kl(*self.network_.encode(batch))
            return -score(self.network_.terms(batch, self.noise_), kl)

        # Batches are small, because L samples of each row are in memory at once.
        return in_batches(rows, negative_score, num_rows=1024).numpy()

    def _new_network(self, num_features: int) -> DenseVAE:
        return DenseVAE(
            num_features,
            hidden=tuple(self.hidden),
            latent_dim=self.latent_dim,
            min_std=self.min_std,
            std_per_row=self.decoder_std == "row",
        )

    def _check_options(self) -> None:
        check_choice("criterion", self.criterion, tuple(SCORES))
        check_choice("decoder_std", self.decoder_std, ("column", "row"))
        for name in ("latent_dim", "num_samples", "epochs", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "min_std"):
            check_range(name, getattr(self, name), low=0, open_low=True)

    def _tensors(self) -> dict[str, Tensor]:
        network = {f"network.{name}": v for name, v in self.network_.state_dict().items()}
        return network | {"noise": self.noise_}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        network = self._new_network(self.n_features_in_).double().eval()
        network.load_state_dict(part_of(tensors, "network."))
        self.network_, self.noise_ = network, tensors["noise"]
