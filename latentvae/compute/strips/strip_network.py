"""Compute diffusers' convolutional encoder and decoder strip by strip, on images of any size.

A strip is several rows of an image or feature map. Supported classes are `AutoencoderKL`, `VQModel`
and other classes with the same blocks. Strips change the result only by rounding.

    posterior = encode_in_strips(net, images).latent_dist    # as net.encode(images)
    recon = decode_in_strips(net, posterior.mean).sample     # as net.decode(z)

Nothing is approximated, so no borders between strips are visible (see `strip_layers`). The images
of a batch are computed one after the other, without gradients.

`B` batch, `C` image channels, `H W` pixels, `d` latent channels, `h w` latent positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import VQModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import (
    Decoder,
    DecoderOutput,
    DiagonalGaussianDistribution,
    Encoder,
)
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownEncoderBlock2D,
    AttnUpDecoderBlock2D,
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from latentvae.compute.strips.maps import FeatureMap, MemoryMap, Strips, Workspace
from latentvae.compute.strips.strip_layers import (
    attend,
    convolved,
    downsample,
    normalizer,
    resnet,
    upsample,
)
from latentvae.compute.upsampling import FoldedUpsample2D
from latentvae.models.conv.discrete_autoencoder import DiscreteAutoencoder

CPU_SCORES = 2**24  # number of distances to the codes of a VQModel in memory at a time


@torch.no_grad()
def encode_in_strips(net: Any, images: Tensor, strips: Strips | None = None) -> Any:
    """Return the output of `net.encode(images)`, computed strip by strip.

    Args:
        net: the network.
        images: (B, C, H, W), in the value range that the network takes.
        strips: options of the strips.

    Raises:
        ValueError: the network has a block that cannot be computed in strips, see
            `check_supported`.
    """
    check_supported(net)
    features = _run(net.encoder, images, _encoder_steps(net.encoder), strips or Strips())
    if net.quant_conv is not None:
        features = net.quant_conv(features)
    if isinstance(net, VQModel | DiscreteAutoencoder):
        return VQEncoderOutput(latents=features)
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(features))


@torch.no_grad()
def decode_in_strips(
    net: Any, z: Tensor, strips: Strips | None = None, *, force_not_quantize: bool = False
) -> DecoderOutput:
    """Return the output of `net.decode(z)`, computed strip by strip.

    Args:
        net: the network.
        z: latents (B, d, h, w).
        strips: options of the strips.
        force_not_quantize: do not quantise `z`, because it already consists of a tokenizer's codes.

    Raises:
        ValueError: the network has a block that cannot be computed in strips, see
            `check_supported`.
    """
    check_supported(net)
    if isinstance(net, VQModel | DiscreteAutoencoder) and not force_not_quantize:
        z = _quantize(net, z)
    if net.post_quant_conv is not None:
        z = net.post_quant_conv(z)
    sample = _run(net.decoder, z, _decoder_steps(net.decoder), strips or Strips())
    if (likelihood := getattr(net, "likelihood", None)) is not None:
        sample = likelihood.mean(sample)
    return DecoderOutput(sample=sample)


def _quantize(net: Any, z: Tensor) -> Tensor:
    """Return the codes of features.

    For diffusers' `VQModel`, only a few rows are computed at a time, because the model itself would
    keep the distances of all positions to all codes in memory.
    """
    if isinstance(net, DiscreteAutoencoder):
        return net.quantize(z).z.to(net.dtype)
    rows = max(CPU_SCORES // (len(z) * z.shape[3] * net.config["num_vq_embeddings"]), 1)
    return torch.cat([net.quantize(part)[0] for part in z.split(rows, dim=2)], dim=2)


@dataclass(frozen=True)
class StripComputation:
    """Encodes and decodes in strips. Functions of `models.calls` take this object as `computation`.

    Args:
        strips: options: the height of the strips, and where feature maps are kept.
    """

    strips: Strips

    def encode(self, net: Any, images: Tensor) -> Any:
        return encode_in_strips(net, images, self.strips)

    def decode(self, net: Any, z: Tensor, *, force_not_quantize: bool = False) -> Any:
        return decode_in_strips(net, z, self.strips, force_not_quantize=force_not_quantize)


Step = tuple[Callable[[Any, FeatureMap, Workspace], FeatureMap], Any]  # a function and its block


def _run(part: Any, inputs: Tensor, steps: Sequence[Step], strips: Strips) -> Tensor:
    """Return the outputs of the encoder or decoder, computed image by image."""
    space = Workspace(strips, like=inputs)
    outputs: Tensor | None = None
    for i, image in enumerate(inputs):
        x = space.make(part.conv_in.out_channels, *image.shape[1:])
        x.fill(convolved(MemoryMap(image), part.conv_in, space))
        for (
            step,
            block,
        ) in steps:  # a loop without calls around it, which would keep old maps in memory
            x = step(block, x, space)
        if outputs is None:
            shape = (len(inputs), part.conv_out.out_channels, x.height, x.width)
            outputs = inputs.new_empty(shape)
        prepare = normalizer(part.conv_norm_out, x, part.conv_act)
        last = convolved(x, part.conv_out, space, prepare=prepare)
        MemoryMap(outputs[i]).fill(last, measure=False)
    assert outputs is not None, "a batch of no image"
    return outputs


def _encoder_steps(encoder: Any) -> list[Step]:
    levels = [
        step
        for level in encoder.down_blocks
        for step in (*_level(level), *((downsample, block) for block in level.downsamplers or ()))
    ]
    return [*levels, *_middle(encoder.mid_block)]


def _decoder_steps(decoder: Any) -> list[Step]:
    levels = [
        step
        for level in decoder.up_blocks
        for step in (*_level(level), *((upsample, block) for block in level.upsamplers or ()))
    ]
    return [*_middle(decoder.mid_block), *levels]


def _level(level: Any) -> Iterator[Step]:
    attentions = getattr(level, "attentions", None) or [None] * len(level.resnets)
    for block, attention in zip(level.resnets, attentions, strict=True):
        yield resnet, block
        if attention is not None:
            yield attend, attention


def _middle(middle: Any) -> Iterator[Step]:
    yield resnet, middle.resnets[0]
    for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
        if attention is not None:
            yield attend, attention
        yield resnet, block


def check_supported(net: Any) -> None:
    """Check that every block of the encoder and the decoder can be computed in strips.

    Raises:
        ValueError: a block cannot be computed in strips. The message has the name and type of the
            block.
    """
    for part, kind in (("encoder", Encoder), ("decoder", Decoder)):
        module: Any = getattr(net, part, None)
        if type(module) is not kind or not hasattr(net, "quant_conv"):
            raise ValueError(
                "exact strips need a network with diffusers' Encoder and Decoder, but the "
                f"{part} of {type(net).__name__} is a {type(module).__name__}"
            )
        for name, block in module.named_modules():
            known = _KNOWN.get(type(block))
            if known is None or not known(block):
                why = "which strips do not support" if known is None else "with unknown options"
                raise ValueError(f"{part}.{name} is a {type(block).__name__}, {why}")


def _known_resnet(block: Any) -> bool:
    unused = (block.time_emb_proj, block.upsample, block.downsample)
    return unused == (None, None, None) and block.time_embedding_norm != "scale_shift"


def _known_attention(block: Any) -> bool:
    stock = type(block.processor) in (AttnProcessor, AttnProcessor2_0)
    others = (block.spatial_norm, block.norm_q, block.norm_k)
    return stock and block.group_norm is not None and others == (None, None, None)


def _known_upsampler(block: Any) -> bool:
    return block.use_conv and block.interpolate and block.norm is None and block.name == "conv"


def _known_convolution(conv: Any) -> bool:
    shape = (conv.kernel_size, conv.padding, conv.dilation, conv.padding_mode)
    return shape in (
        ((3, 3), (1, 1), (1, 1), "zeros"),
        ((3, 3), (0, 0), (1, 1), "zeros"),  # in a downsampler
        ((1, 1), (0, 0), (1, 1), "zeros"),
    )


def _always(block: Any) -> bool:
    return True


_POINTWISE = (nn.SiLU, nn.Mish, nn.GELU, nn.ReLU, nn.Dropout)  # dropout does nothing at inference
_LEVELS = (DownEncoderBlock2D, AttnDownEncoderBlock2D, UpDecoderBlock2D, AttnUpDecoderBlock2D)
_WHOLE = (Encoder, Decoder, UNetMidBlock2D, nn.ModuleList, nn.GroupNorm, nn.Linear)

_KNOWN: dict[type[nn.Module], Callable[[Any], bool]] = {
    **dict.fromkeys((*_POINTWISE, *_LEVELS, *_WHOLE), _always),
    ResnetBlock2D: _known_resnet,
    Attention: _known_attention,
    Downsample2D: lambda block: block.use_conv and block.padding == 0 and block.norm is None,
    Upsample2D: _known_upsampler,
    FoldedUpsample2D: _known_upsampler,
    nn.Conv2d: _known_convolution,
}
