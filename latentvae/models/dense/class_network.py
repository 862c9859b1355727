"""A variational autoencoder with a class beside its latent vector (M2).

    images -> q(y|x)                       images, class -> q(z|x,y) -> z
    class, z -> p(x|y,z)                   p(y) is uniform, p(z) is N(0, I)

This is model M2 of Kingma et al. (arXiv:1406.5298). The bound of a pair (x, y) is

    L(x, y) = E_q(z|x,y) [ln p(x|y,z)] + ln p(y) - KL(q(z|x,y) || p(z))           (equation 6)

and an image without a label has the bound, summed over all classes,

    U(x) = sum_y q(y|x) (L(x, y) - ln q(y|x))                                     (equation 7)

Symbols: `B` images, `C H W` their shape, `K` classes, `U` latent units, `P` pairs of image and
class.
"""

import math

import torch
from torch import Tensor, nn

from latentvae.likelihoods import PixelDistribution
from latentvae.models.dense.gaussians import Gaussian
from latentvae.models.dense.trunks import ACTIVATIONS, DenseDecoder, DenseEncoder, mlp


class ClassVAE(nn.Module):
    """The three networks of M2, and its bounds.

    Args:
        image_shape: (C, H, W).
        num_classes: K.
        pixels: distribution of the images, given the decoder's output.
        latent_units: U.
        hidden_units: width of the dense layers.
        hidden_layers: number of dense layers in each of the networks.
        activation: "tanh", "elu" or "silu".
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        pixels: PixelDistribution,
        latent_units: int = 50,
        hidden_units: int = 500,
        hidden_layers: int = 1,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.pixels = pixels
        self.num_classes, self.latent_units = num_classes, latent_units
        channels, height, width = image_shape
        hidden = [hidden_units] * hidden_layers

        # q(y|x)
        self.classifier = nn.Sequential(
            DenseEncoder(image_shape, hidden, activation), nn.Linear(hidden_units, num_classes)
        )

        # q(z|x,y): the first layer is a sum, so that its large part is computed once per image
        self.from_image = nn.Linear(math.prod(image_shape), hidden_units)
        self.from_class = nn.Embedding(num_classes, hidden_units)
        self.moments = nn.Sequential(
            ACTIVATIONS[activation](),
            *mlp(hidden, activation),
            nn.Linear(hidden_units, 2 * latent_units),
        )

        # p(x|y,z)
        maps = (pixels.num_maps(channels), height, width)
        self.decoder = DenseDecoder(latent_units + num_classes, hidden, maps, activation)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of q(y|x), (B, K), float32."""
        return self.classifier(images).float()

    def decode(self, z: Tensor, classes: Tensor) -> Tensor:
        """Return the parameters of p(x|y,z), (P, M, H, W), for z (P, U) and classes (P,)."""
        one_hot = nn.functional.one_hot(classes, self.num_classes).to(z.dtype)
        return self.decoder(torch.cat([z, one_hot], dim=-1))

    def posterior(self, images: Tensor, rows: Tensor, classes: Tensor) -> Gaussian:
        """Return q(z|x,y), (P, U), of the pairs (images[rows], classes)."""
        first = self.from_image((images.flatten(1) + 1.0) / 2.0)
        return Gaussian.from_moments(self.moments(first[rows] + self.from_class(classes)))

    def pair_bound(self, images: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        """Return L(x, y) of pairs with one drawn z each, (P,), nats.

        Args:
            images: (B, C, H, W).
            rows: index of the image of each pair, (P,), int64.
            classes: class of each pair, (P,), int64.
        """
        posterior = self.posterior(images, rows, classes)
        parameters = self.decode(posterior.sample(), classes)
        kl = posterior.kl(Gaussian.standard(posterior.mean)).sum(-1)
        return self.pixels.log_prob(images[rows], parameters) - math.log(self.num_classes) - kl

    def labelled_bound(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return L(x, y) of images (B, C, H, W) and their classes (B,), in nats, (B,)."""
        return self.pair_bound(images, torch.arange(len(images), device=images.device), classes)

    def unlabelled_bound(self, images: Tensor, *, least: float = 0.0) -> Tensor:
        """Return U(x) of images (B, C, H, W), in nats, (B,).

        Args:
            images: the images.
            least: classes whose q(y|x) is below this value are left out, and q is normalised over
                the others. It is still a bound, with this narrower q, and takes much less time
                once the classifier is sure of most images. At most 1 / K.
        """
        log_q = torch.log_softmax(self.logits(images), dim=-1)
        kept = log_q.detach().exp() >= least
        log_q = torch.log_softmax(log_q.masked_fill(~kept, -torch.inf), dim=-1)

        rows, classes = kept.nonzero(as_tuple=True)
        log_q = log_q[rows, classes]
        parts = log_q.exp() * (self.pair_bound(images, rows, classes) - log_q)
        return parts.new_zeros(len(images)).index_add(0, rows, parts)
