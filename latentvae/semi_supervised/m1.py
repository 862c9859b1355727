"""Classify rows by the latents of a VAE that was trained on all rows (M1, arXiv:1406.5298)."""

from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from latentvae.errors import UserError
from latentvae.models.dense.network import VectorVAE
from latentvae.semi_supervised.checks import check_choice, check_counts
from latentvae.semi_supervised.classifier import SemiSupervisedClassifier
from latentvae.semi_supervised.latents import (
    active_units,
    check_columns,
    chosen,
    fitted_vae,
    given_vae,
    new_vae,
    posteriors,
)
from latentvae.semi_supervised.training import Schedule

FINAL_CLASSIFIERS = ("logistic", "neighbours")


class LatentModel(SemiSupervisedClassifier):
    """Base class of `M1Classifier` and `M1M2Classifier`, which train or load a VAE first.

    Attributes:
        vae_: the VAE whose latents are used.
        units_: indices of the active latent units, whose posterior mean differs between rows.
    """

    vae: Any
    vae_: VectorVAE
    units_: Tensor

    def _vae_size(self) -> tuple[int, int, int, Schedule]:
        """Return the sizes of a new VAE (latent units, hidden units, layers) and its schedule."""
        raise NotImplementedError

    def _image_shape(self) -> tuple[int, int, int]:
        if self.vae is None:
            return super()._image_shape()
        self.vae_ = given_vae(self.vae, likelihood=self.likelihood)
        check_columns(self.vae_, self.n_features_in_)
        return self.vae_.image_shape

    def _train_vae(self, rows: Tensor) -> Any:
        """Train the VAE unless it is given, and return the posterior of the active units."""
        if self.vae is None:
            units, hidden, layers, schedule = self._vae_size()
            net = new_vae(
                rows.shape[1],
                likelihood=self.likelihood,
                units=units,
                hidden=hidden,
                layers=layers,
            )
            self.vae_ = fitted_vae(net, self.rows_, rows, schedule)
        posterior = posteriors(self.vae_, self.rows_, rows)
        self.units_ = active_units(posterior)
        if not len(self.units_):
            raise UserError(
                f"the VAE has the same latent for all {len(rows)} rows, so a classifier learns "
                "nothing from latents. Give rows that differ, or another VAE."
            )
        return chosen(posterior, self.units_)

    def _latents(self, images: Tensor) -> Tensor:
        """Return the posterior means of the active units, (B, U)."""
        return self.vae_.posterior(images).mean[:, self.units_]


class M1Classifier(LatentModel):
    """A VAE trained on all rows, and a simple classifier trained on latents of labelled rows.

        model = M1Classifier(random_state=0).fit(X, y)      # y = -1: no label
        labels = model.predict(X_new)

    Args:
        likelihood: "bernoulli" for values in [0, 1], or "gaussian" for real values. With
            "gaussian", columns are standardised. With "bernoulli", each update replaces a grey
            value v by 1 with probability v, else by 0.
        classifier: "logistic" (logistic regression) or "neighbours" (nearest neighbours).
        neighbours: number of neighbours, at most the number of labelled rows.
        vae: folder of a VAE that `latentvae train-vae` exported. With None, a new VAE is trained.
        latent_units: size of the latent vector.
        hidden_units, hidden_layers: width and number of dense layers of encoder and decoder.
        epochs: number of passes over the rows.
        batch_size: number of rows in an update.
        learning_rate: first learning rate of Adam, which falls to 0 along half a cosine.
        bf16: multiply in bfloat16 during training. This is faster on CPUs that have AVX512_BF16.
        classes: all classes, each of which must have a labelled row. With None, the classes are
            those in `y`.
        random_state: seed of the training, or None for a new seed in each `fit`. The same seed
            gives the same result.

    Attributes:
        vae_: the VAE whose latents are used.
    """

    def __init__(
        self,
        *,
        likelihood: str = "bernoulli",
        classifier: str = "logistic",
        neighbours: int = 5,
        vae: Any = None,
        latent_units: int = 50,
        hidden_units: int = 500,
        hidden_layers: int = 2,
        epochs: int = 30,
        batch_size: int = 200,
        learning_rate: float = 1e-3,
        bf16: bool = False,
        classes: Any = None,
        random_state: Any = None,
    ) -> None:
        self.likelihood = likelihood
        self.classifier = classifier
        self.neighbours = neighbours
        self.vae = vae
        self.latent_units = latent_units
        self.hidden_units = hidden_units

        self.hidden_layers = hidden_layers
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.bf16 = bf16
        self.classes = classes
        self.random_state = random_state

    def transform(self, X: Any) -> Any:
        """Return the latents, (N, number of active units), of rows X (N, F)."""
        return self._by_batches(X, self._latents)

    def _check_options(self) -> None:
        super()._check_options()
        check_choice("classifier", self.classifier, FINAL_CLASSIFIERS)
        check_counts(neighbours=self.neighbours)

    def _vae_size(self) -> tuple[int, int, int, Schedule]:
        return self.latent_units, self.hidden_units, self.hidden_layers, self._schedule()

    def _train(self, rows: Tensor, places: Tensor) -> None:
        known = (places >= 0).nonzero().squeeze(1)
        if self.classifier == "neighbours" and self.neighbours > len(known):
            raise UserError(
                f"neighbours must be at most the {len(known)} labelled rows (got "
                f"{self.neighbours})."
            )
        self.known_latents_ = self._train_vae(rows).mean[known]
        self.known_places_ = places[known]
        self._fit_classifier()

    def _fit_classifier(self) -> None:
        if self.classifier == "logistic":
            self.classifier_: Any = LogisticRegression(max_iter=1000)
        else:
            self.classifier_ = KNeighborsClassifier(self.neighbours)
        self.classifier_.fit(self.known_latents_.numpy(), self.known_places_.numpy())

    def _probabilities(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.classifier_.predict_proba(self._latents(images).numpy()))

    def _learned(self) -> dict[str, Tensor]:
        return {
            "units": self.units_,
            "known_latents": self.known_latents_,
            "known_places": self.known_places_,
        }

    def _relearn(self, tensors: dict[str, Tensor]) -> None:
        self.units_ = tensors["units"]
        self.known_latents_, self.known_places_ = tensors["known_latents"], tensors["known_places"]
        self._fit_classifier()
