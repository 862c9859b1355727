"""Networks whose reports are known: pixels as latents, and what can be wrong with them."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.autoencoder import Autoencoder


@dataclass(frozen=True)
class Fault:
    """What a `Pixels` does wrong.

    Args:
        offset: added to what is decoded.
        gain: multiplies the latents, undone when decoding.
        logvar: of the posterior.
        dead: latent channels that are 0.
        overflow: decode infinity for latents above this.
    """

    offset: float = 0.0
    gain: float = 1.0
    logvar: float = -20.0
    dead: tuple[int, ...] = ()
    overflow: float | None = None


class Pixels(ModelMixin, ConfigMixin):
    """The pixels of each 2 x 2 block as 12 latent channels: f 2, an exact copy."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        scaling_factor: float = 2.0,
        shift_factor: float | None = None,
        offset: float = 0.0,
        gain: float = 1.0,
        logvar: float = -20.0,
        dead: tuple[int, ...] = (),
        overflow: float | None = None,
    ) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(gain))

    def encode(self, images: Tensor) -> AutoencoderKLOutput:
        mean = F.pixel_unshuffle(images, 2) * self.factor
        mean[:, list(self.config["dead"])] = 0
        logvar = torch.full_like(mean, self.config["logvar"])
        return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1)))

    def decode(self, z: Tensor) -> DecoderOutput:
        limit = self.config["overflow"]
        if limit is not None and z.max() > limit:
            z = z * torch.inf
        return DecoderOutput(F.pixel_shuffle(z / self.factor, 2) + self.config["offset"])


def pixels(fault: Fault | None = None, *, scaling_factor: float = 2.0) -> Autoencoder:
    net = Pixels(scaling_factor=scaling_factor, **vars(fault or Fault()))
    return Autoencoder(net, name="pixels")
