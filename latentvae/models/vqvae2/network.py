"""VQ-VAE-2: a tokenizer whose levels of codes describe an image from coarse to fine.

The network follows the paper of VQ-VAE-2 (arXiv:1906.00446). With two levels (top and bottom in the
paper), the network computes:

    images (B, C, H, W) -> encoder -> features of each level -> quant_conv -> z (folded)
    top features -> quantize[0] -> top codes
    bottom features + condition(top codes) -> quantize[1] -> bottom codes
    all codes -> post_quant_conv -> (B, d, H/f_b, W/f_b) -> decoder -> recon (B, C, H, W)

`FoldLevels` folds the features of all levels into one tensor z. Each level has twice the height and
width of the level before it. The paper concatenates the bottom level's features with the decoded
top codes, and projects the result to the code width. `VQVAE2` projects the features and the decoded
codes separately and adds the results, which computes the same function as in the paper.

`B` batch, `C` image channels, `D` code width, `P` codes per position of the coarsest level, `h w`
positions of the coarsest level, `f` downsampling factor of the coarsest level, `f_b` of the bottom
level, `d` channels of the decoder's input.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from torch import Tensor, nn

from latentvae.bottlenecks import Quantized, build_quantizer
from latentvae.bottlenecks.table import rebuilt_quantizer
from latentvae.errors import UserError
from latentvae.models.levels import join_levels, split_levels
from latentvae.models.tokenizer import TokenOutput
from latentvae.models.vqvae2.blocks import Condition, Decoder, Encoder, Upsample

# The paper's codebooks (table 4).
_QUANTIZER = {"type": "vq", "num_codes": 512, "code_channels": 64, "ema_decay": 0.99}


class FoldLevels(nn.Module):
    """Fold the features of all levels into one tensor of the coarsest level's size.

    A level with s times the height and width of the coarsest level gives s * s times the channels.
    """

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Fold the features of all levels, coarsest first, to z (B, P D, h, w).

        The features of level l are (B, D, h_l, w_l) for codes of width D. P is the number of codes
        per position of the coarsest level.
        """
        return torch.cat([F.pixel_unshuffle(x, 2**i) for i, x in enumerate(features)], dim=1)


