"""What every family promises, over the whole table; a new one is tested by its line in `tiny`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from latentvae.errors import UserError
from latentvae.export import export_network
from latentvae.latents import latent_statistics
from latentvae.models import FAMILIES, Family, TrainableFamily, calls, family_of, load_network
from latentvae.models.table import ANY, MODELS
from latentvae.tasks.autoencoder.config import TrainConfig
from tests.tiny import FOREIGN, TINY, TRAINABLE, images, largest

TRAINED = {name: FAMILIES[kind] for kind, nets in TRAINABLE.items() for name in nets}
TOKENIZERS = [
    *TRAINABLE["vq"],
    *TRAINABLE["vit_vq"],
    *TRAINABLE["vqvae2"],
    "stock_vq",
    "movq",
    "amused",
]

# The table itself.


def test_every_family_has_a_tiny_network_and_options_of_its_name() -> None:
    assert TRAINABLE.keys() == FAMILIES.keys() == MODELS.keys()
    for name, options in MODELS.items():
        assert options().architecture == name


@pytest.mark.parametrize("name", TINY)
def test_a_network_finds_its_family(name: str) -> None:
    family = family_of(TINY[name]())
    assert family is TRAINED.get(name, family)
    assert (family is ANY) == (name == "tiny")


def test_a_network_of_no_known_class_is_asked_for_its_outputs() -> None:
    assert family_of(torch.nn.Linear(1, 1)) is ANY  # type: ignore[arg-type]


# Images and latents.


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_shapes_are_those_that_are_said(name: str) -> None:
    net: Any = TINY[name]()
    family, shape = family_of(net), family_of(net).latent_shape(net)
    probed = Family.latent_shape(family, net)
    assert (shape.f, shape.channels) == (probed.f, probed.channels)
    height, width = (16, 16) if shape.fixed_size else (3 * 16, 5 * 16)
    z = family.encode(net, images(height, width, count=2))
    assert z.shape == (2, shape.channels, height // shape.f, width // shape.f)
    recon = family.decode(net, z)
    assert recon.shape == (2, family.image_channels(net), height, width)
    assert z.isfinite().all() and recon.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(TINY) - {"rae"}))
@torch.no_grad()
def test_odd_sizes(name: str) -> None:
    """Sides that f does not divide, where the family says that any is taken."""
    net: Any = TINY[name]()
    family = family_of(net)
    f, multiple = family.latent_shape(net).f, family.side_multiple(net)
    height, width = (3 * f, 5 * f) if multiple > 1 else (3 * f + 1, 5 * f - 1)
    z = family.encode(net, images(height, width))
    recon = family.decode(net, z)
    assert recon.shape[2:] == (z.shape[2] * f, z.shape[3] * f)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_the_posterior_is_what_encode_draws_from(name: str) -> None:
    net: Any = TINY[name]()
    family, batch = family_of(net), images(16, 16)
    mean, logvar = family.posterior(net, batch)
    assert torch.equal(mean, family.encode(net, batch))
    drawn = [
        family.encode(net, batch, sample=True, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2]) == (logvar is None)
    assert family.has_posterior in (None, logvar is not None)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_pass_is_the_same_again_and_in_bfloat16(name: str) -> None:
    net: Any = TINY[name]()
    family, batch = family_of(net), images(16, 16)
    z = family.encode(net, batch)
    assert torch.equal(z, family.encode(net, batch))
    assert torch.equal(family.decode(net, z), family.decode(net, z))
    half = net.to(torch.bfloat16)
    rounded = family.encode(half, batch.bfloat16())
    recon = family.decode(half, rounded)
    assert rounded.dtype == recon.dtype == torch.bfloat16
    assert largest(rounded.float(), z) < 0.1 * z.abs().max()
    assert recon.isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_normalisation_is_undone(name: str) -> None:
    net: Any = TINY[name]()
    normalization = family_of(net).normalization(net)
    z = torch.randn(1, family_of(net).latent_shape(net).channels, 4, 4)
    torch.testing.assert_close(normalization.invert(normalization.apply(z)), z)


# Codes.


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_tokens_are_tokens_of_their_images(name: str) -> None:
    net: Any = TINY[name]()
    family, codes = family_of(net), family_of(net).codes(net)
    assert codes is not None
    z = family.encode(net, images(16, 24, count=2))
    indices = family.tokenize(net, z)
    levels = (codes.levels,) if codes.levels > 1 else ()
    assert indices.shape == (2, *levels, *z.shape[2:]) and indices.dtype == torch.int64
    assert 0 <= indices.min() and indices.max() < codes.number
    decoded = family.decode_indices(net, indices)
    assert largest(decoded, family.decode_without_search(net, indices)) < 1e-4
    if name != "amused":  # which decodes codes by index alone
        assert largest(decoded, family.decode(net, z)) < 1e-4


@pytest.mark.parametrize("name", sorted(set(TINY) - set(TOKENIZERS)))
def test_without_codes_nothing_is_tokenised(name: str) -> None:
    net: Any = TINY[name]()
    assert calls.codes(net) is calls.num_codes(net) is None and calls.num_levels(net) == 1
    with pytest.raises(UserError, match="is no tokenizer"):
        calls.tokenize(net, torch.zeros(1, 4, 2, 2))


# Training.


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("sample", [True, False])
def test_a_wrapper_gives_finite_gradients_to_every_weight(name: str, sample: bool) -> None:
    net: Any = TINY[name]().train()
    f = family_of(net).latent_shape(net).f
    wrapper = TRAINED[name].wrapper(net, learn_logvar=True)
    out = wrapper(images(4 * f, 6 * f, count=2), sample=sample)
    loss = out.recon.square().mean() + wrapper.output_logvar * out.latents[0].z.square().mean()
    for term in out.latent_losses.values():
        loss = loss + term
    if out.kl is not None:
        loss = loss + out.kl.mean()
    loss.backward()
    without = [n for n, p in wrapper.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in wrapper.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", TRAINED)
def test_a_frozen_encoder_makes_the_same_latents(name: str) -> None:
    """After a step on everything that still learns, and a pass in train mode."""
    net: Any = TINY[name]().train()
    family, batch = TRAINED[name], images(16, 16, count=2)
    family.freeze_encoder(net)
    assert not any(p.requires_grad for part in family.latent_side(net) for p in part.parameters())
    with torch.no_grad():
        before = family.encode(net, batch)
    assert all(p.requires_grad for p in family.decoder(net).parameters())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    family.wrapper(net)(batch).recon.square().mean().backward()
    decoder = [p.clone() for p in family.decoder(net).parameters()]
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(family.encode(net, batch), before)
    after = list(family.decoder(net).parameters())
    assert any(not torch.equal(p, q) for p, q in zip(after, decoder, strict=True))


@pytest.mark.parametrize("name", TRAINED)
def test_the_head_gives_what_latents_are_made_of(name: str) -> None:
    net: Any = TINY[name]()
    family, seen = TRAINED[name], []
    handle = family.latent_head(net).register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        z = family.encode(net, images(16, 16))
    handle.remove()
    assert torch.equal(seen[0][:, : z.shape[1]], z)


@pytest.mark.parametrize("name", TRAINED)
def test_gradient_checkpointing_is_there_unless_it_says_why_not(name: str) -> None:
    net: Any = TINY[name]().train()
    family = TRAINED[name]
    if family.why_no_checkpointing:
        with pytest.raises(ValueError):
            net.enable_gradient_checkpointing()
        return
    net.enable_gradient_checkpointing()
    family.wrapper(net)(images(16, 16)).recon.mean().backward()
    assert all(p.grad is not None for p in family.decoder(net).parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapted_network_is_built_again_from_its_own_options(kind: str) -> None:
    family: TrainableFamily = FAMILIES[kind]
    net: Any = next(iter(TRAINABLE[kind].values()))()
    assert family.adapt(net, {}) is net
    own = family.merge_options(family.options().shape(), dict(net.config))
    again = family.build(**own)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }
    others = [TRAINABLE[other] for other in FAMILIES if other != kind]
    for nets in others:
        found = family.adapt(next(iter(nets.values()))(), family.options().shape())
        assert found is None or type(found) is family.network


# Files.


@pytest.mark.parametrize("name", sorted(set(TINY) - {"rae"}))
@torch.no_grad()
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    net: Any = TINY[name]()
    net.save_pretrained(tmp_path)
    loaded: Any = load_network(tmp_path)
    assert type(loaded) is type(net)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert largest(calls.encode(loaded, images(16, 16)), calls.encode(net, images(16, 16))) < 1e-5


@pytest.mark.parametrize("name", TRAINED)
@torch.no_grad()
def test_an_export_is_of_a_class_that_the_family_names(name: str, tmp_path: Path) -> None:
    """`export_network` itself compares what it loads back."""
    net: Any = TINY[name]()
    family, batch = TRAINED[name], images(16, 16, count=2)
    statistics = latent_statistics(net, [batch])
    report = export_network(
        net, tmp_path / "export", statistics=statistics, sample_size=16, probe=batch
    )
    loaded = load_network(tmp_path / "export")
    assert type(loaded) in family.exports and type(loaded).__name__ == report.network
    usage = family_of(loaded).usage(loaded)
    card = (tmp_path / "export" / "README.md").read_text()
    assert usage is not None
    assert f"from {usage.package} import {report.network}" in card
    stock = not family.why_not_stock(net.config)
    if calls.codes(net) is not None:
        assert (report.network != family.network.__name__) <= stock


@pytest.mark.parametrize("name", TRAINED)
def test_a_network_is_one_of_diffusers(name: str) -> None:
    """Attributes that its pipelines and trainers read."""
    net: Any = TINY[name]()
    assert (net.dtype, net.device) == (torch.float32, torch.device("cpu"))
    assert net.config["in_channels"] == 3 and net.config["scaling_factor"]
    assert net._supports_gradient_checkpointing == (not TRAINED[name].why_no_checkpointing)
    assert net.num_parameters() == sum(p.numel() for p in net.parameters())
    assert type(net).from_config(net.config).config["scaling_factor"]


# Options.


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_family_cannot_do_is_refused_by_name(kind: str) -> None:
    family, options = FAMILIES[kind], MODELS[kind]()
    run: dict[str, Any] = {"lookup_from_codebook": True}
    can = options.has_codes and not family.why_not_stock(options.shape())
    _check({"model": {"architecture": kind}, "run": run}, fits=can, named="lookup_from_codebook")
    run = {"gradient_checkpointing": True}
    can = not family.why_no_checkpointing
    _check({"model": {"architecture": kind}, "run": run}, fits=can, named="gradient_checkpointing")
    run = {"export_profile": "sd3"}
    can = "sd3" in family.profiles
    _check({"model": {"architecture": kind}, "run": run}, fits=can, named="export_profile")


def _check(values: dict[str, Any], *, fits: bool, named: str) -> None:
    if fits:
        TrainConfig.model_validate(values)
        return
    with pytest.raises(ValueError, match=named):
        TrainConfig.model_validate(values)


def test_foreign_networks_are_not_trained() -> None:
    for build in FOREIGN.values():
        assert family_of(build()) not in FAMILIES.values()
