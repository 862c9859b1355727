"""Score images with an autoencoder by one of four methods, each with a heat map.

    reconstruction   error of the reconstruction, L1 or LPIPS. Nothing is fitted.
    latent_density   density of the mean and standard deviation of each of the image's latent
                     channels: a Gaussian mixture or nearest neighbours.
    positions        a Gaussian of the latents at each position (PaDiM, arXiv:2011.08785), for
                     images taken in the same way, such as photos of parts on a production line.
    likelihood       -log-likelihood under a VAE, with or without a correction (see
                     `anomaly.corrections`). Nothing is fitted.

Symbols: `B` or `N` images, `H W` pixels, `d` latent channels, `h w` latent positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from latentvae.anomaly.corrections import input_complexity, likelihood_ratio, lossless_bits
from latentvae.anomaly.latent_density import LatentDensity
from latentvae.anomaly.training import part_of
from latentvae.autoencoder import Autoencoder, hash_of_weights
from latentvae.compute.precision import full_float32
from latentvae.errors import UserError
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models.bound import LikelihoodNet
from latentvae.models.likelihood_models import (
    ImagesOfModel,
    find_likelihood_export,
    likelihood_net_of,
    load_likelihood_net,
    read_images_file,
)

MAX_POSITIONS = 20_000  # largest number of latent vectors for the heat maps of `latent_density`


class Scored(NamedTuple):
    """Anomaly scores (B,) and heat maps (B, H, W) of images. Larger is more anomalous."""

    scores: Tensor
    maps: Tensor


class ImageMethod(Protocol):
    """A method that gives images an anomaly score and a heat map.

    `fit` takes the latents of N clean images (images without anomalies), (N, d, h, w).
    """

    def fit(self, latents: Tensor) -> Self: ...

    def score(self, model: Autoencoder, images: Tensor) -> Scored: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def restore(self, tensors: dict[str, Tensor]) -> Self: ...


@dataclass(frozen=True)
class ImageOptions:
    """Options of all methods. Each method uses only some of these options.

    Attributes:
        distance: distance of the method `reconstruction`, "l1" or "lpips".
        density: density of the method `latent_density`, "gmm" (Gaussian mixture) or "knn" (nearest
            neighbours).
        correction: correction of the method `likelihood`: "none", "complexity" (compare with the
            size of a lossless file) or "ratio" (compare with a background model).
        background: folder of the background model, for the correction "ratio".
        samples: number of latent samples per image, for the method `likelihood`.
        seed: seed of all random numbers.
    """

    distance: Literal["l1", "lpips"] = "l1"
    density: Literal["gmm", "knn"] = "gmm"
    correction: Literal["none", "complexity", "ratio"] = "none"
    background: str | None = None
    samples: int = 10
    seed: int = 0


class Reconstruction:
    """Score images by the error of their reconstruction.

    Args:
        distance: "l1", the mean absolute error of images in [-1, 1], or "lpips".
    """

    def __init__(self, distance: str = "l1") -> None:
        self.distance = distance
        self.lpips = None if distance == "l1" else PerceptualLoss(load_lpips("alex"))

    def fit(self, latents: Tensor) -> Self:
        """Do nothing, because this method has nothing to learn."""
        return self

    def score(self, model: Autoencoder, images: Tensor) -> Scored:
        """Return the distance of each image from its reconstruction, and a map of the distances."""
        recon = model.reconstruct(images)
        if self.lpips is None:
            maps = (recon - images).abs().mean(dim=1)
            return Scored(maps.mean(dim=(1, 2)), maps)
        lpips = self.lpips.to(images.device)
        with torch.no_grad():
            return Scored(lpips(images, recon), lpips.maps(images, recon))

    def tensors(self) -> dict[str, Tensor]:
        """Return an empty dict, because this method has nothing to learn."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> Self:
        """Do nothing, because there is nothing to restore."""
        return self


