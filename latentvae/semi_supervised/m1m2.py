"""Train a VAE with a class variable (M2) on the latents of another VAE (M1).

Paper: arXiv:1406.5298, section 2.3.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from latentvae.models.dense.gaussians import Gaussian
from latentvae.semi_supervised.checks import check_counts
from latentvae.semi_supervised.m1 import LatentModel
from latentvae.semi_supervised.m2 import ClassModel
from latentvae.semi_supervised.training import Schedule


class M1M2Classifier(ClassModel, LatentModel):
    """M2 (a VAE with a class variable), trained on the latents of a first VAE.

    Each update of M2 draws new latents from the posteriors of the first VAE.

        model = M1M2Classifier(random_state=0).fit(X, y)      # y = -1: no label
        labels = model.predict(X_new)

    Args:
        likelihood: "bernoulli" for values in [0, 1], or "gaussian" for real values. With
            "gaussian", columns are standardised. With "bernoulli", each update of the first VAE
            replaces a grey value v by 1 with probability v, else by 0.
        vae: folder of a VAE that `latentvae train-vae` exported. With None, a new VAE is trained.
        vae_epochs: number of passes of the VAE's training over all rows.
        vae_layers: number of dense layers of the VAE's encoder and decoder.
        vae_units: size of the VAE's latent vector.
        alpha, skip_below, warmup: see `M2Classifier`.
        latent_units: size of M2's latent vector.
        hidden_units: width of the dense layers, in the VAE and in M2.
        hidden_layers: number of dense layers in each network of M2.
        epochs: number of passes of M2's training over the rows without a label, or over all rows if
            all have a label.
        batch_size: number of rows in an update of the VAE. For M2, see `M2Classifier`.
        learning_rate: first learning rate of Adam, for the VAE and for M2. The rate falls to 0
            along half a cosine (for M2, see `M2Classifier`).
        bf16: multiply in bfloat16 during training. This is faster on CPUs that have AVX512_BF16.
        classes: all classes, each of which must have a labelled row. With None, the classes are
            those in `y`.
        random_state: seed of the training, or None for a new seed in each `fit`. The same seed
            gives the same result.

    Attributes:
        vae_: the VAE whose latents M2 models.
        network_: the trained `ClassVAE`, which models the VAE's latents.
    """

    def __init__(
        self,
        *,
        likelihood: str = "bernoulli",
        vae: Any = None,
        vae_epochs: int = 30,
        vae_layers: int = 2,
        vae_units: int = 50,
        alpha: float = 0.1,
        skip_below: float = 0.1,
        warmup: int = 50,
        latent_units: int = 50,
        hidden_units: int = 500,
        hidden_layers: int = 1,
        epochs: int = 50,
        batch_size: int = 500,
        learning_rate: float = 1e-3,
        bf16: bool = False,
        classes: Any = None,
        random_state: Any = None,
    ) -> None:
        self.likelihood = likelihood
        self.vae = vae
        self.vae_epochs = vae_epochs
        self.vae_layers = vae_layers
        self.vae_units = vae_units
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

    def _check_options(self) -> None:
        super()._check_options()
        check_counts(
            vae_epochs=self.vae_epochs, vae_layers=self.vae_layers, vae_units=self.vae_units
        )

    def _vae_size(self) -> tuple[int, int, int, Schedule]:
        schedule = replace(self._schedule(), epochs=self.vae_epochs)
        return self.vae_units, self.hidden_units, self.vae_layers, schedule

    def _train(self, rows: Tensor, places: Tensor) -> None:
        posterior = self._train_vae(rows)
        self.network_ = self._new_network("gaussian", (1, 1, len(self.units_)))

        def draw(picked: Tensor) -> Tensor:
            some = Gaussian(posterior.mean[picked], posterior.logvar[picked])
            return some.sample()[:, None, None]

        self._fit_network(draw, places)

    def _probabilities(self, images: Tensor) -> Tensor:
        return self.network_.logits(self._latents(images)[:, None, None]).softmax(-1)

    def _learned(self) -> dict[str, Tensor]:
        return {"units": self.units_} | {
            f"network.{name}": value for name, value in self.network_.state_dict().items()
        }

    def _relearn(self, tensors: dict[str, Tensor]) -> None:
        self.units_ = tensors["units"]
        self.network_ = self._new_network("gaussian", (1, 1, len(self.units_)))
        state = {k.removeprefix("network."): v for k, v in tensors.items() if k != "units"}
        self.network_.load_state_dict(state)
        self.network_.eval()
