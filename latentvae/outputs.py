"""Define the classes of outputs that every `models.wrapper.TrainingWrapper` must return.

A `BaseOutput` is an `OrderedDict`. DistributedDataParallel and Accelerate therefore find every
tensor in a `BaseOutput`, also inside a tuple of outputs. Accelerate would silently skip the tensors
in objects of other classes, such as plain dataclasses.

Symbols: `B` batch size, `C` image channels, `H W` image size, `d` latent channels, `h w` latent
size, `K` codes, `L` levels of codes.
"""

from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor

# The default of every field is None, which lets `type(output)({...})` work. Accelerate rebuilds an
# output in another dtype that way.


@dataclass
class Latent(BaseOutput):
    """One latent of a network, with its KL or codes.

    A field is None if the kind of bottleneck does not have this value.

    Attributes:
        z: what the decoder reads, (B, d, h, w), float32.
        kl: KL divergence from the posterior to the prior, (B,), in nats per image, float32.
        kl_per_channel: the KL divergence of each channel, (B, d), in nats per image and channel.
            For a KL over tokens (Gumbel-softmax), the tensor has one channel, (B, 1).
        mean: mean of the posterior, (B, d, h, w), float32. If a continuous latent has no posterior,
            the mean is z.
        indices: the codes, (B, h, w), or (B, L, h, w) for L levels of codes, int64.
        features: the features before quantisation, (B, c, h, w) with c channels.
        losses: the bottleneck's losses by name, unweighted scalars, see
            `bottlenecks.Quantized.losses`.
        statistics: the tensors that a codebook learns from, see `bottlenecks.Quantized.statistics`.
    """

    z: Tensor = None  # type: ignore[assignment]
    kl: Tensor | None = None
    kl_per_channel: Tensor | None = None
    mean: Tensor | None = None
    indices: Tensor | None = None
    features: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    statistics: dict[str, Tensor] | None = None

    @property
    def positions(self) -> int:
        """Number of latent positions of an image, h * w."""
        return self.z[0, 0].numel()

    @property
    def kl_elements(self) -> int:
        """Number of latent elements of an image over which the KL is summed.

        The number of elements is d * h * w, or h * w for a KL over tokens.
        """
        if self.kl_per_channel is None:
            return self.z[0].numel()
        return self.kl_per_channel.shape[1] * self.positions


@dataclass
class AutoencoderOutput(BaseOutput):
    """The output of one forward pass of an autoencoder.

    Attributes:
        recon: decoder output, (B, C, H, W), about [-1, 1] and not clamped. A network with its own
            likelihood returns the parameters of this likelihood, (B, 2 C, H, W).
        latents: every latent that the decoder read. Most networks have one latent, and VQ-VAE-2 has
            one for each level.
        output_logvar: scalar log-variance (natural logarithm) of the output likelihood, learned or
            fixed.
    """

    recon: Tensor = None  # type: ignore[assignment]
    latents: tuple[Latent, ...] = None  # type: ignore[assignment]
    output_logvar: Tensor = None  # type: ignore[assignment]

    @property
    def kl(self) -> Tensor | None:
        """Sum of the KLs of all latents, (B,), in nats per image. None if no latent has a KL."""
        kls = [latent.kl for latent in self.latents if latent.kl is not None]
        return sum(kls[1:], start=kls[0]) if kls else None

    @property
    def kl_elements(self) -> int:
        """Number of latent elements of an image over which `kl` is summed."""
        return sum(latent.kl_elements for latent in self.latents if latent.kl is not None)

    @property
    def latent_losses(self) -> dict[str, Tensor]:
        """Return a dict from the name of each loss on latents to its sum over all latents."""
        total: dict[str, Tensor] = {}
        for latent in self.latents:
            for name, value in (latent.losses or {}).items():
                total[name] = total[name] + value if name in total else value
        return total
