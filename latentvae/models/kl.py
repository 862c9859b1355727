"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752): stock
`AutoencoderKL`.

images (B, C, H, W) -> encoder -> moments (B, 2d, H/f, W/f) -> z (B, d, H/f, W/f) -> decoder ->
recon (B, C, H, W)
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentvae.bottlenecks import gaussian_bottleneck
from latentvae.outputs import AutoencoderOutput


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
    levels = range(len(block_out_channels))
    down: Any = [
        "AttnDownEncoderBlock2D" if i in attention_levels else "DownEncoderBlock2D" for i in levels
    ]
    up: Any = [
        "AttnUpDecoderBlock2D" if i in attention_levels else "UpDecoderBlock2D"
        for i in reversed(levels)
    ]
    net = AutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
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


def downsampling_factor(net: AutoencoderKL) -> int:
    """f: how many image pixels one latent pixel spans on a side."""
    return 2 ** (len(net.config["block_out_channels"]) - 1)


class KLTrainingWrapper(nn.Module):
    """`AutoencoderKL` with what only training needs; what the loop prepares and calls.

    Args:
        net: the autoencoder; the export saves it as it is.
        output_logvar: initial log-variance of the output likelihood (natural logarithm).
        learn_logvar: whether it is a parameter (trained, reduced over ranks) or a constant.
    """

    def __init__(
        self, net: AutoencoderKL, *, output_logvar: float = 0.0, learn_logvar: bool = False
    ) -> None:
        super().__init__()
        self.net = net
        value = torch.tensor(float(output_logvar))
        if learn_logvar:
            self.output_logvar = nn.Parameter(value)
        else:
            self.register_buffer("output_logvar", value)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial term (arXiv:2012.09841, eq. 7)."""
        return self.net.decoder.conv_out.weight

    def forward(
        self, images: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> AutoencoderOutput:
        """Encode, sample (or take the mode of) the posterior, decode; images (B, C, H, W) in [-1,
        1]."""
        net: Any = self.net  # diffusers types its calls as returning tuples
        moments = net.encode(images).latent_dist.parameters
        latent = gaussian_bottleneck(moments, sample=sample, temperature=temperature)
        recon = net.decode(latent.z).sample
        return AutoencoderOutput(
            recon=recon,
            z=latent.z,
            mean=latent.mean,
            kl_per_channel=latent.kl,
            output_logvar=self.output_logvar,
        )
