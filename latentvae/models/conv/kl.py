"""Autoencoders with continuous latents: stock diffusers classes, and what training wraps them in.

images (B, C, H, W) -> encoder -> moments (B, 2d, H/f, W/f) -> z (B, d, H/f, W/f) -> decoder ->
recon (B, C, H, W)

`AutoencoderKL` is latent diffusion's (Rombach et al. 2022, arXiv:2112.10752),
`AsymmetricAutoencoderKL` has a larger decoder that may see the known part of a picture (Zhu et al.
2023, arXiv:2306.04632), `AutoencoderDC` has no posterior and f = 32 (Chen et al. 2024,
arXiv:2410.10733).
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL
from torch import Tensor, nn

from latentvae.bottlenecks.gaussian import GaussianBottleneck
from latentvae.outputs import AutoencoderOutput, Latent


def build_autoencoder_kl(
    *,
    block_out_channels: Sequence[int],
    image_channels: int = 3,
    layers_per_block: int = 2,
    latent_channels: int = 4,
    norm_num_groups: int = 32,
    attention_levels: Sequence[int] = (),
    mid_block_add_attention: bool = True,
    use_quant_conv: bool = True,
    initial_posterior_logvar: float = 0.0,
    sample_size: int = 256,
) -> AutoencoderKL:
    """A freshly initialised `AutoencoderKL` with f = 2 ** (len(block_out_channels) - 1).

    Args:
        block_out_channels: width of each level, from full resolution down.
        image_channels: C: 1 (grey), 3 (RGB) or 4 (RGBA).
        attention_levels: levels (0 = full resolution) whose residual blocks are followed by
            self-attention.
        use_quant_conv: 1x1 convolutions on both sides of the latent (Stable Diffusion yes, SD3 and
            FLUX no).
        initial_posterior_logvar: added to the log-variance's bias. At 0 the posterior starts as
            wide as the prior, and the decoder sees mostly noise until the encoder has outgrown it.
        sample_size: side of the training images in pixels; diffusers' tiling reads it.
    """
    widths: Any = tuple(block_out_channels)  # diffusers types these as one-element tuples
    down, up = block_types(len(widths), attention_levels)
    net = AutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        mid_block_add_attention=mid_block_add_attention,
        use_quant_conv=use_quant_conv,
        use_post_quant_conv=use_quant_conv,
        sample_size=sample_size,
    )
    last: Any = net.quant_conv if use_quant_conv else net.encoder.conv_out
    with torch.no_grad():
        last.bias[latent_channels:] += initial_posterior_logvar
    return net


def build_asymmetric_kl(
    *,
    block_out_channels: Sequence[int],
    image_channels: int = 3,
    layers_per_block: int = 2,
    up_block_out_channels: Sequence[int],
    layers_per_up_block: int = 3,
    latent_channels: int = 4,
    norm_num_groups: int = 32,
    sample_size: int = 256,
) -> AsymmetricAutoencoderKL:
    """A freshly initialised `AsymmetricAutoencoderKL`: Stable Diffusion's encoder, and a decoder of
    its own width and depth.

    Args:
        block_out_channels, layers_per_block: of the encoder.
        up_block_out_channels, layers_per_up_block: of the decoder; widths from full resolution
            down, which must be w, 2 w, 4 w, 4 w (diffusers' encoder of the known picture has no
            others, so f is 8).
    """
    down, up = block_types(len(block_out_channels), ())
    widths: Any = (tuple(block_out_channels), tuple(up_block_out_channels))
    return AsymmetricAutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=down,
        down_block_out_channels=widths[0],
        layers_per_down_block=layers_per_block,
        up_block_types=up,
        up_block_out_channels=widths[1],
        layers_per_up_block=layers_per_up_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        sample_size=sample_size,
    )


def build_autoencoder_dc(
    *,
    block_out_channels: Sequence[int],
    image_channels: int = 3,
    encoder_layers_per_block: Sequence[int],
    decoder_layers_per_block: Sequence[int],
    latent_channels: int = 32,
    attention_levels: Sequence[int] = (),
    attention_head_dim: int = 32,
) -> AutoencoderDC:
    """A freshly initialised `AutoencoderDC` with f = 2 ** (len(block_out_channels) - 1).

    Args:
        encoder_layers_per_block, decoder_layers_per_block: blocks of each level.
        attention_levels: levels of EfficientViT blocks (linear attention, multi-scale at 5 x 5);
            the others have residual blocks.
        attention_head_dim: divides the width of those levels.
    """
    levels = range(len(block_out_channels))
    widths: Any = tuple(block_out_channels)
    blocks: Any = tuple(
        "EfficientViTBlock" if i in attention_levels else "ResBlock" for i in levels
    )
    scales = tuple((5,) if i in attention_levels else () for i in levels)
    return AutoencoderDC(
        in_channels=image_channels,
        latent_channels=latent_channels,
        attention_head_dim=attention_head_dim,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=tuple(encoder_layers_per_block),
        decoder_layers_per_block=tuple(decoder_layers_per_block),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )


def block_types(num_levels: int, attention_levels: Sequence[int]) -> tuple[Any, Any]:
    """diffusers' names of the encoder's and the decoder's blocks."""
    levels = range(num_levels)
    down = (
        "AttnDownEncoderBlock2D" if i in attention_levels else "DownEncoderBlock2D" for i in levels
    )
    up = (
        "AttnUpDecoderBlock2D" if i in attention_levels else "UpDecoderBlock2D"
        for i in reversed(levels)
    )
    return tuple(down), tuple(up)


