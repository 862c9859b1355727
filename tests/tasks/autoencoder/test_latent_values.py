import math

import pytest
import torch

from latentvae.outputs import AutoencoderOutput, Latent
from latentvae.tasks.autoencoder.latent_values import latent_values


def test_values_are_over_all_latents() -> None:
    first, second = 2.0 * torch.ones(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    quiet = torch.tensor([[0.1, 90.0, 0.2], [0.1, 90.0, 0.1]])  # of 16 positions: below 0.16 nats
    out = AutoencoderOutput(
        latents=(
            Latent(z=first, kl=quiet.sum(1), kl_per_channel=quiet),
            Latent(z=second, kl=torch.tensor([1.0, 3.0])),
        )
    )
    values = {name: value.item() for name, value in latent_values(out).items()}
    elements = torch.cat([first.flatten(), second.flatten()])
    assert values == pytest.approx(
        {
            "latent/rms": elements.square().mean().sqrt().item(),
            "latent/kl_nats": 90.25 + 2.0,
            "latent/kl_bits_per_element": 92.25 / math.log(2.0) / (3 * 16 + 5 * 4),
            "latent/silent_channels": 2.0,
        }
    )


def test_latents_without_a_kl_have_a_size_alone() -> None:
    out = AutoencoderOutput(latents=(Latent(z=3.0 * torch.ones(1, 2, 2, 2)),))
    assert {name: value.item() for name, value in latent_values(out).items()} == {"latent/rms": 3.0}
