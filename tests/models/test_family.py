"""Networks other than AutoencoderKL: training wrappers, and fine-tuning from other kinds."""

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC

from latentvae.models import FAMILIES, build_autoencoder_kl
from latentvae.models.conv.asymmetric import (
    AsymmetricTrainingWrapper,
    build_asymmetric_kl,
    random_masks,
)
from latentvae.models.dc.dc import DCTrainingWrapper, build_autoencoder_dc

ENCODER = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
DECODER = {"up_block_out_channels": (8, 16, 32, 32), "layers_per_up_block": 1}


def tiny_dc() -> AutoencoderDC:
    torch.manual_seed(0)
    return build_autoencoder_dc(
        block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        latent_channels=4,
        attention_levels=(2,),
        attention_head_dim=8,
    )


def test_dc_has_no_posterior_and_decodes_what_it_encodes() -> None:
    net, images = tiny_dc(), torch.rand(2, 3, 32, 48) * 2 - 1
    out = DCTrainingWrapper(net)(images)
    assert out.kl is None
    assert out.latents[0].z.shape == (2, 4, 8, 12)
    assert torch.equal(out.recon, net(images).sample)
    assert any("attn" in name for name, _ in net.named_modules())


def test_masks_are_whole_for_half_of_the_images_and_boxes_for_the_rest() -> None:
    torch.manual_seed(0)
    masks = random_masks(torch.zeros(400, 3, 20, 30))
    assert masks.shape == (400, 1, 20, 30)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    whole = masks.flatten(1).amin(1) == 1
    assert 160 < whole.sum() < 240
    for mask in masks[~whole][:50, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()  # one box
        assert rows.sum() >= 4 and columns.sum() >= 6  # a quarter of each side, to a pixel


def test_a_mask_of_ones_is_no_picture_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = build_asymmetric_kl(**ENCODER, **DECODER)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    wrapper = AsymmetricTrainingWrapper(net)
    monkeypatch.setattr(
        "latentvae.models.conv.asymmetric.random_masks", lambda images: images[:, :1] * 0 + 1
    )
    out = wrapper(images, sample=False)
    assert torch.equal(out.recon, net.decode(out.latents[0].mean).sample)
    out.recon.sum().backward()
    assert all(p.grad is not None for p in net.decoder.parameters())  # DDP needs all to be used


def test_outside_of_the_mask_the_picture_is_seen() -> None:
    torch.manual_seed(0)
    net = build_asymmetric_kl(**ENCODER, **DECODER)
    images, z = torch.rand(1, 3, 32, 32), torch.randn(1, 4, 4, 4)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    one = net.decode(z, image=images, mask=mask).sample
    other = images.clone()
    other[..., 24:] = 0
    assert not torch.equal(one, net.decode(z, image=other, mask=mask).sample)


def test_a_larger_decoder_keeps_the_encoder() -> None:
    torch.manual_seed(0)
    base = build_autoencoder_kl(**ENCODER).eval()
    base.register_to_config(scaling_factor=0.3)
    larger = FAMILIES["asymmetric"].adapt(base, {**ENCODER, **DECODER, "layers_per_block": 2})
    assert isinstance(larger, AsymmetricAutoencoderKL)
    images = torch.rand(2, 3, 32, 40) * 2 - 1
    ours, theirs = (net.encode(images).latent_dist.parameters for net in (larger, base))
    assert torch.equal(ours, theirs)
    assert larger.config["scaling_factor"] == 0.3
    assert larger.config["layers_per_down_block"] == 1  # the base's own


def test_another_kind_is_refused() -> None:
    assert FAMILIES["kl"].adapt(tiny_dc(), {}) is None
    assert FAMILIES["dc"].adapt(build_autoencoder_kl(**ENCODER), {}) is None
    without = build_autoencoder_kl(**ENCODER, use_quant_conv=False)
    assert FAMILIES["asymmetric"].adapt(without, {**ENCODER, **DECODER}) is None


def test_a_larger_decoder_is_for_the_encoder_it_fits() -> None:
    options = {**ENCODER, **DECODER}
    grey = build_autoencoder_kl(**ENCODER, image_channels=1).eval()
    larger = FAMILIES["asymmetric"].adapt(grey, options)
    assert larger is not None and larger.config["in_channels"] == 1
    images = torch.rand(1, 1, 32, 32) * 2 - 1
    assert torch.equal(larger.encode(images)[0].mean, grey.encode(images)[0].mean)
    assert larger.decode(larger.encode(images)[0].mean).sample.shape == images.shape
    for other in ({"mid_block_add_attention": False}, {"attention_levels": (3,)}):
        assert (
            FAMILIES["asymmetric"].adapt(build_autoencoder_kl(**ENCODER, **other), options) is None
        )
    relu = build_autoencoder_kl(**ENCODER)
    relu.register_to_config(act_fn="relu")
    assert FAMILIES["asymmetric"].adapt(relu, options) is None


@pytest.mark.parametrize("architecture", ["kl", "asymmetric", "dc"])
def test_the_config_tells_the_options(architecture: str) -> None:
    """A network built from its config has the same parameters."""
    options = {
        "kl": {**ENCODER, "attention_levels": (1, 3), "use_quant_conv": False},
        "asymmetric": {**ENCODER, **DECODER, "latent_channels": 6},
        "dc": {
            "block_out_channels": (8, 16, 16),
            "encoder_layers_per_block": (1, 2, 1),
            "decoder_layers_per_block": (2, 1, 1),
            "attention_levels": (1,),
            "attention_head_dim": 8,
        },
    }[architecture]
    kind = FAMILIES[architecture]
    net = kind.build(**options)
    shape = kind.options_of(dict(net.config))
    assert {name: shape[name] for name in options} == options
    again = kind.build(**shape)
    assert [p.shape for p in again.parameters()] == [p.shape for p in net.parameters()]
