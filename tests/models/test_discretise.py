"""A tokenizer made from a KL autoencoder: the same reconstruction, and a useful start."""

from typing import Any

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL
from torch import Tensor, nn

from latentvae.bottlenecks.quantized import Quantized
from latentvae.errors import UserError
from latentvae.models import FAMILIES, build_autoencoder_kl
from latentvae.models.conv.discretise import fit_decoder_side, start_adapter
from tests.tiny import images

VQ = {"type": "vq", "num_codes": 16, "code_channels": 6}


class Exact(nn.Module):
    """A quantiser with infinitely many codes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_channels = channels

    def forward(self, features: Tensor) -> Quantized:
        return Quantized(features, features[:, 0].long(), {}, {})


def trained_kl(**options: Any) -> AutoencoderKL:
    """A network whose convolutions beside the latent are far from the identity."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4} | options
    net = build_autoencoder_kl(layers_per_block=1, latent_channels=4, **shape)
    with torch.no_grad():
        net.encoder.conv_out.weight.mul_(5)
        for name in ("quant_conv", "post_quant_conv"):
            conv: Any = getattr(net, name)
            if conv is not None:
                conv.bias.normal_()
    return net.eval()


def discretised(net: Any, quantizer: dict[str, Any] = VQ, **options: Any) -> Any:
    torch.manual_seed(1)
    ours = FAMILIES["vq"].adapt(net, {"quantizer": quantizer, "likelihood": None} | options)
    return None if ours is None else ours.eval()


def start(net: Any, pictures: Tensor, **options: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    start_adapter(
        net, pictures, generator=generator, **{"whiten": False, "on_sphere": False} | options
    )
    fit_decoder_side(net, pictures)


@torch.no_grad()
def of_kl(net: AutoencoderKL, pictures: Tensor) -> Tensor:
    output: Any = net.encode(pictures)
    decoded: Any = net.decode(output.latent_dist.mode())
    return decoded.sample


@pytest.mark.parametrize("use_quant_conv", [True, False])
@pytest.mark.parametrize("whiten", [True, False])
def test_without_quantising_it_reconstructs_as_before(use_quant_conv: bool, whiten: bool) -> None:
    net, pictures = trained_kl(use_quant_conv=use_quant_conv), images(16, 24)
    expected = of_kl(net, pictures)
    for channels in (4, 6):
        ours = discretised(net, VQ | {"code_channels": channels})
        ours.quantize = Exact(channels)
        assert torch.allclose(ours(pictures).sample, expected, atol=1e-4)
        start(ours, pictures, whiten=whiten)
        assert torch.allclose(ours(pictures).sample, expected, atol=1e-4)


def test_features_have_pixel_distances() -> None:
    """A step of the features changes pixels about equally in every direction of the latent."""
    net, pictures = trained_kl(), images(16, 16)
    with torch.no_grad():  # a decoder that hardly reads two of its channels
        net.decoder.conv_in.weight[:, :2].mul_(1e-3)
    ours = discretised(net, VQ | {"code_channels": 2})
    start(ours, pictures)
    weights = ours.quant_conv.weight[:, :, 0, 0].abs()
    assert weights[:, :2].max() < 0.05 * weights[:, 2:].max()


def test_whitened_features_have_unit_variance_in_every_channel() -> None:
    pictures = images(16, 16)
    ours = discretised(trained_kl(), {"type": "fsq", "levels": [5] * 6})
    start(ours, pictures, whiten=True)
    with torch.no_grad():
        features = ours.encode(pictures).latents
    assert torch.allclose(features.mean((0, 2, 3)), torch.zeros(6), atol=1e-4)
    assert torch.allclose(features.var((0, 2, 3), correction=0), torch.ones(6), atol=1e-3)


def test_codes_on_the_sphere_keep_lengths() -> None:
    """Without the constant channel, z and 2 z would be the same point of the sphere."""
    pictures, shape = images(16, 16), {"l2_normalize": True, "code_channels": 5}
    error = {}
    for on_sphere in (True, False):
        ours = discretised(trained_kl(), VQ | shape)
        ours.quantize.forward = lambda f: Quantized(nn.functional.normalize(f), f, {}, {})
        start(ours, pictures, on_sphere=on_sphere)
        with torch.no_grad():
            y = ours.encoder(pictures)
            back = ours.post_quant_conv(ours.quantize(ours.quant_conv(y)).z)
        error[on_sphere] = ((back - y).square().mean() / y.var()).item()
    assert error[True] < 0.1 and error[True] < 0.5 * error[False]


def test_attention_comes_along() -> None:
    net, pictures = trained_kl(attention_levels=(1,)), images(16, 16)
    ours = discretised(net)
    ours.quantize = Exact(6)
    assert torch.allclose(ours(pictures).sample, of_kl(net, pictures), atol=1e-4)


def test_other_networks_are_refused() -> None:
    assert discretised(AsymmetricAutoencoderKL()) is None
    assert discretised(trained_kl(), VQ) is not None
    relu = AutoencoderKL(block_out_channels=(32,), act_fn="relu")
    assert discretised(relu) is None
    with pytest.raises(UserError, match="likelihood logit_laplace cannot discretise"):
        discretised(trained_kl(), likelihood="logit_laplace")
    with pytest.raises(UserError, match="gumbel cannot discretise a KL autoencoder"):
        discretised(trained_kl(), {"type": "gumbel", "num_codes": 8, "code_channels": 4})
