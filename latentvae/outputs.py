"""What the networks return in training: flat `BaseOutput`s, whose docstrings are the contract.

They are `OrderedDict`s underneath, so DDP finds the tensors in them and Accelerate converts their
dtype; a plain dataclass passes both by, silently.

`B` batch, `C` image channels, `H W` image size, `d` latent channels, `h w` latent size.
"""

from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class AutoencoderOutput(BaseOutput):
    """One forward pass of an autoencoder with a Gaussian posterior.

    Attributes:
        recon: decoder output, (B, C, H, W), about [-1, 1] and not clamped.
        z: the latent that was decoded, (B, d, h, w), float32.
        mean: of the posterior, (B, d, h, w), float32.
        kl_per_channel: KL divergence from the posterior to N(0, I), (B, d), nats per image and
            channel (summed over positions), float32.
        output_logvar: scalar log-variance of the output likelihood, natural logarithm; learned or
            fixed.
    """

    # The defaults let `type(output)({...})` work, by which Accelerate rebuilds it in another dtype.
    recon: Tensor = None  # type: ignore[assignment]
    z: Tensor = None  # type: ignore[assignment]
    mean: Tensor = None  # type: ignore[assignment]
    kl_per_channel: Tensor = None  # type: ignore[assignment]
    output_logvar: Tensor = None  # type: ignore[assignment]

    @property
    def kl(self) -> Tensor:
        """(B,), nats per image."""
        return self.kl_per_channel.sum(dim=1)
