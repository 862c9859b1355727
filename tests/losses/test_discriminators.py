import torch

from latentvae.losses.adversarial import hinge_critic_loss
from latentvae.losses.discriminators import PatchGAN


def test_logits_are_not_bounded() -> None:
    """The hinge asks for logits beyond 1 and -1, which a sigmoid at the end would keep away."""
    critic = PatchGAN(channels=8, num_layers=2, norm_groups=4)
    images = torch.randn(2, 3, 32, 32)
    logits = critic(images)
    with torch.no_grad():
        list(critic.parameters())[-2].mul_(1000.0)  # the last layer's weight; its bias is 0
    torch.testing.assert_close(critic(images), 1000.0 * logits, rtol=1e-4, atol=1e-3)
    assert critic(images).abs().max() > 1.0


def test_it_learns_to_tell_two_kinds_of_images_apart_to_the_margins() -> None:
    critic = PatchGAN(channels=8, num_layers=1, norm_groups=4)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    smooth = torch.rand(4, 3, 1, 1).expand(4, 3, 16, 16)
    noise = torch.randn(4, 3, 16, 16)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        real, fake = critic(torch.cat([smooth, noise])).chunk(2)
        losses.append(hinge_critic_loss(real, fake))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < 0.05
