"""A network that starts at the linear code, against the code itself."""

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from latentvae.errors import UserError
from latentvae.linear_code import LinearCode
from latentvae.models.conv.kl import build_autoencoder_kl
from latentvae.models.conv.linear_start import patch_codes, start_decoder, start_encoder
from latentvae.models.conv.vq import build_discrete

SHAPES: dict[str, dict[str, Any]] = {
    "f8": {"block_out_channels": (16, 48, 64, 64), "norm_num_groups": 4},
    "wider last level": {"block_out_channels": (16, 48, 64), "norm_num_groups": 4},
    "narrow": {"block_out_channels": (16, 16, 16, 32), "norm_num_groups": 4},
    "attention": {
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 4,
        "attention_levels": (2,),
        "layers_per_block": 2,
    },
    "no quant_conv": {
        "block_out_channels": (16, 48, 64),
        "norm_num_groups": 4,
        "use_quant_conv": False,
    },
    "grey": {"block_out_channels": (16, 32, 32), "norm_num_groups": 4, "image_channels": 1},
}


def pictures(channels: int, *, count: int = 40, side: int = 32) -> Tensor:
    """Smooth pictures with some noise, (N, C, H, W)."""
    generator = torch.Generator().manual_seed(1)
    found = torch.zeros(count, channels, side, side)
    for coarse in (2, 4, 8, 16):
        noise = torch.randn(count, channels, coarse, coarse, generator=generator)
        found += torch.nn.functional.interpolate(noise, size=(side, side), mode="bilinear") / coarse
    return (0.5 * found).clamp(-1, 1)


def first_components(codes: list[LinearCode], d: int) -> LinearCode:
    whole = codes[-1]
    return LinearCode(whole.mean, whole.basis[:d], whole.variances[:d])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_encoder_is_the_linear_code(shape: str) -> None:
    options = {"layers_per_block": 1, "latent_channels": 3} | SHAPES[shape]
    net = build_autoencoder_kl(**options, initial_posterior_logvar=-6.0).eval()
    images = pictures(options.get("image_channels", 3))
    codes = patch_codes(images, levels=len(options["block_out_channels"]) - 1)
    start_encoder(net, codes, d=3, whiten=True)
    with torch.no_grad():
        posterior = net.encode(images).latent_dist
    code = first_components(codes, 3)
    expected = code.encode(images) / code.variances.sqrt()[:, None, None]
    for found, wanted in zip(posterior.mean.unbind(1), expected.unbind(1), strict=True):
        pair = torch.stack([found.flatten(), wanted.flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.999
        assert found.std().item() == pytest.approx(wanted.std().item(), rel=0.05)
    assert posterior.logvar.std((0, 2, 3)).max() < 1e-5 and posterior.logvar.mean() < -5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_decoder_is_as_good_as_a_linear_code_of_less_detail(shape: str) -> None:
    """A decoder of upsampling and convolutions cannot invert the code exactly."""
    options = {"layers_per_block": 1, "latent_channels": 3} | SHAPES[shape]
    net = build_autoencoder_kl(**options).eval()
    images = pictures(options.get("image_channels", 3))
    codes = patch_codes(images, levels=len(options["block_out_channels"]) - 1)
    start_encoder(net, codes, d=3, whiten=True)
    with torch.no_grad():
        z = net.encode(images).latent_dist.mean
        start_decoder(net, codes, z, images)
        recon = net.decode(z).sample
    error, code = (recon - images).square().mean(), first_components(codes, 3)
    exact = (code.decode(code.encode(images)) - images).square().mean()
    grey = (images - images.mean((0, 2, 3), keepdim=True)).square().mean()
    assert error < 1.6 * exact + 0.01 * grey < 0.5 * grey


def test_all_weights_still_learn() -> None:
    net = build_autoencoder_kl(
        block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=4
    )
    images = pictures(3, count=8)
    codes = patch_codes(images, levels=2)
    start_encoder(net, codes, d=4, whiten=True)
    start_decoder(net, codes, net.encode(images).latent_dist.mean.detach(), images)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(2):  # branches end in zeros: their other weights learn from the second update on
        optimizer.zero_grad()
        recon = net.decode(net.encode(images).latent_dist.sample()).sample
        (recon - images).square().mean().backward()
        optimizer.step()
    still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == [] or all("to_k.bias" in name for name in still)


def test_a_tokenizers_features_keep_the_distances_of_pixels() -> None:
    quantizer = {"type": "vq", "num_codes": 16, "code_channels": 8}
    net = build_discrete(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=12,
        quantizer=quantizer,
    ).eval()
    images = pictures(3)
    codes = patch_codes(images, levels=2)
    start_encoder(net, codes, d=8, whiten=False)
    with torch.no_grad():
        features = net.encode(images).latents
        start_decoder(net, codes, features, images)
        recon = net.decode_parameters(features)
    numbers = rearrange(features, "b d h w -> d (b h w)")
    variances = codes[-1].variances[:8]
    torch.testing.assert_close(numbers.var(1), variances / variances[0], rtol=0.1, atol=1e-3)
    assert (recon - images).square().mean() < 0.1 * images.var()


def test_a_norm_of_small_groups_is_refused() -> None:
    net = build_autoencoder_kl(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8)
    codes = patch_codes(pictures(3, count=4), levels=1)
    with pytest.raises(UserError, match="at least 4 channels for each group"):
        start_encoder(net, codes, d=4, whiten=True)


def test_a_flat_first_image_does_not_decide_the_decoder() -> None:
    net = build_autoencoder_kl(
        block_out_channels=(16, 48, 64), layers_per_block=1, norm_num_groups=4
    )
    images = torch.cat([torch.zeros(1, 3, 128, 128), pictures(3, count=20, side=128)])
    codes = patch_codes(images, levels=2)
    start_encoder(net, codes, d=4, whiten=True)
    with torch.no_grad():
        z = net.encode(images).latent_dist.mean
        start_decoder(net, codes, z, images)
        error = (net.decode(z).sample - images).square().mean()
    assert error < 0.1 * images.var()


def test_grey_pictures_in_rgb_have_no_loud_channels() -> None:
    net = build_autoencoder_kl(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=8, norm_num_groups=4
    ).eval()
    codes = patch_codes(pictures(1).expand(-1, 3, -1, -1), levels=1)
    start_encoder(net, codes, d=8, whiten=True)
    with torch.no_grad():
        assert net.encode(pictures(3)).latent_dist.mean.abs().max() < 1000


def test_wide_codes_start_with_as_many_numbers_as_fit() -> None:
    quantizer = {"type": "vq", "num_codes": 16, "code_channels": 32, "kmeans_iterations": 2}
    net = build_discrete(
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        quantizer=quantizer,
    ).eval()
    codes = patch_codes(pictures(3), levels=2)
    start_encoder(net, codes, d=32, whiten=False)
    with torch.no_grad():
        features = net.encode(pictures(3)).latents
    assert (features.std((0, 2, 3)) > 0).sum() == 4
