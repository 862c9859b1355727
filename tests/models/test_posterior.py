"""A fixed variance of the posterior in every network that has one, and the wrapper's bottleneck."""

from typing import Any

import pytest
import torch

from latentvae.bottlenecks.flow import FlowBottleneck
from latentvae.models import FAMILIES
from latentvae.models.posterior import PosteriorConfig, PosteriorFamily
from latentvae.models.table import MODELS
from tests.tiny import TINY, asymmetric, images, kl, vit_kl

NETS: dict[str, tuple[str, Any]] = {
    "kl": ("kl", kl),
    "kl without quant_conv": ("kl", lambda: kl(use_quant_conv=False)),
    "asymmetric": ("asymmetric", asymmetric),
    "vit_kl": ("vit_kl", vit_kl),
}


def test_every_network_with_a_posterior_has_the_options() -> None:
    for name, options in MODELS.items():
        has_posterior = options().posterior == "gaussian"
        assert has_posterior == issubclass(options, PosteriorConfig), name
        assert has_posterior == isinstance(FAMILIES[name], PosteriorFamily), name
    assert TINY.keys() >= {"kl", "asymmetric", "vit_kl"}


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_the_variance_is_written_and_the_mean_stays_to_the_bit(name: str) -> None:
    kind, build = NETS[name]
    family, net, batch = FAMILIES[kind], build(), images(16, 32, count=2)
    mean, logvar = family.posterior(net, batch)
    family.write_constants(net, MODELS[kind]())
    assert all(map(torch.equal, family.posterior(net, batch), (mean, logvar)))

    family.write_constants(net, MODELS[kind](posterior_logvar=-1.386))
    found, fixed = family.posterior(net, batch)
    assert torch.equal(found, mean)
    assert torch.equal(fixed, torch.full_like(mean, -1.386))


@pytest.mark.parametrize("name", NETS)
def test_a_wrapper_draws_what_the_network_draws(name: str) -> None:
    """Also before the variance is written: the bottleneck does not read the network's."""
    kind, build = NETS[name]
    family, net, batch = FAMILIES[kind], build(), images(16, 32, count=2)
    options = MODELS[kind](posterior_logvar=-2.0, posterior_flow=2, posterior_flow_channels=8)
    wrapper = family.wrap(net, options)
    torch.manual_seed(0)
    z = wrapper(batch).latents[0].z
    family.write_constants(net, options)
    torch.manual_seed(0)
    torch.testing.assert_close(net.encode(batch).latent_dist.sample(), z)


@pytest.mark.parametrize("name", NETS)
def test_every_weight_learns_and_is_averaged(name: str) -> None:
    kind, build = NETS[name]
    net = build().train()
    options = MODELS[kind](posterior_flow=4, posterior_flow_channels=8)
    wrapper: Any = FAMILIES[kind].wrap(net, options, learn_logvar=True)
    assert isinstance(wrapper.bottleneck, FlowBottleneck)
    out = wrapper(images(16, 32, count=2))
    (out.recon.mean() + out.kl.mean() + out.output_logvar).backward()
    assert [n for n, p in wrapper.named_parameters() if p.grad is None] == []
    averaged = {id(p) for p in wrapper.averaged().parameters()}
    assert averaged == {id(p) for n, p in wrapper.named_parameters() if n != "output_logvar"}
