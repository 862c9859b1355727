"""VQ-VAE-2: the order of its codes, the bottom conditioned on the top, and its sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.models import FAMILIES, VQVAE2, load_network
from latentvae.models.levels import join_levels, split_levels
from latentvae.tasks.autoencoder.config import load_preset
from tests.tiny import images, photos, vqvae2


def test_codes_are_one_sequence_coarsest_first_and_row_by_row() -> None:
    sizes = [(2, 3), (4, 6), (8, 12)]
    counted = torch.arange(6 * (1 + 4 + 16)).repeat(5, 1)
    maps = split_levels(counted, sizes)
    assert [level[0, 0, 1].item() for level in maps] == [1, 7, 31]
    assert [level[0, 1, 0].item() for level in maps] == [3, 6 + 6, 30 + 12]
    joined = join_levels(maps)
    assert joined.shape == (5, 21, 2, 3) and torch.equal(joined.flatten(1), counted)
    assert join_levels(maps[:1]) is maps[0]


@pytest.mark.parametrize("levels", [1, 2, 3])
@torch.no_grad()
def test_indices_decode_to_what_forward_gives(levels: int) -> None:
    net, batch = vqvae2(levels), photos()
    indices = net.tokenize(batch).indices
    assert torch.equal(net.decode_indices(indices).sample, net(batch).sample)
    assert torch.equal(net.decode_indices(indices.to(torch.uint8)).sample, net(batch).sample)
    sizes = [level.shape[1:] for level in net.maps(indices)]
    finest = 32 // 2
    assert sizes == [(finest >> i, finest >> i) for i in reversed(range(levels))]
    out = FAMILIES["vqvae2"].wrapper(net)(batch)
    assert torch.equal(out.recon, net(batch).sample)
    for latent, level in zip(out.latents, net.maps(indices), strict=True):
        assert torch.equal(latent.indices, level)


@torch.no_grad()
def test_the_bottom_is_conditioned_on_the_top_code() -> None:
    """Another top codebook changes what the bottom's quantiser reads, but not its features z."""
    net, batch = vqvae2(), photos()
    z = net.encode(batch).latents
    features, found = net.quantize_levels(z)
    top: Any = net.quantize[0]
    top.weight.copy_(top.weight.flip(0) + 1.0)
    assert torch.equal(net.encode(batch).latents, z)
    again, _ = net.quantize_levels(z)
    assert torch.equal(again[0], features[0])
    assert not torch.allclose(again[1], features[1])
    condition = net.condition[0](found[0].z)
    bottom = features[1] - condition  # the bottom's own features
    torch.testing.assert_close(net.fold([features[0], bottom]), z)


@torch.no_grad()
def test_every_level_changes_the_image() -> None:
    net = vqvae2()
    top, bottom = net.maps(net.tokenize(photos(1)).indices)
    changed = []
    for maps in ([top, bottom], [_other(top), bottom], [top, _other(bottom)]):
        changed.append(net.decode_indices(join_levels(maps)).sample)
    for image in changed[1:]:
        difference = (image - changed[0]).abs().amax(dim=(0, 1))
        assert difference[:8, :8].max() > 1e-4  # near the changed code, at the top left
    bottom_only = (changed[2] - changed[0]).abs().amax(dim=(0, 1))
    assert bottom_only[-4:, -4:].max() == 0  # beyond the decoder's reach


def _other(level: Tensor) -> Tensor:
    level = level.clone()
    level[0, 0, 0] = (level[0, 0, 0] + 1) % 32
    return level


@torch.no_grad()
def test_wrong_shapes_and_values_are_errors() -> None:
    net = vqvae2()
    with pytest.raises(UserError, match="multiples of f = 4 \\(got 8 x 10\\)"):
        net.encode(images(8, 10))
    for indices in (torch.zeros(1, 4, 2, 2).long(), torch.zeros(1, 5, 2, 2)):
        with pytest.raises(UserError, match=r"must be integers \(B, 5, h, w\)"):
            net.decode_indices(indices)
    with pytest.raises(UserError, match=r"must be in 0\.\.31 \(got 0\.\.32\)"):
        net.decode_indices(torch.tensor([0, 1, 2, 3, 32]).view(1, 5, 1, 1))
    with pytest.raises(UserError, match="code_levels must be 1 to 3"):
        VQVAE2(code_levels=4)


def test_a_pretrained_network_learns_as_the_run_says(tmp_path: Any) -> None:
    vqvae2().save_pretrained(tmp_path)
    net: Any = load_network(tmp_path)
    family = FAMILIES["vqvae2"]
    options = family.options.model_validate({"quantizer": {"codebook_decay": 0.5}})
    merged = family.merge_options(options.model_dump(), dict(net.config))
    merged.pop("scaling_factor", None)
    codes = net.tokenize(photos()).indices
    family.apply_options(net, family.options.model_validate(merged))
    assert [quantizer.ema_decay for quantizer in net.quantize] == [0.5, 0.5]
    assert merged["block_out_channels"] == [8, 8] and merged["quantizer"]["num_codes"] == 32
    assert torch.equal(net.tokenize(photos()).indices, codes)


def test_the_preset_has_the_papers_levels() -> None:
    model = load_preset("vqvae2_256").model
    with torch.device("meta"):
        net: Any = FAMILIES["vqvae2"].build(**model.shape())
        assert [level.shape[1:] for level in net.maps(torch.zeros(1, 5, 256 // 8, 32))] == [
            (32, 32),
            (64, 64),
        ]
        assert net.encode(torch.zeros(1, 3, 256, 256)).latents.shape == (1, 5 * 64, 32, 32)
    assert [(q.num_codes, q.code_channels, q.ema_decay) for q in net.quantize] == [
        (512, 64, 0.99)
    ] * 2