def downsampling_factor(net: AutoencoderKL) -> int:
    """f: how many image pixels one latent pixel spans on a side."""
    return 2 ** (len(net.config["block_out_channels"]) - 1)


class TrainingWrapper(nn.Module):
    """A network with what only training needs; what the loop prepares and calls. Each architecture
    adds its `forward(images, *, sample, temperature) -> AutoencoderOutput`.

    Args:
        net: the autoencoder; the export saves it as it is.
        output_logvar: initial log-variance of the output likelihood (natural logarithm).
        learn_logvar: whether it is a parameter (trained, reduced over ranks) or a constant.
    """

    def __init__(self, net: Any, *, output_logvar: float = 0.0, learn_logvar: bool = False) -> None:
        super().__init__()
        self.net: Any = net
        value = torch.tensor(float(output_logvar))
        if learn_logvar:
            self.output_logvar = nn.Parameter(value)
        else:
            self.register_buffer("output_logvar", value)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial term (arXiv:2012.09841, eq. 7)."""
        return self.net.decoder.conv_out.weight


class KLTrainingWrapper(TrainingWrapper):
    """Encode, sample (or take the mode of) the posterior, decode."""

    def __init__(self, net: Any, *, output_logvar: float = 0.0, learn_logvar: bool = False) -> None:
        super().__init__(net, output_logvar=output_logvar, learn_logvar=learn_logvar)
        self.bottleneck = GaussianBottleneck(latent_channels=net.config["latent_channels"])

    def forward(
        self, images: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> AutoencoderOutput:
        moments = self.net.encode(images).latent_dist.parameters
        found = self.bottleneck(moments, sample=sample, temperature=temperature)
        latent = Latent(z=found.z, kl=found.kl.sum(dim=1), kl_per_channel=found.kl, mean=found.mean)
        return AutoencoderOutput(
            recon=self.decode(latent.z, images),
            latents=(latent,),
            output_logvar=self.output_logvar,
        )

    def decode(self, z: Tensor, images: Tensor) -> Tensor:
        return self.net.decode(z).sample


class AsymmetricTrainingWrapper(KLTrainingWrapper):
    """Half of the images are decoded from latents alone, half with the picture outside of a random
    box given, as inpainting pipelines give it."""

    def decode(self, z: Tensor, images: Tensor) -> Tensor:
        # A mask of ones leaves nothing of the picture: as without one, but every weight is used, as
        # DDP needs.
        return self.net.decode(z, image=images, mask=random_masks(images)).sample


class DCTrainingWrapper(TrainingWrapper):
    """Encode and decode; there is no posterior."""

    def forward(
        self, images: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> AutoencoderOutput:
        z = self.net.encode(images).latent
        return AutoencoderOutput(
            recon=self.net.decode(z).sample,
            latents=(Latent(z=z.float(), mean=z.float()),),
            output_logvar=self.output_logvar,
        )


def random_masks(images: Tensor) -> Tensor:
    """1 where an image is to be made up, (B, 1, H, W): everywhere for about half of the images,
    else in a box of a quarter to the whole of each side. From the global generator."""
    B, _, H, W = images.shape
    whole, height, width, top, left = torch.rand(5, B, 1, 1, device=images.device)
    height, width = 0.25 + 0.75 * height, 0.25 + 0.75 * width
    y = (torch.arange(H, device=images.device) + 0.5).view(1, H, 1) / H
    x = (torch.arange(W, device=images.device) + 0.5).view(1, 1, W) / W
    top, left = top * (1 - height), left * (1 - width)
    box = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)  # (B, H, W)
    return (box | (whole < 0.5)).to(images.dtype)[:, None]
