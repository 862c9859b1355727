import pytest
import torch

from latentvae.models import build_autoencoder_kl, downsampling_factor
from latentvae.models.posterior import KLTrainingWrapper


@pytest.mark.parametrize("quant", [True, False])
def test_shapes_and_factor(quant: bool) -> None:
    net = build_autoencoder_kl(
        block_out_channels=(8, 8, 16), latent_channels=5, norm_num_groups=4, use_quant_conv=quant
    )
    out = KLTrainingWrapper(net)(torch.rand(2, 3, 32, 48))
    assert downsampling_factor(net) == 4
    assert out.recon.shape == (2, 3, 32, 48) and out.latents[0].z.shape == (2, 5, 8, 12)
    assert out.kl.shape == (2,) and out.output_logvar.item() == 0.0
    assert (net.quant_conv is not None) == quant


@pytest.mark.parametrize("quant", [True, False])
def test_the_posterior_starts_as_narrow_as_asked(quant: bool) -> None:
    nets = []
    for logvar in (0.0, -6.0):
        torch.manual_seed(0)
        nets.append(
            build_autoencoder_kl(
                block_out_channels=(8, 8),
                norm_num_groups=4,
                use_quant_conv=quant,
                initial_posterior_logvar=logvar,
            )
        )
    images = torch.rand(1, 3, 16, 16)
    wide, narrow = (net.encode(images).latent_dist for net in nets)
    torch.testing.assert_close(narrow.logvar, wide.logvar - 6.0)
    assert torch.equal(narrow.mean, wide.mean)


def test_attention_sits_at_the_levels_that_were_asked_for() -> None:
    net = build_autoencoder_kl(
        block_out_channels=(8, 8, 16), norm_num_groups=4, attention_levels=(2,), layers_per_block=1
    )
    down = [type(block).__name__ for block in net.encoder.down_blocks]
    up = [type(block).__name__ for block in net.decoder.up_blocks]
    assert down == ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    assert up == ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]


def test_the_output_log_variance_is_a_parameter_only_when_learned() -> None:
    net = build_autoencoder_kl(block_out_channels=(8, 8), norm_num_groups=4)
    names = [name for name, _ in KLTrainingWrapper(net).named_parameters()]
    assert "output_logvar" not in names
    learned = KLTrainingWrapper(net, output_logvar=-1.0, learn_logvar=True)
    assert learned.output_logvar.requires_grad and learned.output_logvar.item() == -1.0


def test_the_mode_draws_nothing() -> None:
    wrapper = KLTrainingWrapper(build_autoencoder_kl(block_out_channels=(8, 8), norm_num_groups=4))
    images, before = torch.rand(1, 3, 16, 16), torch.get_rng_state()
    first = wrapper(images, sample=False)
    assert torch.equal(first.recon, wrapper(images, sample=False).recon)
    assert torch.equal(before, torch.get_rng_state())