class VQVAE2(ModelMixin, ConfigMixin):
    """VQ-VAE-2 with diffusers' methods and file format.

        net = VQVAE2.from_pretrained(folder)
        indices = net.tokenize(images).indices  # (B, 5, H / 8, W / 8) with two levels
        top, bottom = net.maps(indices)  # (B, H / 8, W / 8) and (B, H / 4, W / 4)
        recon = net.decode_indices(indices).sample

    Args:
        block_out_channels: number of channels after each halving of the resolution. The
            downsampling factor of the coarsest level is 2 ** (number of halvings).
        code_levels: number of levels of codes. The feature maps after each of the last
            `code_levels` halvings are quantised.
        layers_per_block: number of residual blocks in each quantised level of the encoder, in the
            decoder, and in each `Condition` network.
        residual_channels: number of channels inside a residual block.
        latent_channels: number of channels of the decoder's input.
        quantizer: `type` "vq" and the arguments of `VectorQuantizer`. Each level has a quantiser
            with its own codes.
        sample_size: side of the training images in pixels.
        scaling_factor: 1 / std of the features, for diffusion models that train on these features.

    Raises:
        UserError: `code_levels` is below 1 or above the number of halvings of the resolution.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (64, 128, 128),
        code_levels: int = 2,
        layers_per_block: int = 2,
        residual_channels: int = 64,
        latent_channels: int = 128,
        quantizer: Mapping[str, Any] = _QUANTIZER,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        widths = tuple(block_out_channels)
        if not 1 <= code_levels <= len(widths):
            raise UserError(
                f"code_levels must be 1 to {len(widths)}, the number of widths in "
                f"block_out_channels (got {code_levels})"
            )
        shape = {"layers": layers_per_block, "inner": residual_channels}
        quantizers = [build_quantizer(**quantizer) for _ in range(code_levels)]
        D, own = quantizers[0].code_channels, widths[-code_levels:][::-1]  # coarsest first

        # Parts, in the order in which images pass through them
        self.encoder = Encoder(in_channels, widths, levels=code_levels, **shape)
        self.quant_conv = nn.ModuleList([nn.Conv2d(width, D, 1) for width in own])
        self.fold = FoldLevels()
        self.condition = nn.ModuleList([Condition(D, width, **shape) for width in own[1:]])
        self.quantize = nn.ModuleList(quantizers)
        self.post_quant_conv = nn.ModuleList(
            [Upsample(D, latent_channels, doublings=i) for i in reversed(range(code_levels))]
        )
        widths = widths[: len(widths) - code_levels + 1]
        self.decoder = Decoder(latent_channels, out_channels, widths, **shape)

    @property
    def f(self) -> int:
        return 2 ** len(self.config["block_out_channels"])

    @torch.no_grad()
    def requantize(self, quantizer: Mapping[str, Any]) -> None:
        """Replace all quantisers by quantisers of the same shape with other training options."""
        module: Any = self.quantize
        rebuilt = nn.ModuleList([rebuilt_quantizer(old, quantizer) for old in module])
        self.quantize = rebuilt.to(self.device, self.dtype)
        self.register_to_config(quantizer=dict(quantizer))

    def encode(self, images: Tensor, return_dict: bool = True) -> Any:
        """Encode images to features z (B, P D, h, w) of all levels before quantisation.

        D is the code width, and P is the number of codes per position of the coarsest level. The
        features of a level do not yet include the input from the codes of coarser levels.

        Raises:
            UserError: a side of the images is not a multiple of the downsampling factor.
        """
        height, width = images.shape[2:]
        if height % self.f or width % self.f:
            raise UserError(
                f"the sides of images must be multiples of f = {self.f} (got {height} x {width})"
            )
        found = zip(self.quant_conv, self.encoder(images), strict=True)
        features = self.fold([project(x) for project, x in found])
        return VQEncoderOutput(latents=features) if return_dict else (features,)

    def quantize_levels(
        self, z: Tensor, *, temperature: float = 1.0
    ) -> tuple[list[Tensor], list[Quantized]]:
        """Quantise the features z that `encode` returns, coarsest level first.

        Returns:
            Two lists with one entry for each level l. The first list has the features
            (B, D, h_l, w_l) that the quantiser of the level reads, for code width D. The second
            list has the results of the quantisers.
        """
        features: list[Tensor] = []
        found: list[Quantized] = []
        for i, (own, quantizer) in enumerate(zip(self._unfolded(z), self.quantize, strict=True)):
            if i > 0:
                own = own + self.condition[i - 1](found[-1].z.to(own.dtype))
            features.append(own)
            found.append(quantizer(own, temperature=temperature))
        return features, found

    def decode(self, latents: Tensor, return_dict: bool = True) -> Any:
        """Quantise the features z that `encode` returns, and decode the codes to images."""
        _, found = self.quantize_levels(latents)
        sample = self.decode_codes([level.z for level in found])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_codes(self, codes: Sequence[Tensor]) -> Tensor:
        """Decode the codes of all levels, coarsest first, to images.

        The codes of level l are (B, D, h_l, w_l) for codes of width D.
        """
        joined = [up(z.to(self.dtype)) for up, z in zip(self.post_quant_conv, codes, strict=True)]
        return self.decoder(torch.stack(joined).sum(dim=0))

    def maps(self, indices: Tensor) -> list[Tensor]:
        """Return the map of code indices of each level, coarsest first.

        The map of level l is (B, h_l, w_l). `indices` (B, P, h, w) has P codes per position of the
        coarsest level.
        """
        height, width = indices.shape[-2:]
        levels = range(len(self.quantize))
        return split_levels(indices, [(2**i * height, 2**i * width) for i in levels])

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> TokenOutput:
        """Return the code indices (B, P, h, w) of images (B, C, H, W) in [-1, 1].

        P is the number of codes per position of the coarsest level. With one level, the indices are
        (B, h, w). `models.levels` describes the order of the indices. `maps` returns the map of
        each level.
        """
        _, found = self.quantize_levels(self.encode(images).latents)
        return TokenOutput(indices=join_levels([level.indices for level in found]))

    @torch.no_grad()
    def decode_indices(self, indices: Tensor, return_dict: bool = True) -> Any:
        """Decode code indices, as `tokenize` returns them, to images.

        The indices are integers of any dtype.

        Raises:
            UserError: the indices have a wrong shape, or are not integers in 0..K - 1 for K codes.
        """
        planes = sum(4**i for i in range(len(self.quantize)))
        expected = (planes,) if planes > 1 else ()
        if indices.is_floating_point() or indices.ndim < 3 or indices.shape[1:-2] != expected:
            shape = ", ".join(["B", *map(str, expected), "h", "w"])
            raise UserError(
                f"indices must be integers ({shape}) (got {indices.dtype} {tuple(indices.shape)})"
            )
        indices = indices.long()  # torch has no `aminmax` of uint16, and cannot embed uint8
        quantizers: Any = self.quantize
        low, high = (int(value) for value in indices.aminmax())  # waits for the GPU
        if low < 0 or high >= quantizers[0].num_codes:
            last = quantizers[0].num_codes - 1
            raise UserError(f"indices must be in 0..{last} (got {low}..{high})")
        found = zip(quantizers, self.maps(indices), strict=True)
        sample = self.decode_codes([quantizer.codes(own) for quantizer, own in found])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Encode, quantise and decode images. Return the reconstruction."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)

    def _unfolded(self, z: Tensor) -> list[Tensor]:
        """Return the features of each level, (B, D, h_l, w_l) for level l and code width D.

        `_unfolded` is the inverse of `FoldLevels`.
        """
        quantizers: Any = self.quantize
        D = quantizers[0].code_channels
        parts = z.split([4**i * D for i in range(len(quantizers))], dim=1)
        return [F.pixel_shuffle(part, 2**i) for i, part in enumerate(parts)]
