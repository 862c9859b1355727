"""Define `Family`: the methods that all code of latentvae calls to use one kind of network.

    family = family_of(net)  # models.table
    z = family.encode(net, images)
    codes = family.codes(net)  # None for a network without codes

`Family` fits any network that has diffusers' `encode` and `decode`. A kind of network that works in
another way has a subclass of `Family`, which overrides the methods that differ. A kind of network
that can be trained has a subclass of `models.trainable.TrainableFamily`.

`B` batch, `C` image channels, `d` latent channels, `h w` latent positions, `K` codes, `L` levels
of codes, `D` code width, `f` downsampling factor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn

from latentvae.bottlenecks import Quantizer
from latentvae.errors import UserError, first_line
from latentvae.likelihoods import LogitLaplace
from latentvae.models.levels import split_levels
from latentvae.models.network import Computation, Network
from latentvae.models.normalization import LatentNormalization, from_config
from latentvae.models.tiling import Tiling, read_tiling

# Side in pixels of the image that is encoded to measure the latent's shape. No class of diffusers
# is limited to images of this size.
PROBE = 192


@dataclass(frozen=True)
class LatentShape:
    """The shape of an autoencoder's latents.

    Args:
        f: downsampling factor. A latent position stands for f x f pixels.
        channels: number of latent channels d.
        fixed_size: side of the images in pixels, if the network can only make images of one size.
            Otherwise None.
    """

    f: int
    channels: int
    fixed_size: int | None = None


@dataclass(frozen=True)
class Codes:
    """Description of a tokenizer's codes: their quantiser, numbers and width.

    Args:
        kind: type of the quantiser, see `bottlenecks.QUANTIZERS`.
        number: number of codes K of each codebook.
        levels: number of codes per latent position L, above 1 for a residual quantiser. A network
            with three maps of codes has 1 + 4 + 16 codes per position of the coarsest map, see
            `models.levels`.
        codebooks: number of codebooks, which is 1 if all levels share a codebook.
        channels: code width D, the number of values in a code.
        maps: number of maps of codes. If there are several maps, each map has its own codebook and
            twice the height and width of the map before it.
    """

    kind: str
    number: int
    levels: int
    codebooks: int
    channels: int
    maps: int = 1

    def by_codebook(self, indices: Tensor) -> list[Tensor]:
        """Split indices (B, L, h, w) into one tensor (B, h_l, w_l) for each codebook l.

        L is the number of codes per latent position. If there is only one codebook, the indices can
        have any shape, and are returned unchanged in a list.
        """
        if self.maps > 1:
            return split_levels(indices, self.map_sizes(indices.shape[-2], indices.shape[-1]))
        return [indices] if self.codebooks == 1 else list(indices.unbind(1))

    def map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the height and width of each map of codes, given those of the coarsest map."""
        return [(2**i * height, 2**i * width) for i in range(self.maps)]


@dataclass(frozen=True)
class Usage:
    """Text of a model card that shows how to use an exported network.

    Args:
        snippet: Python code that encodes and decodes with `vae`. The snippet is a format string
            with the fields `channels`, `kind` (such as ", grey,") and `latents` (code that
            normalises `z`).
        pipelines: a sentence about the pipelines that accept the network, with a space at its end,
            or empty.
        package: the package from which the network's class is imported.
    """

    snippet: str
    pipelines: str = ""
    package: str = "diffusers"


