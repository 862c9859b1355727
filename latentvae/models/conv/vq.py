"""An autoencoder with discrete latents: the convolutional VQGAN (Esser et al. 2020,
arXiv:2012.09841) around any quantiser of `latentvae.bottlenecks`.

images (B, C, H, W) -> encoder -> quant_conv -> features (B, c, H/f, W/f) -> quantize -> z (B, D,
H/f, W/f) and indices -> post_quant_conv -> decoder -> recon (B, C, H, W)

The parts and their names are those of diffusers' `VQModel`, whose weights load here and, where its
quantiser can say the same, the other way round.

`B` batch, `C` image channels, `c` feature channels, `D` code width, `f` downsampling factor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.bottlenecks import Quantizer, build_quantizer
from latentvae.errors import UserError
from latentvae.likelihoods import LogitLaplace
from latentvae.models.conv.kl import TrainingWrapper, block_types
from latentvae.outputs import AutoencoderOutput, Latent

# taming-transformers' configs/imagenet_vqgan.yaml, which has the widths of the class's defaults.
_QUANTIZER = {"type": "vq", "num_codes": 1024, "code_channels": 256}


@dataclass
class TokenOutput(BaseOutput):
    """Indices of an image's codes.

    Attributes:
        indices: (B, h, w), or (B, L, h, w) of L levels; int64 in 0..K - 1, row by row from the top
            left.
    """

    indices: Tensor = None  # type: ignore[assignment]


class DiscreteAutoencoder(ModelMixin, ConfigMixin):
    """VQGAN's network with a quantiser of this package; diffusers' calls and files.

        net = DiscreteAutoencoder.from_pretrained(folder)
        indices = net.tokenize(images).indices
        recon = net.decode_indices(indices).sample

    Args:
        block_out_channels: width of each level, from full resolution down; f = 2 ** (levels - 1).
        latent_channels: width between the encoder and `quant_conv`.
        attention_levels: levels (0 = full resolution) with self-attention.
        quantizer: `type` (see `bottlenecks.QUANTIZERS`) and its arguments.
        likelihood: None, or "logit_laplace": the decoder gives its parameters, 2 C maps.
        sample_size: side of the training images in pixels.
        scaling_factor: 1 / std of the features, for diffusion models on them.
    """

    _supports_gradient_checkpointing = True
    quantize: Any

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        latent_channels: int = 256,
        norm_num_groups: int = 32,
        attention_levels: Sequence[int] = (),
        mid_block_add_attention: bool = True,
        quantizer: Mapping[str, Any] = _QUANTIZER,
        likelihood: str | None = None,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        down, up = block_types(len(block_out_channels), attention_levels)
        shape: Any = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        quantize: Quantizer = build_quantizer(**quantizer)
        self.likelihood = None if likelihood is None else LIKELIHOODS[likelihood]()
        maps = out_channels * (1 if self.likelihood is None else 2)
        self.encoder = Encoder(
            in_channels, latent_channels, down_block_types=down, double_z=False, **shape
        )
        self.quant_conv = nn.Conv2d(latent_channels, quantize.in_channels, 1)
        self.quantize = quantize
        self.post_quant_conv = nn.Conv2d(quantize.code_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, maps, up_block_types=up, **shape)

    @torch.no_grad()
    def requantize(self, quantizer: Mapping[str, Any]) -> None:
        """Another quantiser of the same shape, such as one that learns otherwise, with the codes
        of the present one, in its mode, precision and place."""
        old, new = self.quantize.state_dict(), build_quantizer(**quantizer)
        module: Any = new
        module.load_state_dict(old, strict=False)
        for name, part in module.named_modules():
            averages = getattr(part, "embed_sum", None)
            if averages is not None and f"{name}.embed_sum".lstrip(".") not in old:
                averages.copy_(part.weight)  # each code counts as one vector
        self.quantize = module.to(self.device, self.dtype).train(self.quantize.training)
        self.register_to_config(quantizer=dict(quantizer))

    def encode(self, images: Tensor, return_dict: bool = True) -> Any:
        """Features (B, c, h, w), not yet quantised, as `VQModel` gives them."""
        height, width = images.shape[2:]
        if min(height, width) < (f := 2 ** (len(self.config["block_out_channels"]) - 1)):
            raise UserError(f"images of {height} x {width} pixels are smaller than f = {f}")
        features = self.quant_conv(self.encoder(images))
        return VQEncoderOutput(latents=features) if return_dict else (features,)

    def decode(
        self, latents: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> Any:
        """Images of features; with `force_not_quantize` of codes z (B, D, h, w)."""
        z = latents if force_not_quantize else self.quantize(latents).z
        sample = self.decode_parameters(z.to(self.dtype))
        if self.likelihood is not None:
            sample = self.likelihood.mean(sample)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_parameters(self, z: Tensor) -> Tensor:
        """What the decoder itself gives: images, or the parameters of their likelihood."""
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> TokenOutput:
        """Indices of images in [-1, 1]."""
        return TokenOutput(indices=self.quantize(self.encode(images).latents).indices)

    @torch.no_grad()
    def decode_indices(self, indices: Tensor, return_dict: bool = True) -> Any:
        """Images of indices, integers of any type, which must be those of codes: a `UserError`
        otherwise."""
        if indices.is_floating_point():
            raise UserError(f"indices are integers, not {indices.dtype}")
        indices = indices.long()  # uint16 has no minimum, uint8 no embedding
        low, high = (int(value) for value in indices.aminmax())  # waits for the device
        if low < 0 or high >= self.quantize.num_codes:
            last = self.quantize.num_codes - 1
            raise UserError(f"indices are in 0..{last}, not {low}..{high}")
        return self.decode(self.quantize.codes(indices), True, return_dict)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Encode, quantise, decode."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)


LIKELIHOODS = {"logit_laplace": LogitLaplace}


def build_discrete(*, image_channels: int = 3, **options: Any) -> DiscreteAutoencoder:
    """A freshly initialised one, with options of the class."""
    channels = {"in_channels": image_channels, "out_channels": image_channels}
    return DiscreteAutoencoder(**channels, **options)


class DiscreteTrainingWrapper(TrainingWrapper):
    """Encode, quantise, decode, with what the objective and the codebook need."""

    def forward(
        self, images: Tensor, *, sample: bool = True, temperature: float = 1.0
    ) -> AutoencoderOutput:
        features = self.net.encode(images).latents
        quantized = self.net.quantize(features, temperature=temperature)
        losses = dict(quantized.losses)
        kl = losses.pop("kl", None)  # nats per token, the mean
        tokens = quantized.indices[0].numel()
        kl_per_channel = None if kl is None else (kl * tokens).expand(len(images), 1)
        latent = Latent(
            z=quantized.z,
            kl=None if kl_per_channel is None else kl_per_channel.sum(dim=1),
            kl_per_channel=kl_per_channel,
            indices=quantized.indices,
            features=features,
            losses=losses,
            statistics=quantized.statistics,
        )
        return AutoencoderOutput(
            recon=self.net.decode_parameters(quantized.z),
            latents=(latent,),
            output_logvar=self.output_logvar,
        )


def from_vq_model(net: Any) -> DiscreteAutoencoder | None:
    """A stock `VQModel` as the same network with this package's quantiser: same weights, codes and
    indices, its own commitment and codebook terms. None where its blocks (spatial norms, another
    activation, attention at other levels of the decoder than of the encoder) or its pixels
    (aMUSEd's) are others.

    Codes of length 1, as exports of l2-normalised quantisers have, stay on the unit sphere.
    """
    config = net.config
    if (config["norm_type"], config["act_fn"]) != ("group", "silu"):
        return None
    if config["lookup_from_codebook"]:
        return None
    attention = [i for i, block in enumerate(config["down_block_types"]) if "Attn" in block]
    blocks = (tuple(config["down_block_types"]), tuple(config["up_block_types"]))
    if blocks != block_types(len(config["block_out_channels"]), attention):
        return None
    lengths = net.quantize.embedding.weight.detach().float().norm(dim=1)
    ours = DiscreteAutoencoder(
        **{name: config[name] for name in (*_SHARED, "scaling_factor")},
        attention_levels=attention,
        quantizer={
            "type": "vq",
            "num_codes": config["num_vq_embeddings"],
            "code_channels": config["vq_embed_dim"] or config["latent_channels"],
            "l2_normalize": bool(torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4)),
        },
    )
    weights = net.state_dict()
    weights["quantize.weight"] = weights.pop("quantize.embedding.weight")
    problems = ours.load_state_dict(weights, strict=False)
    assert problems == (["quantize.usage"], []), problems
    return ours


def why_no_vq_model(quantizer: Mapping[str, Any], likelihood: str | None) -> str:
    """Why a stock `VQModel` cannot be the same tokenizer, as a clause; empty if it can.

    Args:
        quantizer, likelihood: as `DiscreteAutoencoder` takes them.
    """
    if likelihood is not None:
        return f"its decoder gives the parameters of a {likelihood} likelihood"
    with torch.device("meta"):  # its options are asked, not its weights
        return build_quantizer(**quantizer).why_not_listed()


@torch.no_grad()
def to_vq_model(net: DiscreteAutoencoder, *, unit_range: bool = False) -> VQModel:
    """The same tokenizer as a stock `VQModel`, with the same indices, where `why_no_vq_model` has
    no reason against it.

    Codes on the unit sphere stay there: nearest by Euclid is then nearest by cosine, whatever the
    vectors' length. Features are scaled by a power of two, which costs no digit, so that they are
    about as long as the codes: of long vectors distances lose what tells codes apart.

    Args:
        net: float32, on the CPU.
        unit_range: pixels in [0, 1] on both sides, and codes looked up by index: aMUSEd's. The
            first convolution then pads with black where training padded with grey. Codes are as
            wide as `latent_channels`, by which its pipelines shape them: zeros fill up.
    """
    assert not why_no_vq_model(net.config["quantizer"], net.config["likelihood"])
    weights = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("quantize.")}
    codebook = weights["quantize.embedding.weight"] = net.quantize.listed_codes()
    config = {name: net.config[name] for name in _SHARED}
    if unit_range:
        _fold_unit_range(weights)
        config["latent_channels"] = _make_as_wide(weights)
        codebook = weights["quantize.embedding.weight"]
    down, up = block_types(len(config["block_out_channels"]), net.config["attention_levels"])
    network: Any = VQModel  # diffusers types widths as one-element tuples
    with torch.device("meta"):
        stock = network(
            **config | {"block_out_channels": tuple(config["block_out_channels"])},
            down_block_types=down,
            up_block_types=up,
            num_vq_embeddings=len(codebook),
            vq_embed_dim=codebook.shape[1],
            lookup_from_codebook=unit_range,
        )
    stock.load_state_dict(weights, assign=True)
    return stock.eval()


@torch.no_grad()
def scale_features(net: Any, stock: Any, images: Tensor) -> float:
    """Make `stock`'s features about as long as its codes, where its codes have one length; returns
    the factor, a power of two.

    Args:
        images: in [-1, 1], to measure on.
    """
    lengths = stock.quantize.embedding.weight.norm(dim=1)
    if not torch.allclose(lengths, lengths[:1], rtol=1e-4):
        return 1.0
    features = net.encode(images).latents
    length = features.norm(dim=1).mean().clamp(min=1e-6)  # of a dead encoder it is 0
    factor = 2.0 ** round(math.log2(lengths[0] / length))
    for parameter in stock.quant_conv.parameters():
        parameter.mul_(factor)
    return factor


_SHARED = (
    "in_channels out_channels block_out_channels layers_per_block latent_channels norm_num_groups "
    "mid_block_add_attention sample_size"
).split()


def _fold_unit_range(weights: dict[str, Tensor]) -> None:
    """Take x in [0, 1] for 2 x - 1, and give (y + 1) / 2 for y."""
    first = weights["encoder.conv_in.weight"]
    weights["encoder.conv_in.bias"] -= first.sum(dim=(1, 2, 3))
    first *= 2
    weights["decoder.conv_out.weight"] /= 2
    weights["decoder.conv_out.bias"] += 1
    weights["decoder.conv_out.bias"] /= 2


def _make_as_wide(weights: dict[str, Tensor]) -> int:
    """Fill features, codes and what lies around them up to one width; returns it."""
    width = max(weights["quant_conv.weight"].shape[:2])
    for name in ("encoder.conv_out", "quant_conv", "post_quant_conv"):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        inputs = width if name != "encoder.conv_out" else weight.shape[1]
        more = (0, 0, 0, 0, 0, inputs - weight.shape[1], 0, width - weight.shape[0])
        weights[f"{name}.weight"] = F.pad(weight, more)
        weights[f"{name}.bias"] = F.pad(bias, (0, width - len(bias)))
    for name in ("quantize.embedding.weight", "decoder.conv_in.weight"):
        weight = weights[name]
        more = (0, 0) * (weight.ndim - 2) + (0, width - weight.shape[1])
        weights[name] = F.pad(weight, more)
    return width
