"""Train a semi-supervised VAE in which the class is a random variable (M2, arXiv:1406.5298)."""

from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from latentvae.errors import UserError
from latentvae.models.dense.class_network import ClassVAE
from latentvae.semi_supervised.checks import check_above, check_counts, seed_of
from latentvae.semi_supervised.classifier import SemiSupervisedClassifier
from latentvae.semi_supervised.rows import row_distribution
from latentvae.semi_supervised.training import own_randomness, train_classes


class ClassModel(SemiSupervisedClassifier):
    """Base class of `M2Classifier` and `M1M2Classifier`, with the options and checks of both."""

    alpha: float
    skip_below: float
    warmup: int
    network_: ClassVAE

    def _check_options(self) -> None:
        super()._check_options()
        if self.warmup != 0:
            check_counts(warmup=self.warmup)
        check_above("alpha", self.alpha, low=0.0)
        if not 0.0 <= self.skip_below < 1.0:
            raise UserError(f"skip_below must be in [0, 1) (got {self.skip_below!r}).")

    def _new_network(self, likelihood: str, shape: tuple[int, int, int]) -> ClassVAE:
        channels, height, width = shape
        return ClassVAE(
            image_channels=channels,
            image_height=height,
            image_width=width,
            num_classes=len(self.classes_),
            pixels=row_distribution(likelihood),
            latent_units=self.latent_units,
            hidden_units=self.hidden_units,
            hidden_layers=self.hidden_layers,
        )

    def _fit_network(self, draw: Any, places: Tensor) -> None:
        train_classes(
            self.network_,
            draw,
            places,
            schedule=self._schedule(),
            alpha=self.alpha,
            least=self.skip_below / len(self.classes_),
            warmup=self.warmup,
        )


class M2Classifier(ClassModel):
    """A VAE with a latent vector and a class variable, trained on rows with and without a label.

        model = M2Classifier(random_state=0).fit(X, y)      # y = -1: no label
        labels = model.predict(X_new)

    Args:
        likelihood: "bernoulli" for values in [0, 1], or "gaussian" for real values. With
            "gaussian", columns are standardised. With "bernoulli", each update replaces a grey
            value v by 1 with probability v, else by 0.
        alpha: weight of the mean cross entropy of the labelled rows. The other loss term, the mean
            negative ELBO over all rows, has weight 1. The paper uses `alpha` 0.1. In the warm-up,
            and if all rows have a label, both weights are 1.
        skip_below: for a row without a label, an update leaves out each class whose probability is
            below skip_below / K, where K is the number of classes. With 0, updates use all classes,
            as in the paper, and take much longer.
        warmup: number of passes over the labelled rows alone, before the rows without a label are
            used too. 0 means no warm-up.
        latent_units: size of the latent vector.
        hidden_units, hidden_layers: width and number of dense layers of each network.
        epochs: number of passes over the rows without a label, or over all rows if all have a
            label.
        batch_size: number of rows without a label in an update, which also uses at most 100
            labelled rows. If all rows have a label: number of rows in an update.
        learning_rate: first learning rate of Adam, which falls to 0 along half a cosine, in the
            warm-up and again after the warm-up.
        bf16: multiply in bfloat16 during training. This is faster on CPUs that have AVX512_BF16.
        classes: all classes, each of which must have a labelled row. With None, the classes are
            those in `y`.
        random_state: seed of the training, or None for a new seed in each `fit`. The same seed
            gives the same result.

    Attributes:
        network_: the trained `ClassVAE`.
    """

    def __init__(
        self,
        *,
        likelihood: str = "bernoulli",
        alpha: float = 0.1,
        skip_below: float = 0.1,
        warmup: int = 50,
        latent_units: int = 50,
        hidden_units: int = 500,
        hidden_layers: int = 1,
        epochs: int = 30,
        batch_size: int = 500,
        learning_rate: float = 1e-3,
        bf16: bool = False,
        classes: Any = None,
        random_state: Any = None,
    ) -> None:
        self.likelihood = likelihood
        self.alpha = alpha
        self.skip_below = skip_below
        self.warmup = warmup
        self.latent_units = latent_units
        self.hidden_units = hidden_units

        self.hidden_layers = hidden_layers
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.bf16 = bf16
        self.classes = classes
        self.random_state = random_state

    @torch.no_grad()
    def generate(self, labels: Any, *, random_state: Any = None) -> np.ndarray:
        """Return a generated row for each of N labels, (N, F).

        A row is the decoder's mean for the label and a random latent vector.

        Args:
            labels: N labels, each one of `classes_`.
            random_state: seed, NumPy RandomState, or None for a new seed in each call.

        Raises:
            UserError: a label is unknown.
        """
        check_is_fitted(self, "classes_")
        wanted = np.asarray(labels)
        if len(unknown := np.setdiff1d(wanted, self.classes_)):
            raise UserError(f"label {unknown[0]} is not one of {self.classes_.tolist()}.")
        places = torch.from_numpy(np.searchsorted(self.classes_, wanted))
        with own_randomness(seed_of(random_state)):
            z = torch.randn(len(places), self.latent_units)
        images = self.network_.pixels.mean(self.network_.pixel_parameters(z, places))
        return self.rows_.rows(images).numpy()

    def _train(self, rows: Tensor, places: Tensor) -> None:
        self.network_ = self._new_network(self.likelihood, self.rows_.shape)
        mean = self.rows_.images(rows.mean(0, keepdim=True))[0]
        self.network_.start_at(mean)
        self._fit_network(lambda picked: self.rows_.drawn(rows[picked]), places)

    def _probabilities(self, images: Tensor) -> Tensor:
        return self.network_.logits(images).softmax(-1)

    def _learned(self) -> dict[str, Tensor]:
        return dict(self.network_.state_dict())

    def _relearn(self, tensors: dict[str, Tensor]) -> None:
        self.network_ = self._new_network(self.likelihood, self.rows_.shape)
        self.network_.load_state_dict(tensors)
        self.network_.eval()
