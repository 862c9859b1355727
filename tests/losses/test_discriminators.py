import pytest
import torch
from scipy.signal import convolve2d
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.errors import UserError
from latentvae.losses.adversarial import hinge_discriminator_loss
from latentvae.losses.discriminators import (
    PatchGAN,
    StyleGANDiscriminator,
    build_discriminator,
    power_iteration,
)


def largest_singular_values(discriminator: PatchGAN) -> list[float]:
    convs = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    return [torch.linalg.matrix_norm(c.weight.flatten(1), 2).item() for c in convs]


def test_logits_are_not_bounded() -> None:
    """The hinge asks for logits beyond 1 and -1, which a sigmoid at the end would keep away."""
    discriminator = PatchGAN(channels=8, num_layers=2, norm_groups=4)
    images = torch.randn(2, 3, 32, 32)
    logits = discriminator(images)
    with torch.no_grad():
        list(discriminator.parameters())[-2].mul_(1000.0)  # the last layer's weight; its bias is 0
    torch.testing.assert_close(discriminator(images), 1000.0 * logits, rtol=1e-4, atol=1e-3)
    assert discriminator(images).abs().max() > 1.0


def test_it_learns_to_tell_two_kinds_of_images_apart_to_the_margins() -> None:
    discriminator = PatchGAN(channels=8, num_layers=1, norm_groups=4)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    smooth = torch.rand(4, 3, 1, 1).expand(4, 3, 16, 16)
    noise = torch.randn(4, 3, 16, 16)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        real, fake = discriminator(torch.cat([smooth, noise])).chunk(2)
        losses.append(hinge_discriminator_loss(real, fake))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < 0.05


def test_spectral_norm_makes_the_largest_singular_values_one() -> None:
    discriminator = PatchGAN(channels=8, num_layers=2, norm="spectral")
    assert not any(isinstance(layer, nn.GroupNorm) for layer in discriminator.layers)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(3.0).add_(0.01)
    for _ in range(200):
        power_iteration(discriminator)
    assert largest_singular_values(discriminator) == pytest.approx([1.0] * 4, rel=1e-3)


def test_forward_passes_leave_the_power_iteration_where_it_is() -> None:
    discriminator = PatchGAN(channels=8, num_layers=2, norm="spectral").train()
    before = {name: value.clone() for name, value in discriminator.named_buffers()}
    assert len(before) == 8
    discriminator(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in discriminator.named_buffers())
    power_iteration(discriminator)
    first = [name for name in before if name.startswith("layers.0.")]  # the last layer is one row
    assert not any(torch.equal(before[name], discriminator.get_buffer(name)) for name in first)
    assert set(before) <= set(discriminator.state_dict())


def test_other_norms_have_nothing_to_iterate() -> None:
    discriminator = PatchGAN(channels=8)
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    power_iteration(discriminator)
    assert all(
        torch.equal(before[name], value) for name, value in discriminator.state_dict().items()
    )


def blurred(image: Tensor) -> Tensor:
    """An (H, W) plane under the outer product of [1, 3, 3, 1] / 8, with a border of two zeros."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    filtered = convolve2d(F.pad(image, (2, 2, 2, 2)), torch.outer(taps, taps), mode="valid")
    return torch.from_numpy(filtered)


@torch.no_grad()
def test_a_stylegan_block_is_the_papers() -> None:
    block = StyleGANDiscriminator(channels=8, num_layers=1).layers[2]
    x = torch.randn(1, 8, 6, 10)
    first, last, skip = block.main[0], block.main[3], block.skip[1]
    last.bias.normal_()
    y = 2**0.5 * F.leaky_relu(F.conv2d(x, first.weight / 72**0.5, padding=1), 0.2)
    y = torch.stack([blurred(plane) for plane in y[0]])[None]
    y = 2**0.5 * F.leaky_relu(F.conv2d(y, last.weight / 72**0.5, last.bias, stride=2), 0.2)
    small = torch.stack([blurred(plane)[1:-1:2, 1:-1:2] for plane in x[0]])[None]
    expected = (y + F.conv2d(small, skip.weight / 8**0.5)) / 2**0.5
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_stylegans_equalised_weights_keep_the_scale_of_the_features() -> None:
    discriminator = StyleGANDiscriminator(channels=32, num_layers=3)
    assert all(0.9 < p.std() < 1.1 for p in discriminator.parameters() if p.numel() > 1000)
    x = discriminator.layers[:2](torch.randn(8, 3, 64, 64))
    for block in discriminator.layers[2:5]:
        x = block(x)
        assert 0.2 < x.square().mean() < 2.0


def test_stylegans_depth_follows_from_the_image() -> None:
    for size, blocks in (((256, 256), 6), ((96, 160), 4), ((8, 8), 1)):
        discriminator = build_discriminator("stylegan", image_size=size, channels=8)
        assert isinstance(discriminator, StyleGANDiscriminator)
        assert len(discriminator.layers) == 2 + blocks + 6
        assert discriminator(torch.zeros(3, 3, *size)).shape == (3, 1, 1, 1)


def test_wrong_names_are_told_with_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"patch, stylegan .*; did you mean 'stylegan'"):
        build_discriminator("stylegan2", image_size=(64, 64))
    with pytest.raises(UserError, match=r"group, spectral, none .*; did you mean 'group'"):
        build_discriminator("patch", image_size=(64, 64), norm="groups")
    with pytest.raises(UserError, match="has no norm 'spectral'"):
        build_discriminator("stylegan", image_size=(64, 64), norm="spectral")
