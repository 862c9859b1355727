"""Let other code, such as `latentvae.load`, use networks with a likelihood as autoencoders.

In this module, the latent of an image is one vector of all values that the decoder reads,
(B, d, 1, 1). The groups of latents of a hierarchical VAE are flattened and joined, the coarsest
group first.

`B` batch, `d` latent values of an image.
"""

from typing import Any

import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.models.family import Family, LatentShape
from latentvae.models.network import Computation, Network


class LikelihoodFamily(Family):
    """Methods for the networks of `models.likelihood_models`, which take only one image size."""

    def encode(
        self,
        net: Network,
        images: Tensor,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        computation: Computation | None = None,
    ) -> Tensor:
        module: Any = net
        # A network for binary images gets only black and white pixels.
        images = module.pixels.rounded(images)
        return module.encode_vector(images, draw=sample, generator=generator)[:, :, None, None]

    def posterior(
        self, net: Network, images: Tensor, *, computation: Computation | None = None
    ) -> tuple[Tensor, Tensor | None]:
        module: Any = net
        moments = module.posterior_moments(module.pixels.rounded(images))
        if moments is None:
            return self.encode(net, images), None
        mean, logvar = (values[:, :, None, None] for values in moments)
        return mean, logvar

    def decode(self, net: Network, z: Tensor, *, computation: Computation | None = None) -> Tensor:
        module: Any = net
        return module.decode_vector(z.flatten(1))

    def image_channels(self, net: Network) -> int:
        return net.config["image_channels"]

    @torch.no_grad()
    def latent_shape(self, net: Network) -> LatentShape:
        module: Any = net
        channels, height, width = module.image_shape
        if height != width:
            raise UserError(
                f"a VAE for images of {height} x {width} can be measured and sampled, but it "
                "cannot be used as an autoencoder, because its images are not square."
            )
        images = torch.zeros(1, channels, height, width, device=net.device, dtype=net.dtype)
        return LatentShape(height, self.encode(net, images).shape[1], height)
