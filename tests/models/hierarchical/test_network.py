"""A hierarchical VAE as a network with a variational bound, and as a code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latentvae.errors import UserError
from latentvae.models.hierarchical.config import HierarchicalConfig
from latentvae.models.hierarchical.network import HierarchicalVAE
from latentvae.models.hierarchical.top_down import draw_posterior, given
from tests.models.hierarchical.nets import SMALL, binary_images, roughen, small_net

ODD: dict[str, dict[str, Any]] = {
    "mnist": {
        "image_shape": (1, 28, 28),
        "enc_blocks": "28x1,28d2,14x1,14d2,7x1,7d7,1x1",
        "dec_blocks": "1x2,7m1,7x1,14m7,14x1,28m14,28x1",
    },
    "padded": {
        "image_shape": (1, 14, 14),
        "enc_blocks": "16d2,8d2,4d4",
        "dec_blocks": "1,4m1,8m4,16m8",
    },
    "patches": {
        "image_shape": (1, 12, 12),
        "enc_blocks": "6x1,6d3,2d2",
        "dec_blocks": "1x1,2m1,6m2",
    },
    "coarse decoder": {
        "image_shape": (1, 12, 12),
        "enc_blocks": "12d2,6d3,2d2",
        "dec_blocks": "1x1,2m1",
    },
    "colours": {
        "image_shape": (3, 8, 8),
        "likelihood": "logistic_mixture",
        "num_mixtures": 3,
    },
    "one group": {"image_shape": (1, 5, 5), "enc_blocks": "5x1", "dec_blocks": "5x1"},
    "widths": {"custom_widths": "8:4,4:12,1:6"},
    "residual": {"posterior": "residual", "std": "softplus"},
    "ladder": {"posterior": "precision"},
    "mirrored": {"links": "mirrored", "activation": "silu"},
    "no bias": {"no_bias_above": 2},
    "cells": {"block": "nvae"},
}


@pytest.mark.parametrize("name", ODD)
def test_every_kind_keeps_the_contract_of_the_bound(name: str):
    options = dict(ODD[name])
    shape = options.pop("image_shape", (1, 8, 8))
    net, images = small_net(shape, **options), binary_images(3, shape)
    bound = net(images, samples=2)

    # shapes
    assert bound.log_likelihood.shape == (2, 3)
    assert bound.kl.shape == bound.log_ratio.shape == (net.num_groups, 2, 3)
    units = sum(z[0].numel() for z in net.encode(images))
    assert bound.unit_kl is not None and bound.unit_kl.shape == (3, units)
    assert sum(net.group_sizes) == units and net.posterior_means(images) is None
    assert len(net.group_names()) == net.num_groups == len(set(net.group_names()))

    # values and gradients
    assert (bound.kl >= -1e-4).all() and (bound.log_likelihood < 0).all()
    torch.testing.assert_close(bound.unit_kl.sum(1), bound.kl.sum(0).mean(0), rtol=1e-4, atol=1e-4)
    (-bound.elbo()).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

    # images
    for made in (net.reconstruct(images), net.sample(3), net.sample(3, mean=False)):
        assert made.shape == (3, *shape) and made.abs().max() <= 1.0


def test_groups_are_named_by_resolution_and_place():
    assert small_net().group_names() == ["1x1.0", "4x4.0", "4x4.1", "8x8.0"]
    assert small_net().latent_shapes == [(2, 1, 1), (2, 4, 4), (2, 4, 4), (2, 8, 8)]


@torch.no_grad()
def test_the_mean_log_ratio_of_many_samples_is_the_kl():
    net, images = small_net(), binary_images(2)
    bound = net(images, samples=1500)
    # both are random given earlier groups, with the same mean
    error = (bound.log_ratio - bound.kl).std(1) / 1500**0.5
    assert ((bound.log_ratio - bound.kl).mean(1).abs() < 5 * error + 1e-5).all()
    assert (bound.importance() > bound.elbo()).all()


@torch.no_grad()
def test_samples_are_of_the_same_posterior():
    net, images = small_net(), binary_images(3)
    bound = net(images, samples=2)
    # the first group's KL does not depend on drawn latents
    torch.testing.assert_close(bound.kl[0, 0], bound.kl[0, 1])
    assert not torch.equal(bound.kl[1, 0], bound.kl[1, 1])
    torch.testing.assert_close(bound.kl[0, 0], net(images).kl[0, 0])


def test_detached_posteriors_keep_the_values():
    net, images = small_net(), binary_images(2)
    torch.manual_seed(3)
    usual = net(images, samples=2)
    torch.manual_seed(3)
    detached = net(images, samples=2, detach_posterior=True)
    torch.testing.assert_close(usual.log_ratio, detached.log_ratio)
    torch.testing.assert_close(usual.kl, detached.kl)


@pytest.mark.parametrize("options", [{}, {"posterior": "residual"}, {"links": "mirrored"}])
def test_detached_posteriors_have_a_gradient_through_latents_only(options: dict[str, Any]):
    net, images = small_net(**options), binary_images(2)
    weights = list(net.parameters())

    def gradients(value: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(value.sum(), weights, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, weights, strict=True)
        ]

    found = []
    for detach in (False, True):
        torch.manual_seed(3)
        found.append(gradients(net(images, detach_posterior=detach).log_ratio))

    # What is missing is the gradient of ln q at constant latents.
    torch.manual_seed(3)
    groups = net._with_images(images, [draw_posterior] * net.num_groups)[1]
    picks = [given(group.z.detach()) for group in groups]
    groups = net._with_images(images, picks)[1]
    log_q = sum(g.posterior.log_prob(g.z).sum() for g in groups if g.posterior is not None)
    assert isinstance(log_q, torch.Tensor)
    missing = gradients(log_q)

    assert max(g.abs().max() for g in missing) > 0.1
    for usual, detached, own in zip(*found, missing, strict=True):
        torch.testing.assert_close(usual, detached + own, rtol=1e-3, atol=1e-4)


def test_latents_are_an_exact_code():
    net, images = small_net().eval(), binary_images(3)
    latents = net.encode(images)
    assert [tuple(z.shape[1:]) for z in latents] == net.latent_shapes
    assert torch.equal(net.decode(latents), net.reconstruct(images))

    drawn = net.encode(images, draw=True)
    assert not torch.equal(net.decode(drawn), net.decode(latents))
    parameters = net.decode_parameters(drawn)
    assert torch.equal(net.pixels.mean(parameters), net.decode(drawn))


def test_partial_codes_give_partial_reconstructions():
    net, images = small_net().eval(), binary_images(3)
    latents = net.encode(images)
    assert torch.equal(net.partial(images, 4), net.reconstruct(images))
    assert torch.equal(net.partial(images, 2), net.decode(latents[:2]))
    assert torch.equal(net.partial(images, 0), net.sample(3, temperature=0.0))


def test_all_latents_reach_the_pixels_and_later_latents():
    net, images = small_net().eval(), binary_images(1)
    latents = net.encode(images)
    for group in range(net.num_groups):
        moved = [z + (i == group) for i, z in enumerate(latents)]
        assert not torch.equal(net.decode(moved), net.decode(latents))


def test_wrong_latents_groups_and_images_are_named():
    net, images = small_net(), binary_images(2)
    latents = net.encode(images)
    for wrong in ([], latents[1:], [*latents, latents[0]]):
        with pytest.raises(UserError, match="latents must be 1 to 4 tensors"):
            net.decode(wrong)
    with pytest.raises(UserError, match=r"groups must be 0 to 4 \(got 5\)"):
        net.partial(images, 5)
    with pytest.raises(UserError, match=r"\(1, 8, 8\) \(got \(2, 1, 8, 9\)\)"):
        net(torch.zeros(2, 1, 8, 9))


def test_a_generator_decides_the_samples():
    net = small_net().eval()

    def drawn(seed: int, **options: Any) -> torch.Tensor:
        return net.sample(2, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert torch.equal(drawn(0, mean=False), drawn(0, mean=False))
    assert not torch.equal(drawn(0, temperature=0.5), drawn(0))


def test_saved_networks_are_the_same(tmp_path: Path):
    net, images = small_net(posterior="residual", custom_widths="8:4").eval(), binary_images(2)
    net.save_pretrained(tmp_path)
    loaded = HierarchicalVAE.from_pretrained(tmp_path, use_safetensors=True)
    assert torch.equal(loaded.reconstruct(images), net.reconstruct(images))
    assert loaded.image_shape == (1, 8, 8)


def test_checkpointed_blocks_give_the_same_gradients():
    net, images = small_net(), binary_images(2)

    def gradients() -> list[torch.Tensor]:
        net.zero_grad()
        torch.manual_seed(3)
        (-net(images, samples=2).elbo()).mean().backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    usual = gradients()
    net.enable_gradient_checkpointing()
    for a, b in zip(usual, gradients(), strict=True):
        torch.testing.assert_close(a, b)


def test_batch_norm_cannot_be_checkpointed():
    with pytest.raises(UserError, match="block nvae"):
        small_net(block="nvae").enable_gradient_checkpointing()


@pytest.mark.parametrize("name", ["mnist", "residual", "cells"])
def test_bfloat16_has_the_same_bound(name: str):
    options = dict(ODD[name])
    shape = options.pop("image_shape", (1, 8, 8))
    net, images = small_net(shape, **options), binary_images(4, shape)
    torch.manual_seed(3)
    exact = net(images).elbo()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        bound = net(images)
    assert all(x.dtype == torch.float32 for x in (bound.kl, bound.log_ratio, bound.log_likelihood))
    torch.testing.assert_close(bound.elbo(), exact, rtol=0.03, atol=1.0)
    (-bound.elbo()).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_new_deep_network_is_calm():
    torch.manual_seed(0)
    deep: dict[str, Any] = SMALL | {
        "enc_blocks": "8x8,8d2,4x8,4d4,1x4",
        "dec_blocks": "1x8,4m1,4x19,8m4,8x19",
    }
    net = HierarchicalConfig(**deep).build((1, 8, 8))
    assert net.num_groups == 48
    bound = net(binary_images(4))
    (-bound.elbo()).mean().backward()
    norms = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None])
    assert norms.isfinite().all() and norms.max() < 1e3
    # the pixels start at about 1 bit each, and the KL of a group at a fraction of a nat per unit
    assert bound.log_likelihood.mean().item() == pytest.approx(-64 * 0.693, rel=0.3)
    assert bound.kl.sum(0).mean() < 48 * 30


def test_priors_start_at_standard_normals():
    torch.manual_seed(0)
    net = HierarchicalConfig(**SMALL).build((1, 8, 8))
    groups = net._with_images(binary_images(2), [draw_posterior] * net.num_groups)[1]
    for group in groups:
        assert not group.prior.mean.any() and not group.prior.log_std.any()


def test_a_new_network_starts_at_the_mean_image():
    torch.manual_seed(0)
    options: dict[str, Any] = SMALL | {"dec_blocks": "1x1,4m1"}
    net = HierarchicalConfig(**options).build((1, 8, 8))
    mean = torch.full((1, 8, 8), -0.5)
    mean[:, ::2] = 0.25
    net.start_at(mean)
    nn.init.zeros_(net.conv_out.weight)
    torch.testing.assert_close(net.sample(1)[0], mean)


def test_nan_reaches_the_bound():
    net = small_net()
    nn.init.constant_(net.decoder.gain, float("nan"))
    assert net(binary_images(2)).elbo().isnan().all()


def test_batch_statistics_are_updated_once():
    net = small_net(block="nvae")
    roughen(net)
    net(binary_images(2), detach_posterior=True)
    counts = [b for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts and all(count == 1 for count in counts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dec_blocks": "1x1,4m1,1x1"}, "dec_blocks ends at resolution 1, but"),
        ({"enc_blocks": "8d2,4x1"}, "dec_blocks has resolution 1, which enc_blocks lacks"),
        ({"enc_blocks": "6d6", "dec_blocks": "1,6m1"}, "does not fit images of side 8"),
    ],
)
def test_blocks_that_do_not_fit_are_named(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        small_net(**options)
    with pytest.raises(UserError, match=words):
        HierarchicalVAE(image_channels=1, sample_size=8, **(SMALL | options))


def test_images_must_be_square():
    with pytest.raises(UserError, match="8 x 9"):
        HierarchicalConfig(**SMALL).build((1, 8, 9))
