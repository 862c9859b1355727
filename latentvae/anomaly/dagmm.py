"""DAGMM, the deep autoencoding Gaussian mixture model of Zong et al. (ICLR 2018).

The anomaly score of a row is its energy: -log of its density under a Gaussian mixture. The mixture
is over z: the latent of an autoencoder and two features of the reconstruction. Autoencoder and
mixture are trained together with the loss

    mean |x - x'|^2 + energy_weight * mean E(z) + diagonal_weight * sum 1 / Sigma_kjj

Here x' is the reconstruction of a row x, E(z) is the energy, and Sigma_kjj are the variances of
component k. The features are the relative distance and the cosine similarity of x and x'.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentvae.anomaly.checks import check_choice, check_count, check_range
from latentvae.anomaly.dagmm_network import DAGMMNetwork
from latentvae.anomaly.detector import Detector
from latentvae.anomaly.mixture import Mixture, check_rows_for_components, fit_mixture
from latentvae.anomaly.training import in_batches, own_randomness, part_of, train_network

# Networks, training lengths and batches of the paper, section 4.3. The paper does not say how
# columns are scaled. For KDDCUP, the weights are larger than the paper's 0.1 and 0.005. With the
# paper's weights, the anomalies are not found (docs/experiments/anomaly.md).
PAPER_OPTIONS: dict[str, dict[str, Any]] = {
    "kddcup": {
        "hidden": (60, 30, 10),
        "latent_dim": 1,
        "num_components": 4,
        "epochs": 200,
        "batch_size": 1024,
        "energy_weight": 3.0,
        "diagonal_weight": 0.02,
        "scaling": "none",
    },
    "thyroid": {
        "hidden": (12, 4),
        "latent_dim": 1,
        "num_components": 2,
        "epochs": 20_000,
        "batch_size": 1024,
        "scaling": "minmax",
    },
    "arrhythmia": {
        "hidden": (10,),
        "latent_dim": 2,
        "num_components": 2,
        "epochs": 10_000,
        "batch_size": 128,
        "scaling": "minmax",
    },
}

# options that must be whole numbers of at least 1
COUNTS = (
    "latent_dim",
    "estimation_width",
    "num_components",
    "num_networks",
    "epochs",
    "batch_size",
)


class DAGMM(Detector):
    """Detector of anomalous rows: a deep autoencoding Gaussian mixture model (Zong et al. 2018).

        detector = DAGMM(num_components=2).fit(clean)
        anomalies = detector.predict(new) == -1

    Args:
        hidden: widths of the encoder's hidden layers. The decoder mirrors them.
        latent_dim: number of dimensions of the latent.
        estimation_width: width of the hidden layer of the estimation network, which gives the
            probability of each component of the mixture.
        num_components: number of components of the mixture.
        dropout: share of the hidden units of the estimation network that training drops.
        energy_weight: weight of the mean energy in the loss (lambda 1 of the paper). The energy is
            the -log of the joint density of a row's latent and two features of its reconstruction.
        diagonal_weight: weight of the sum of the mixture's inverse variances in the loss (lambda 2
            of the paper).
        variance_floor: variance added to each diagonal element of the mixture's covariances.
        epochs: number of passes over the training rows.
        batch_size: largest number of rows in an update.
        learning_rate: learning rate of Adam.
        schedule: "constant" (as in the paper) or "cosine". With "cosine", the learning rate falls
            to 0, and the result depends less on the seed.
        num_networks: number of networks that are trained from different random weights. The
            anomaly score of a row is the mean of its energies under all networks. The paper's DAGMM
            has 1 network. With 8 networks, the result depends less on the seed, and training takes
            eight times as long.
        scaling: how columns are scaled, by the training rows: "standard" (mean 0, variance 1),
            "minmax" ([0, 1]) or "none".
        constant_columns: "error" rejects columns with only one value in the training rows, and
            "keep" allows them.
        false_alarm_rate: allowed share of clean (normal) rows that are flagged as anomalies.
        random_state: seed, NumPy RandomState, or None for a new seed in each `fit`.

    Attributes:
        networks_: the trained networks, in float64.
        mixtures_: for each network, the mixture that is fitted to all training rows.
        losses_: loss of each epoch, averaged over batches and networks.
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (60, 30, 10),
        latent_dim: int = 1,
        estimation_width: int = 10,
        num_components: int = 4,
        dropout: float = 0.5,
        energy_weight: float = 0.1,
        diagonal_weight: float = 0.005,
        variance_floor: float = 1e-6,
        epochs: int = 200,
        batch_size: int = 1024,
        learning_rate: float = 1e-4,
        schedule: str = "constant",
        num_networks: int = 1,
        scaling: str = "minmax",
        constant_columns: str = "error",
        false_alarm_rate: float = 0.01,
        random_state: Any = 0,
    ) -> None:
        self.hidden = hidden
        self.latent_dim = latent_dim
        self.estimation_width = estimation_width
        self.num_components = num_components
        self.dropout = dropout

        self.energy_weight = energy_weight
        self.diagonal_weight = diagonal_weight
        self.variance_floor = variance_floor
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.num_networks = num_networks

        self.scaling = scaling
        self.constant_columns = constant_columns
        self.false_alarm_rate = false_alarm_rate
        self.random_state = random_state

    def latents(self, X: Any) -> np.ndarray:
        """Return z of each of N rows, (N, num_networks * (latent_dim + 2)).

        z is the latent, and the relative distance and cosine similarity of the row and its
        reconstruction. With several networks, the columns of all networks are concatenated.
        """
        rows = self._checked(X)
        return torch.cat([_latents(network, rows) for network in self.networks_], dim=1).numpy()

    def _train(self, rows: np.ndarray, *, seed: int) -> None:
        self._check_options(len(rows))
        self.networks_, self.mixtures_ = [], []
        losses = []
        for number in range(self.num_networks):
            network, of_epochs = self._trained(rows, seed_of_network(seed, number))
            losses.append(of_epochs)

            # A mixture of all training rows replaces the mixtures of the batches.
            z, assignments = _latents(network, rows), _assignments(network, rows)
            self.mixtures_.append(fit_mixture(z, assignments, floor=self.variance_floor)[0])
            self.networks_.append(network)
        self.losses_ = np.mean(losses, axis=0).tolist()

    def _trained(self, rows: np.ndarray, seed: int) -> tuple[DAGMMNetwork, list[float]]:
        """Return a trained network in float64, and its mean loss of each epoch."""
        with own_randomness(seed) as generator:
            network = self._new_network(rows.shape[1])
            losses = train_network(
                network,
                rows,
                lambda batch: self._loss(network, batch),
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                generator=generator,
                cosine=self.schedule == "cosine",
            )
        return network.double(), losses

    def _loss(self, network: DAGMMNetwork, batch: Tensor) -> Tensor:
        out = network(batch)
        mixture, covariances = fit_mixture(out.z, out.assignments, floor=self.variance_floor)

        distortion = (batch - out.recon).square().sum(dim=1).mean()
        inverse = covariances.diagonal(dim1=1, dim2=2).reciprocal().sum()
        energy = mixture.energy(out.z).mean()
        return distortion + self.energy_weight * energy + self.diagonal_weight * inverse

    def _anomaly_scores(self, rows: np.ndarray) -> np.ndarray:
        def energy(batch: Tensor) -> Tensor:
            pairs = zip(self.networks_, self.mixtures_, strict=True)
            energies = [mixture.energy(network(batch).z) for network, mixture in pairs]
            return torch.stack(energies).mean(dim=0)

        return in_batches(rows, energy).numpy()

    def _new_network(self, num_features: int) -> DAGMMNetwork:
        return DAGMMNetwork(
            num_features,
            hidden=tuple(self.hidden),
            latent_dim=self.latent_dim,
            estimation_width=self.estimation_width,
            num_components=self.num_components,
            dropout=self.dropout,
        )

    def _check_options(self, num_rows: int) -> None:
        for name in COUNTS:
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "variance_floor"):
            check_range(name, getattr(self, name), low=0, open_low=True)
        for name in ("energy_weight", "diagonal_weight"):
            check_range(name, getattr(self, name), low=0)
        check_choice("schedule", self.schedule, ("constant", "cosine"))
        check_range("dropout", self.dropout, low=0, high=0.95)
        check_rows_for_components(num_rows, self.num_components)

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, network in enumerate(self.networks_):
            mixture = vars(self.mixtures_[number])
            found |= {f"{number}.network.{n}": v for n, v in network.state_dict().items()}
            found |= {f"{number}.mixture.{n}": v for n, v in mixture.items()}
        return found

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self.networks_, self.mixtures_ = [], []
        for number in range(self.num_networks):
            network = self._new_network(self.n_features_in_).double().eval()
            network.load_state_dict(part_of(tensors, f"{number}.network."))
            self.networks_.append(network)
            self.mixtures_.append(Mixture(**part_of(tensors, f"{number}.mixture.")))


def seed_of_network(seed: int, number: int) -> int:
    """Return the seed of network `number`. The first network, number 0, has the seed `seed`."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _latents(network: DAGMMNetwork, rows: np.ndarray) -> Tensor:
    return in_batches(rows, lambda batch: network(batch).z)


def _assignments(network: DAGMMNetwork, rows: np.ndarray) -> Tensor:
    return in_batches(rows, lambda batch: network(batch).assignments)
