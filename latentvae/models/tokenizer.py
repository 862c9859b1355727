"""Define the base class of tokenizers: encode images, quantise features, decode codes.

images (B, C, H, W) -> encoder -> quant_conv -> features (B, c, h, w) -> quantize -> z (B, D, h, w)
and indices -> post_quant_conv -> decoder -> recon (B, C, H, W)

`B` batch, `C` image channels, `c` feature channels, `D` code width, `h w` latent positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from latentvae.bottlenecks.table import rebuilt_quantizer
from latentvae.errors import UserError
from latentvae.likelihoods import LogitLaplace

LIKELIHOODS = {"logit_laplace": LogitLaplace}


@dataclass
class TokenOutput(BaseOutput):
    """Output of `tokenize`: the code indices of images.

    Attributes:
        indices: (B, h, w), or (B, L, h, w) with L codes per position. The values are int64 in
            0..K - 1 for K codes. Positions go row by row from the top left.
    """

    indices: Tensor = None  # type: ignore[assignment]


class Tokenizer(ModelMixin, ConfigMixin):
    """A network with a quantiser of this package, and with diffusers' methods and file format.

    A subclass of `Tokenizer` creates the attributes below in its constructor.

    Attributes:
        encoder: turns images (B, C, H, W) into maps (B, *, h, w) of any number of channels.
        quant_conv: turns the encoder's maps into the c features of the quantiser, (B, c, h, w).
        quantize: a `bottlenecks.Quantizer`.
        post_quant_conv: turns the D numbers of each code, (B, D, h, w), into the decoder's input.
        decoder: returns images, or the parameters of `likelihood`.
        likelihood: the likelihood of pixels, or None.
    """

    _supports_gradient_checkpointing = True
    encoder: Any
    quant_conv: Any
    quantize: Any
    post_quant_conv: Any
    decoder: Any
    likelihood: LogitLaplace | None

    def requantize(self, quantizer: Mapping[str, Any]) -> None:
        """Replace the quantiser by a quantiser of the same shape with other training options.

        The codes, train or eval mode, dtype and device do not change.
        """
        rebuilt: nn.Module = rebuilt_quantizer(self.quantize, quantizer)
        self.quantize = rebuilt.to(self.device, self.dtype)
        self.register_to_config(quantizer=dict(quantizer))

    def encode(self, images: Tensor, return_dict: bool = True) -> Any:
        """Encode images to features (B, c, h, w) before quantisation, as `VQModel` does."""
        features = self.quant_conv(self.encoder(images))
        return VQEncoderOutput(latents=features) if return_dict else (features,)

    def decode(
        self, latents: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> Any:
        """Quantise features (B, c, h, w) and decode the codes to images.

        With `force_not_quantize`, `latents` must already be codes z (B, D, h, w) of width D, and
        they are decoded without quantisation.
        """
        z = latents if force_not_quantize else self.quantize(latents).z
        sample = self.decode_parameters(z.to(self.dtype))
        if self.likelihood is not None:
            sample = self.likelihood.mean(sample)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_parameters(self, z: Tensor) -> Tensor:
        """Decode codes z of width D, (B, D, h, w), to images or to a likelihood's parameters."""
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> TokenOutput:
        """Return the code indices of images (B, C, H, W) in [-1, 1]."""
        return TokenOutput(indices=self.quantize(self.encode(images).latents).indices)

    @torch.no_grad()
    def decode_indices(self, indices: Tensor, return_dict: bool = True) -> Any:
        """Decode code indices to images. The indices are integers of any dtype.

        Raises:
            UserError: the indices are not integers in 0..K - 1 for K codes.
        """
        if indices.is_floating_point():
            raise UserError(f"indices must be integers (got {indices.dtype})")
        indices = indices.long()  # torch has no `aminmax` of uint16, and cannot embed uint8
        low, high = (int(value) for value in indices.aminmax())  # waits for the GPU
        if low < 0 or high >= self.quantize.num_codes:
            last = self.quantize.num_codes - 1
            raise UserError(f"indices must be in 0..{last} (got {low}..{high})")
        return self.decode(self.quantize.codes(indices), True, return_dict)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Encode, quantise and decode images. Return the reconstruction."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)
