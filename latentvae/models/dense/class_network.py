"""A variational autoencoder whose latents are a class and a vector (M2).

    images -> q(y|x)                       images, class -> q(z|x,y) -> z
    class, z -> p(x|y,z)                   p(y) is uniform, p(z) is N(0, I)

The paper on model M2 is arXiv:1406.5298 (Kingma et al., 2014). The lower bound of ln p(x, y) is

    L(x, y) = E_q(z|x,y) [ln p(x|y,z)] + ln p(y) - KL(q(z|x,y) || p(z))           (equation 6)

and the lower bound of ln p(x) of an image without a label, summed over all classes, is

    U(x) = sum_y q(y|x) (L(x, y) - ln q(y|x))                                     (equation 7)

Symbols: `B` images, `C H W` their shape, `K` classes, `U` latent units, `P` pairs of image and
class, `M` maps of pixel parameters.
"""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.errors import UserError
from latentvae.likelihoods import PixelDistribution, pixel_distribution
from latentvae.models.bound import Bound, check_images
from latentvae.models.dense.gaussians import Gaussian
from latentvae.models.dense.trunks import ACTIVATIONS, DenseDecoder, DenseEncoder, mlp


class ClassVAE(ModelMixin, ConfigMixin):
    """Model M2 (arXiv:1406.5298): a VAE with two groups of latents, the class y and the vector z.

        net = ClassVAE(num_classes=10)
        bound = net(images)                        # parts of U(x), with drawn classes
        chances = net.logits(images).softmax(-1)   # (B, 10)

    Args:
        image_channels, image_height, image_width: shape of the images.
        num_classes: number of classes K.
        class_names: names of the classes, or None.
        latent_units: number of latent units U.
        hidden_units: width of the dense layers.
        hidden_layers: number of dense layers in each of the networks q(y|x), q(z|x,y) and p(x|y,z).
        activation: "tanh", "elu" or "silu".
        likelihood: distribution of the pixels, see `likelihoods.PIXEL_DISTRIBUTIONS`.
        pixels: distribution object that replaces `likelihood`. The config does not store this
            object.
    """

    ignore_for_config = ("pixels",)
    num_groups = 2
    outer_layers: tuple[str, ...] = (
        *("classifier.0.layers.0", "classifier.1"),
        *("from_image", "decoder.last"),
    )

    @register_to_config
    def __init__(
        self,
        image_channels: int = 1,
        image_height: int = 28,
        image_width: int = 28,
        num_classes: int = 10,
        class_names: list[str] | None = None,
        latent_units: int = 50,
        hidden_units: int = 500,
        hidden_layers: int = 1,
        activation: str = "silu",
        likelihood: str = "bernoulli",
        pixels: PixelDistribution | None = None,
    ) -> None:
        super().__init__()
        self.pixels = pixels or pixel_distribution(likelihood)
        self.num_classes, self.latent_units = num_classes, latent_units
        self.image_shape = (image_channels, image_height, image_width)
        hidden = [hidden_units] * hidden_layers

        # q(y|x)
        self.classifier = nn.Sequential(
            DenseEncoder(self.image_shape, hidden, activation), nn.Linear(hidden_units, num_classes)
        )

        # q(z|x,y): the first layer adds a part for x and a part for y. The part for x is the more
        # expensive one. It is computed once per image, not once per class.
        self.from_image = nn.Linear(math.prod(self.image_shape), hidden_units)
        self.from_class = nn.Embedding(num_classes, hidden_units)
        self.moments = nn.Sequential(
            ACTIVATIONS[activation](),
            *mlp(hidden, activation),
            nn.Linear(hidden_units, 2 * latent_units),
        )

        # p(x|y,z)
        maps = (self.pixels.num_maps(image_channels), image_height, image_width)
        self.decoder = DenseDecoder(latent_units + num_classes, hidden, maps, activation)

    # bounds

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of q(y|x) for B images and K classes, (B, K), float32."""
        return self.classifier(images).float()

    def pixel_parameters(self, z: Tensor, classes: Tensor) -> Tensor:
        """Return the parameters of p(x|y,z) for P pairs of z and class y.

        The result has M maps of parameters, (P, M, H, W).
        """
        return self.decoder(torch.cat([z, self._one_hot(classes).to(z.dtype)], dim=-1))

    def _one_hot(self, classes: Tensor) -> Tensor:
        return F.one_hot(classes, self.num_classes).float()

    def posterior(self, images: Tensor, rows: Tensor, classes: Tensor) -> Gaussian:
        """Return the Gaussian q(z|x,y) of U units for P pairs of an image x and a class y.

        Args:
            images: (B, C, H, W).
            rows: index of the image of each pair, (P,), int64.
            classes: class of each pair, (P,), int64.
        """
        first = self.from_image((images.flatten(1) + 1.0) / 2.0)
        return Gaussian.from_moments(self.moments(first[rows] + self.from_class(classes)))

    def pair_bound(self, images: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        """Return the lower bound of ln p(x, y) for P pairs of an image x and a class y, (P,).

        The bound is in nats, and is estimated with one drawn z for each pair.

        Args:
            images: (B, C, H, W).
            rows: index of the image of each pair, (P,), int64.
            classes: class of each pair, (P,), int64.
        """
        posterior = self.posterior(images, rows, classes)
        parameters = self.pixel_parameters(posterior.sample(), classes)
        kl = posterior.kl(Gaussian.standard(posterior.mean)).sum(-1)
        return self.pixels.log_prob(images[rows], parameters) - math.log(self.num_classes) - kl

    def labelled_bound(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return the lower bound of ln p(x, y) of images x with known classes y, (B,), in nats."""
        return self.pair_bound(images, torch.arange(len(images), device=images.device), classes)

    def unlabelled_bound(self, images: Tensor, *, least: float = 0.0) -> Tensor:
        """Return the lower bound of ln p(x) of images without labels, in nats, (B,).

        Args:
            images: (B, C, H, W).
            least: smallest probability q(y|x) of a class that is used, from 0 to one divided by the
                number of classes. Classes with a smaller q(y|x) are left out, and q is normalised
                over the used classes. The sum over the used classes is still a lower bound of
                ln p(x). If the classifier is sure of most images, few classes are used, and the
                computation is much faster than with all classes.
        """
        log_q = torch.log_softmax(self.logits(images), dim=-1)
        kept = log_q.detach().exp() >= least
        log_q = torch.log_softmax(log_q.masked_fill(~kept, -torch.inf), dim=-1)

        rows, classes = kept.nonzero(as_tuple=True)
        log_q = log_q[rows, classes]
        parts = log_q.exp() * (self.pair_bound(images, rows, classes) - log_q)
        return parts.new_zeros(len(images)).index_add(0, rows, parts)

    def forward(self, images: Tensor, *, samples: int = 1, detach_posterior: bool = False) -> Bound:
        """Draw classes and latents, and return the parts of the bound. See `LikelihoodNet`.

        Each call draws a class for each sample of each image. The expected value of `Bound.elbo` is
        that of `unlabelled_bound` with `least` 0.

        Raises:
            UserError: `detach_posterior` is set, or the images have a wrong shape.
        """
        check_images(images, self.image_shape)
        if detach_posterior:
            raise UserError(
                "bound dreg does not support a class as a latent. Use bound elbo instead."
            )

        # the class y, and the exact KL of q(y|x) to the uniform prior
        log_q = torch.log_softmax(self.logits(images), dim=-1)
        surprise = log_q + math.log(self.num_classes)
        class_kl = (log_q.exp() * surprise).sum(-1)
        classes = torch.multinomial(log_q.exp(), samples, replacement=True).T  # (S, B)
        class_ratio = surprise.T.gather(0, classes)

        # the vector z
        rows = torch.arange(len(images), device=images.device).repeat(samples)
        posterior = self.posterior(images, rows, classes.flatten())
        prior, z = Gaussian.standard(posterior.mean), posterior.sample()
        units = posterior.kl(prior)
        ratio = posterior.log_prob(z) - prior.log_prob(z)
        log_likelihood = self.pixels.log_prob(images, self.pixel_parameters(z, classes.flatten()))

        shape = (samples, len(images))
        return Bound(
            log_likelihood=log_likelihood.view(shape),
            kl=torch.stack([class_kl.expand(shape), units.sum(-1).view(shape)]),
            log_ratio=torch.stack([class_ratio, ratio.view(shape)]),
            unit_kl=units.unflatten(0, shape).mean(0),
        )

    # uses other than the bound

    @property
    def group_sizes(self) -> list[int]:
        """Number of latent values of the class y, then of the vector z."""
        return [1, self.latent_units]

    def posterior_means(self, images: Tensor) -> None:
        """Return None, because the mean of a class has no meaning."""

    def posterior_moments(self, images: Tensor) -> None:
        """Return None, because the posterior of a class is not Gaussian."""

    def encode_vector(
        self, images: Tensor, *, draw: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the most probable class (K one-hot values) and z (U values), joined: (B, K + U).

        With `draw`, z is drawn, but the class is still the most probable one. See
        `LikelihoodNet.encode_vector`.
        """
        classes = self.logits(images).argmax(-1)
        rows = torch.arange(len(images), device=images.device)
        posterior = self.posterior(images, rows, classes)
        z = posterior.mean
        if draw:
            noise = torch.randn(z.shape, generator=generator, device=z.device)
            z = z + (0.5 * posterior.logvar).exp() * noise
        return torch.cat([self._one_hot(classes), z], dim=1)

    def decode_vector(self, vector: Tensor) -> Tensor:
        """Decode vectors from `encode_vector` to pixel means (B, C, H, W) in [-1, 1]."""
        one_hot, z = vector.split([self.num_classes, self.latent_units], dim=1)
        return self.pixels.mean(self.decoder(torch.cat([z, one_hot], dim=1)))

    def encode(self, images: Tensor) -> Tensor:
        """Return the most probable class (K one-hot values) and z's mean (U values), (B, K + U)."""
        return self.encode_vector(images)

    def decode(self, vector: Tensor) -> Tensor:
        """Decode vectors from `encode` to pixel means (B, C, H, W) in [-1, 1]."""
        return self.decode_vector(vector)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstruct images (B, C, H, W) from their most probable class and the mean of z."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def sample(
        self,
        num: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        mean: bool = True,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Draw images of the given classes (num,), or of random classes. See `LikelihoodNet`."""
        device = self.device
        if classes is None:
            classes = torch.randint(0, self.num_classes, (num,), generator=generator, device=device)
        z = torch.randn(num, self.latent_units, generator=generator, device=device)
        parameters = self.pixel_parameters(temperature * z, classes)
        if mean:
            return self.pixels.mean(parameters)
        return self.pixels.sample(parameters, generator=generator)

    def start_at(self, mean_image: Tensor) -> None:
        """Set the last layer's biases so that the output is `mean_image` (C, H, W), if possible.

        If the likelihood offers no such biases, nothing changes.
        """
        if (bias := self.pixels.start_bias(mean_image)) is not None:
            self.decoder.start_at(bias)
