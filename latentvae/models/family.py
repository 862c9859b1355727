"""The networks that can be trained: how each is built and wrapped, and what a fine-tuning takes
from a pretrained one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, VQModel
from torch import nn

from latentvae.models.conv.kl import (
    AsymmetricTrainingWrapper,
    DCTrainingWrapper,
    KLTrainingWrapper,
    TrainingWrapper,
    build_asymmetric_kl,
    build_autoencoder_dc,
    build_autoencoder_kl,
)
from latentvae.models.conv.vq import (
    DiscreteAutoencoder,
    DiscreteTrainingWrapper,
    build_discrete,
    from_vq_model,
)


@dataclass(frozen=True)
class Architecture:
    """One kind of network.

    Attributes:
        network: its class.
        build: a freshly initialised one, from options of its own.
        wrapper: what training prepares.
        shape: those options, as far as a pretrained network's config decides them.
    """

    network: type[Any]
    build: Callable[..., Any]
    wrapper: type[TrainingWrapper]
    shape: Callable[[dict[str, Any]], dict[str, Any]]


def adapt(net: Any, architecture: str, options: dict[str, Any]) -> Any | None:
    """A pretrained network as that architecture: itself, a stock `VQModel` with our quantiser, or a
    larger decoder on an `AutoencoderKL`'s encoder; None where it is another kind, or has blocks
    that the architecture does not have.

    Args:
        options: of the architecture's builder, for what the pretrained network does not have.
    """
    if architecture == "vq" and isinstance(net, VQModel):
        return from_vq_model(net)
    if architecture == "asymmetric" and isinstance(net, AutoencoderKL):
        return _with_larger_decoder(net, options)
    return net if type(net) is ARCHITECTURES[architecture].network else None


def _with_larger_decoder(net: AutoencoderKL, options: dict[str, Any]) -> Any | None:
    config = net.config
    plain = set(config["down_block_types"]) == {"DownEncoderBlock2D"} and config["act_fn"] == "silu"
    if net.quant_conv is None or not plain or not config["mid_block_add_attention"]:
        return None  # AsymmetricAutoencoderKL has no such encoder
    own = {name: config[name] for name in _ENCODER} | {"image_channels": config["in_channels"]}
    larger = build_asymmetric_kl(**options | own)
    for name in ("encoder", "quant_conv"):
        getattr(larger, name).load_state_dict(getattr(net, name).state_dict())
    larger.register_to_config(scaling_factor=config["scaling_factor"])
    return larger


_ENCODER = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")


def latent_side(net: Any) -> Iterator[nn.Module]:
    """The parts that make latents or tokens of images."""
    for name in ("encoder", "quant_conv", "quantize"):
        if (part := getattr(net, name, None)) is not None:
            yield part


def freeze_encoder(net: Any) -> None:
    """Nothing that makes latents will learn."""
    for part in latent_side(net):
        part.requires_grad_(False)
    if hasattr(net, "quantize"):
        net.quantize.eval()  # nor will a codebook of moving averages


def _kl_shape(config: dict[str, Any]) -> dict[str, Any]:
    names = (*_ENCODER, "mid_block_add_attention", "use_quant_conv")
    return {name: config[name] for name in names} | {
        "attention_levels": _levels(config["down_block_types"], "Attn")
    }


def _asymmetric_shape(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "block_out_channels": config["down_block_out_channels"],
        "layers_per_block": config["layers_per_down_block"],
        "up_block_out_channels": config["up_block_out_channels"],
        "layers_per_up_block": config["layers_per_up_block"],
        "latent_channels": config["latent_channels"],
        "norm_num_groups": config["norm_num_groups"],
    }


def _dc_shape(config: dict[str, Any]) -> dict[str, Any]:
    widths, blocks = config["encoder_block_out_channels"], config["encoder_block_types"]
    blocks = [blocks] * len(widths) if isinstance(blocks, str) else blocks
    return {
        "block_out_channels": widths,
        "encoder_layers_per_block": config["encoder_layers_per_block"],
        "decoder_layers_per_block": config["decoder_layers_per_block"],
        "latent_channels": config["latent_channels"],
        "attention_levels": _levels(blocks, "EfficientViT"),
        "attention_head_dim": config["attention_head_dim"],
    }


def _vq_shape(config: dict[str, Any]) -> dict[str, Any]:
    names = (*_ENCODER, "mid_block_add_attention", "attention_levels", "likelihood", "quantizer")
    return {name: config[name] for name in names}


def _levels(blocks: Any, kind: str) -> tuple[int, ...]:
    return tuple(i for i, block in enumerate(blocks) if kind in block)


ARCHITECTURES = {
    "kl": Architecture(AutoencoderKL, build_autoencoder_kl, KLTrainingWrapper, _kl_shape),
    "asymmetric": Architecture(
        AsymmetricAutoencoderKL, build_asymmetric_kl, AsymmetricTrainingWrapper, _asymmetric_shape
    ),
    "dc": Architecture(AutoencoderDC, build_autoencoder_dc, DCTrainingWrapper, _dc_shape),
    "vq": Architecture(DiscreteAutoencoder, build_discrete, DiscreteTrainingWrapper, _vq_shape),
}


def keep_batch_statistics(net: nn.Module) -> None:
    """Batch norms of a pretrained network go on with the statistics they have: those of small
    batches would differ between ranks."""
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