class PooledDensity:
    """Score images by the density of the mean and standard deviation of each latent channel.

    The mean and the standard deviation are taken over the positions of an image.

    The heat map shows where a latent is rare: it is the -log density of each position's latent
    under a Gaussian mixture that all positions share.

    Args:
        density: "gmm" or "knn", see `LatentDensity`.
        seed: seed of the mixtures, and of the random choice of latents for the mixture of the heat
            map.
    """

    def __init__(self, density: str = "gmm", seed: int = 0) -> None:
        options = {"constant_columns": "keep", "random_state": seed}
        self.image = LatentDensity(density=density, **options)
        self.local = LatentDensity(density="gmm", num_components=4, **options)
        self.seed = seed

    def fit(self, latents: Tensor) -> Self:
        """Fit one density to `pooled` latents of images, and one to the latents of positions."""
        self.image.fit(pooled(latents).double().numpy())
        vectors = latents.movedim(1, -1).flatten(0, 2)
        order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(self.seed))
        self.local.fit(vectors[order[:MAX_POSITIONS]].double().numpy())
        return self

    def score(self, model: Autoencoder, images: Tensor) -> Scored:
        """Return the score of each image, and a map of the -log density of each position's latent.

        With "gmm", the score is the -log density in nats. With "knn", the score is the mean
        distance to the pooled latents of the nearest clean images.
        """
        latents = model.encode(images).float().cpu()
        batch, _, height, width = latents.shape
        vectors = latents.movedim(1, -1).flatten(0, 2).double().numpy()
        energies = torch.from_numpy(-self.local.score_samples(vectors))
        maps = energies.float().view(batch, height, width)
        scores = torch.from_numpy(-self.image.score_samples(pooled(latents).double().numpy()))
        return Scored(scores, enlarged(maps, images))

    def tensors(self) -> dict[str, Tensor]:
        """Return the learned values of both densities: of images and of positions."""
        return {
            f"{name}.{key}": value
            for name, part in (("image", self.image), ("local", self.local))
            for key, value in part.learned().items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> Self:
        """Restore the learned values from the result of `tensors`."""
        for name, part in (("image", self.image), ("local", self.local)):
            part.relearn(part_of(tensors, f"{name}."))
        return self


class Positions:
    """Score images by each latent's Mahalanobis distance from clean latents at its position.

    Clean latents are those of images without anomalies.

    The latent of a position is concatenated with the latents of its eight neighbours. The distance
    of such a vector is divided by the square root of its length 9 d. The score of an image is its
    largest distance, after each distance is averaged with those of the neighbouring positions.

    Args:
        floor: number added to each variance of the latents, as a share of the mean variance.
    """

    def __init__(self, floor: float = 0.1) -> None:
        self.floor = floor

    def fit(self, latents: Tensor) -> Self:
        """Fit the mean and covariance of the latents at each position."""
        vectors = neighbourhoods(latents).double()  # (N, D, h, w)
        self.means = vectors.mean(dim=0)
        offset = (vectors - self.means).permute(2, 3, 1, 0)  # (h, w, D, N)
        covariances = offset @ offset.mT / len(vectors)
        variance = covariances.diagonal(dim1=-2, dim2=-1).mean()
        ridge = self.floor * variance.clamp_min(1e-12) * torch.eye(len(self.means)).double()
        self.factors = torch.linalg.cholesky(covariances + ridge)
        return self

    def score(self, model: Autoencoder, images: Tensor) -> Scored:
        """Return each image's largest averaged distance (the score), and a map of the averages."""
        vectors = neighbourhoods(model.encode(images).float().cpu()).double()
        if vectors.shape[1:] != self.means.shape:
            raise UserError(
                f"these images have latents {tuple(vectors.shape[2:])}, but the clean images had "
                f"{tuple(self.means.shape[1:])}: use the same resolution."
            )
        offset = (vectors - self.means).permute(2, 3, 1, 0)  # (h, w, D, B)
        white = torch.linalg.solve_triangular(self.factors, offset, upper=False)
        maps = white.square().mean(dim=2).sqrt().permute(2, 0, 1).float()  # (B, h, w)
        smooth = F.avg_pool2d(maps[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
        return Scored(smooth.amax(dim=(1, 2)).double(), enlarged(smooth, images))

    def tensors(self) -> dict[str, Tensor]:
        """Return the mean, and the Cholesky factor of the covariance, of each position."""
        return {"means": self.means, "factors": self.factors}

    def restore(self, tensors: dict[str, Tensor]) -> Self:
        """Restore the learned values from the result of `tensors`."""
        self.means, self.factors = tensors["means"], tensors["factors"]
        return self


class Likelihood:
    """Score images by their likelihood under a VAE, in nats.

    The heat map shows the reconstruction error of each pixel. The log-likelihood is the
    importance-weighted bound (arXiv:1509.00519).

    Args:
        options: the options `correction`, `background`, `samples` and `seed`.

    Raises:
        UserError: `background` is missing for the correction "ratio", or given for another
            correction, or cannot be loaded, or `samples` is below 1.
    """

    def __init__(self, options: ImageOptions) -> None:
        self.options = options
        self.background: tuple[Any, ImagesOfModel] | None = None
        if (options.correction == "ratio") != (options.background is not None):
            raise UserError(
                "correction ratio needs a background, and other corrections use no background. "
                f"Give both or none (got correction {options.correction} and background "
                f"{options.background})."
            )
        if options.samples < 1:
            raise UserError(f"samples must be at least 1 (got {options.samples}).")
        if options.background is not None:
            self.background = load_likelihood_net(options.background)

    def fit(self, latents: Tensor) -> Self:
        """Do nothing, because this method has nothing to learn."""
        return self

    @full_float32()
    @torch.no_grad()
    def score(self, model: Autoencoder, images: Tensor) -> Scored:
        """Return each image's negative corrected log-likelihood in nats, and a map of pixel errors.

        Raises:
            UserError: the model has no likelihood, or the background model has another likelihood,
                image size or way to make images binary than the model.
        """
        net, about = likelihood_net_of(model.net, name=model.name), images_of(model)
        images = self._as_expected(net, about, images.to(model.net.device))
        nats = self._log_likelihood(net, images)
        if self.background is not None:
            other = self.background[0].to(model.net.device)
            self._check_background(net, about)
            nats = likelihood_ratio(nats, self._log_likelihood(other, images))
        elif self.options.correction == "complexity":
            nats = input_complexity(nats, lossless_bits(images.cpu()))
        maps = (net.reconstruct(images) - images).abs().mean(dim=1)
        return Scored(-torch.as_tensor(nats), maps.float())

    def _as_expected(self, net: LikelihoodNet, about: ImagesOfModel, images: Tensor) -> Tensor:
        """Return images with pixel values that the model expects, for example binary values.

        If binary values are drawn at random, each image gets the same random numbers.
        """
        if about.binarize != "static":
            return net.pixels.rounded(images)
        draws = torch.Generator().manual_seed(self.options.seed)
        levels = torch.rand(images.shape[1:], generator=draws).to(images.device)
        return torch.where(levels < (images + 1.0) / 2.0, 1.0, -1.0)

    def _check_background(self, net: LikelihoodNet, about: ImagesOfModel) -> None:
        assert self.background is not None
        other, expected = self.background
        same = type(other.pixels) is type(net.pixels) and expected.binarize == about.binarize
        if not same or other.image_shape != net.image_shape:
            raise UserError(
                f"the background model '{self.options.background}' has another likelihood, binary "
                "images or image size than the model. Train the background model with the model's "
                "options and --perturb_rate."
            )

    def _log_likelihood(self, net: LikelihoodNet, images: Tensor) -> Tensor:
        """Return the bound of each image's log-likelihood, (B,).

        All images get the same random numbers.
        """
        bounds = []
        with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
            for image in images:
                torch.manual_seed(self.options.seed)
                bounds.append(net(image[None], samples=self.options.samples).importance())
        return torch.cat(bounds).double().cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Return a hash of the background model's weights, or an empty dict without this model."""
        if self.background is None:
            return {}
        return {"background": fingerprint(self.background[0])}

    def restore(self, tensors: dict[str, Tensor]) -> Self:
        """Check that the background model has the same weights as when the detector was fitted.

        Raises:
            UserError: the weights differ.
        """
        if self.background is not None:
            if not torch.equal(tensors["background"], fingerprint(self.background[0])):
                raise UserError(
                    f"the background model '{self.options.background}' has other weights than when "
                    "the detector was fitted. Run the fit again."
                )
        return self


def images_of(model: Autoencoder) -> ImagesOfModel:
    """Return the format of images that a model expects, such as binary pixels.

    Only exported models with a likelihood store their format. For all other models, the format has
    the defaults of `ImagesOfModel`.
    """
    folder = find_likelihood_export(Path(model.path)) if model.path else None
    return ImagesOfModel() if folder is None else read_images_file(folder)


def fingerprint(net: Any) -> Tensor:
    """Return a hash of the weights as bytes, (32,), uint8."""
    return torch.tensor(list(bytes.fromhex(hash_of_weights(net))), dtype=torch.uint8)


METHODS: dict[str, Callable[[ImageOptions], ImageMethod]] = {
    "reconstruction": lambda options: Reconstruction(options.distance),
    "latent_density": lambda options: PooledDensity(options.density, options.seed),
    "positions": lambda options: Positions(),
    "likelihood": Likelihood,
}
LEARN_NOTHING = ("reconstruction", "likelihood")


def pooled(latents: Tensor) -> Tensor:
    """Return mean and standard deviation of each channel over the positions, (N, 2 d)."""
    flat = latents.float().flatten(2)
    return torch.cat([flat.mean(dim=2), flat.std(dim=2, correction=0)], dim=1)


def neighbourhoods(latents: Tensor) -> Tensor:
    """Return each position's latent, concatenated with its eight neighbours, (N, 9 d, h, w)."""
    padded = F.pad(latents.float(), (1, 1, 1, 1), mode="replicate")
    return F.unfold(padded, 3).unflatten(2, latents.shape[2:])


def enlarged(maps: Tensor, images: Tensor) -> Tensor:
    """Return maps (B, h, w) at the size of the images, (B, H, W)."""
    size = images.shape[2:]
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
