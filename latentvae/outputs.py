"""What the networks return in training: flat `BaseOutput`s, whose docstrings are the contract.

They are `OrderedDict`s underneath, so DDP finds the tensors in them and Accelerate converts their
dtype; a plain dataclass passes both by, silently.

`B` batch, `C` image channels, `H W` image size, `d` latent channels, `h w` latent size, `K` codes,
`L` levels of codes.
"""

from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class AutoencoderOutput(BaseOutput):
    """One forward pass of an autoencoder. What a kind of bottleneck does not have is None.

    Attributes:
        recon: decoder output, (B, C, H, W), about [-1, 1] and not clamped; of a network with a
            likelihood of its own its parameters, (B, 2 C, H, W).
        z: the latent that was decoded, (B, d, h, w), float32.
        output_logvar: scalar log-variance of the output likelihood, natural logarithm; learned or
            fixed.
        mean: of the posterior, (B, d, h, w), float32.
        kl_per_channel: KL divergence from the posterior to the prior, (B, d), nats per image and
            channel (summed over positions), float32; of Gumbel-softmax (B, 1).
        features: what was quantised, (B, c, h, w).
        indices: of the codes, (B, h, w) or (B, L, h, w), int64.
        latent_losses: unweighted scalars by name, see `bottlenecks.Quantized.losses`.
        statistics: what a codebook learns from, see `bottlenecks.Quantized.statistics`.
    """

    # The defaults let `type(output)({...})` work, by which Accelerate rebuilds it in another dtype.
    recon: Tensor = None  # type: ignore[assignment]
    z: Tensor = None  # type: ignore[assignment]
    output_logvar: Tensor = None  # type: ignore[assignment]
    mean: Tensor | None = None
    kl_per_channel: Tensor | None = None
    features: Tensor | None = None
    indices: Tensor | None = None
    latent_losses: dict[str, Tensor] | None = None
    statistics: dict[str, Tensor] | None = None

    @property
    def kl(self) -> Tensor | None:
        """(B,), nats per image."""
        return None if self.kl_per_channel is None else self.kl_per_channel.sum(dim=1)
