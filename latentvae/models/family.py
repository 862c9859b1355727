"""The contract: all that the package asks about a kind of network.

    family = family_of(net)  # models.table
    z = family.encode(net, images)
    codes = family.codes(net)  # None where there are none

`Family` answers for any network that has diffusers' `encode` and `decode`. A kind that differs is a
subclass and overrides what is another; what can be trained is a `models.trainable.TrainableFamily`.

`B` batch, `C` image channels, `H W` pixels, `d` latent channels, `h w` latent positions, `K` codes,
`L` levels of codes, `D` code width, `f` pixels on a side of one latent position.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn

from latentvae.bottlenecks import Quantizer
from latentvae.errors import UserError
from latentvae.likelihoods import LogitLaplace
from latentvae.models.network import Computation, Network
from latentvae.models.normalization import LatentNormalization, from_config
from latentvae.models.tiling import Tiling, read_tiling

PROBE = 192  # pixels a side of the image that tells a shape; no fixed size is this


@dataclass(frozen=True)
class LatentShape:
    """Of an autoencoder's latents.

    Args:
        f: pixels on a side of one latent position.
        channels: d.
        fixed_size: pixels on a side of the only images the network makes; None where it follows
            those it is given.
    """

    f: int
    channels: int
    fixed_size: int | None = None


@dataclass(frozen=True)
class Codes:
    """Of a tokenizer.

    Args:
        kind: type of the quantiser, see `bottlenecks.QUANTIZERS`.
        number: K, of each level.
        levels: L, codes for each position; more than 1 of a residual quantiser.
        codebooks: one, which levels share, or one for each level.
        channels: D.
    """

    kind: str
    number: int
    levels: int
    codebooks: int
    channels: int


@dataclass(frozen=True)
class Usage:
    """How an exported network is used, for its model card.

    Args:
        snippet: Python that encodes and decodes with `vae`, a format string of `channels`, `kind`
            (", grey," and such) and `latents` (an expression that normalises `z`).
        pipelines: a sentence on the pipelines that take it, with a space behind; may be empty.
        package: where its class is imported from.
    """

    snippet: str
    pipelines: str = ""
    package: str = "diffusers"


class Family:
    """One kind of network; here any, as far as its config and its outputs tell.

    Attributes:
        has_posterior: whether `encode` gives a distribution; None where only its output tells.
        scaled_by: what its pipelines' `scaling_factor` divides latents by, their standard deviation
            or their root mean square.
    """

    has_posterior: ClassVar[bool | None] = None
    scaled_by: ClassVar[Literal["std", "rms"]] = "std"

    # Images and latents.

    def encode(
        self,
        net: Network,
        images: Tensor,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        computation: Computation | None = None,
    ) -> Tensor:
        """Latents (B, d, h, w), see `calls.encode`."""
        output = self._encoded(net, images, computation)
        posterior = read_posterior(output)
        if posterior is not None and sample:
            return posterior.sample(generator)
        return _mean_of(output)  # a Gaussian's mode is its mean

    def posterior(
        self, net: Network, images: Tensor, *, computation: Computation | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance (B, d, h, w), see `calls.encode_posterior`."""
        output = self._encoded(net, images, computation)
        posterior = read_posterior(output)
        return _mean_of(output), None if posterior is None else posterior.logvar

    def decode(self, net: Network, z: Tensor, *, computation: Computation | None = None) -> Tensor:
        """Images (B, C, f h, f w), see `calls.decode`."""
        output = net.decode(z) if computation is None else computation.decode(net, z)
        return self.from_own_range(net, output.sample)

    def _encoded(self, net: Network, images: Tensor, computation: Computation | None) -> Any:
        images = (images + 1) / 2 if self.takes_unit_range(net) else images
        return net.encode(images) if computation is None else computation.encode(net, images)

    def from_own_range(self, net: Network, images: Tensor) -> Tensor:
        """Images as the network gives them, in about [-1, 1]."""
        return images * 2 - 1 if self.takes_unit_range(net) else images

    def takes_unit_range(self, net: Network) -> bool:
        """Whether its pixels are in [0, 1], in place of [-1, 1]."""
        return False

    def image_channels(self, net: Network) -> int:
        """C of the images that it takes."""
        return net.config.get("in_channels", net.config.get("num_channels", 3))

    @torch.no_grad()
    def latent_shape(self, net: Network) -> LatentShape:
        """By encoding and decoding a grey image.

        Raises:
            UserError: the network does not take images.
        """
        channels = self.image_channels(net)
        images = torch.zeros(1, channels, PROBE, PROBE, device=net.device, dtype=net.dtype)
        try:
            z = self.encode(net, images)
            recon = self.decode(net, z)
            f, fixed = recon.shape[3] // z.shape[3], recon.shape[3] != PROBE
        except (AttributeError, TypeError, RuntimeError, ValueError, IndexError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{type(net).__name__} does not encode and decode images as diffusers' image "
                f"autoencoders do ({type(error).__name__}: {reason})"
            ) from error
        return LatentShape(f, z.shape[1], recon.shape[3] if fixed else None)

    def side_multiple(self, net: Network) -> int:
        """What the sides of its images must be a multiple of; 1 where `encode` takes any."""
        return 1

    def normalization(self, net: Network) -> LatentNormalization:
        """How its pipelines bring latents to about unit variance."""
        return from_config(net.config)

    def tiling(self, net: Network, *, f: int) -> Tiling | None:
        """How it is told to decode in tiles; None where it cannot."""
        return read_tiling(net, f=f)

    # Its parts.

    def latent_side(self, net: Network) -> Iterator[nn.Module]:
        """The parts that make latents or tokens of images."""
        for name in ("encoder", "quant_conv", "quantize"):
            if (part := getattr(net, name, None)) is not None:
                yield part

    def latent_head(self, net: Network) -> nn.Module:
        """The part whose output is moments (B, 2 d, h, w), latents or features."""
        module: Any = net
        return getattr(module, "quant_conv", None) or module.encoder

    def decoder(self, net: Network) -> nn.Module:
        """The part that makes images."""
        module: Any = net
        return module.decoder

    def freeze_encoder(self, net: Network) -> None:
        """Nothing that makes latents will learn."""
        for part in self.latent_side(net):
            part.requires_grad_(False)

    def quantizer(self, net: Network) -> Quantizer | None:
        """The bottleneck whose codes are trained; None where there is none."""
        return None

    def likelihood(self, net: Network) -> LogitLaplace | None:
        """Of the pixels, where the decoder gives its parameters; None where it gives images."""
        return None

    # Codes, of a tokenizer.

    def codes(self, net: Network) -> Codes | None:
        """What it has of codes; None where it is no tokenizer."""
        return None

    def tokenize(self, net: Network, z: Tensor) -> Tensor:
        """Indices (B, h, w) or (B, L, h, w) of encoded images, see `calls.tokenize`."""
        _refuse_codes(net)

    def decode_indices(
        self, net: Network, indices: Tensor, *, computation: Computation | None = None
    ) -> Tensor:
        """Images of indices, see `calls.decode_indices`."""
        _refuse_codes(net)

    def decode_without_search(self, net: Network, indices: Tensor) -> Tensor:
        """The same, of the very codes: a decoder that searches for the nearest would return them
        to rounding."""
        _refuse_codes(net)

    # Export.

    def usage(self, net: Network) -> Usage | None:
        """For the model card of an export of this network; None where nothing exports it."""
        return None

    def original_options(self, net: Network) -> dict[str, Any] | None:
        """Options of the class of this network in the original code of arXiv:2012.09841 and
        arXiv:2112.10752, beside those of its shape; None where there is no such class."""
        return None


def read_posterior(output: Any) -> Any | None:
    """Of what `encode` gives; None where there is none."""
    return getattr(output, "latent_dist", None)


def _mean_of(output: Any) -> Tensor:
    posterior = read_posterior(output)
    if posterior is not None:
        return posterior.mean
    return output.latents if hasattr(output, "latents") else output.latent


def _refuse_codes(net: Network) -> NoReturn:
    raise UserError(f"a {type(net).__name__} is no tokenizer: it has no codes")