class Family:
    """Methods that work on one kind of network.

    This base class relies only on a network's config and outputs.

    Attributes:
        has_posterior: whether the network's own `encode` returns a distribution. None if this is
            not known before a call of `encode`.
        scaled_by: how pipelines define `scaling_factor`: as 1 / standard deviation ("std") or
            1 / root mean square ("rms") of the latents.
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
        """Encode images to latents (B, d, h, w), see `calls.encode`."""
        output = self._encoded(net, images, computation)
        posterior = read_posterior(output)
        if posterior is not None and sample:
            return posterior.sample(generator)
        return _mean_of(output)  # a Gaussian's mode is its mean

    def posterior(
        self, net: Network, images: Tensor, *, computation: Computation | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the posterior's mean and log-variance, see `calls.encode_posterior`."""
        output = self._encoded(net, images, computation)
        posterior = read_posterior(output)
        return _mean_of(output), None if posterior is None else posterior.logvar

    def decode(self, net: Network, z: Tensor, *, computation: Computation | None = None) -> Tensor:
        """Decode latents (B, d, h, w) to images, see `calls.decode`."""
        output = net.decode(z) if computation is None else computation.decode(net, z)
        return self.from_own_range(net, output.sample)

    def _encoded(self, net: Network, images: Tensor, computation: Computation | None) -> Any:
        images = (images + 1) / 2 if self.takes_unit_range(net) else images
        return net.encode(images) if computation is None else computation.encode(net, images)

    def from_own_range(self, net: Network, images: Tensor) -> Tensor:
        """Convert images from the network's own value range to about [-1, 1]."""
        return images * 2 - 1 if self.takes_unit_range(net) else images

    def takes_unit_range(self, net: Network) -> bool:
        """Return whether the network's pixels are in [0, 1] instead of [-1, 1]."""
        return False

    def image_channels(self, net: Network) -> int:
        """Return C, the number of channels of the images that the network takes."""
        return net.config.get("in_channels", net.config.get("num_channels", 3))

    @torch.no_grad()
    def latent_shape(self, net: Network) -> LatentShape:
        """Return the shape of the latents, measured by encoding and decoding a grey image.

        Raises:
            UserError: the network does not encode and decode images.
        """
        channels = self.image_channels(net)
        images = torch.zeros(1, channels, PROBE, PROBE, device=net.device, dtype=net.dtype)

        try:
            z = self.encode(net, images)
            recon = self.decode(net, z)
            f, fixed = recon.shape[3] // z.shape[3], recon.shape[3] != PROBE
        except (AttributeError, TypeError, RuntimeError, ValueError, IndexError) as error:
            reason = first_line(error)
            raise UserError(
                f"{type(net).__name__} does not encode and decode images as diffusers' image "
                f"autoencoders do ({type(error).__name__}: {reason})"
            ) from error

        return LatentShape(f, z.shape[1], recon.shape[3] if fixed else None)

    def side_multiple(self, net: Network) -> int:
        """Return the number that must divide the height and width of images. 1 allows any size."""
        return 1

    def normalization(self, net: Network) -> LatentNormalization:
        """Return the normalisation with which pipelines give the latents about unit variance."""
        return from_config(net.config)

    def tiling(self, net: Network, *, f: int) -> Tiling | None:
        """Return the settings of tiled decoding, or None if the network cannot decode in tiles."""
        return read_tiling(net, f=f)

    # Parts of the network.

    def latent_side(self, net: Network) -> Iterator[nn.Module]:
        """Yield the modules that turn images into latents or tokens."""
        for name in ("encoder", "quant_conv", "quantize"):
            if (part := getattr(net, name, None)) is not None:
                yield part

    def latent_head(self, net: Network) -> nn.Module:
        """Return the encoder's last module, which returns moments, latents or features."""
        module: Any = net
        return getattr(module, "quant_conv", None) or module.encoder

    def decoder(self, net: Network) -> nn.Module:
        """Return the module that turns latents into images."""
        module: Any = net
        return module.decoder

    def freeze_encoder(self, net: Network) -> None:
        """Freeze every module that turns images into latents or tokens."""
        for part in self.latent_side(net):
            part.requires_grad_(False)

    def quantizers(self, net: Network) -> tuple[Quantizer, ...]:
        """Return the quantisers of a trainable tokenizer, one for each map of codes.

        The quantiser of the coarsest map is the first. The result is empty for a network that is
        not trained as a tokenizer.
        """
        return ()

    def likelihood(self, net: Network) -> LogitLaplace | None:
        """Return the likelihood of pixels whose parameters the decoder predicts.

        Return None if the decoder returns images instead of parameters.
        """
        return None

    # Codes of a tokenizer.

    def codes(self, net: Network) -> Codes | None:
        """Return the description of a tokenizer's codes, or None for other networks."""
        return None

    def tokenize(self, net: Network, z: Tensor) -> Tensor:
        """Quantise latents and return the indices of their codes, see `calls.tokenize`."""
        _refuse_codes(net)

    def decode_indices(
        self, net: Network, indices: Tensor, *, computation: Computation | None = None
    ) -> Tensor:
        """Decode code indices to images, see `calls.decode_indices`."""
        _refuse_codes(net)

    def decode_without_search(self, net: Network, indices: Tensor) -> Tensor:
        """Decode code indices to images without a search for the nearest code.

        The method `decode_indices` of some networks quantises the given codes again. Rounding in
        this second quantisation can change the codes a little.
        """
        _refuse_codes(net)

    # Export.

    def usage(self, net: Network) -> Usage | None:
        """Return the model card's text on how to use an exported network of this kind.

        Return None if this kind of network cannot be exported.
        """
        return None

    def original_options(self, net: Network) -> dict[str, Any] | None:
        """Return options of the matching class in the original code of VQGAN and latent diffusion.

        Options that describe the network's shape, such as its widths, are left out. The papers on
        VQGAN and latent diffusion are arXiv:2012.09841 and arXiv:2112.10752. The result is None if
        the original code has no matching class.
        """
        return None


def read_posterior(output: Any) -> Any | None:
    """Return the posterior in an output of `encode`, or None if the output has no posterior."""
    return getattr(output, "latent_dist", None)


def _mean_of(output: Any) -> Tensor:
    posterior = read_posterior(output)
    if posterior is not None:
        return posterior.mean
    return output.latents if hasattr(output, "latents") else output.latent


def _refuse_codes(net: Network) -> NoReturn:
    raise UserError(f"A {type(net).__name__} is no tokenizer: it has no codes.")
