"""Vision transformers: positions, what each patch sees, heads, checkpointing and outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.compute.compilation import compile_blocks
from latentvae.errors import UserError
from latentvae.models import FAMILIES, ViTAutoencoderKL, ViTTokenizer, family_of
from latentvae.models.vit.networks import to_pixels
from latentvae.models.vit.rotary import BASE, grid, rotate, rotations
from tests.tiny import TINY, VIT, images, largest, vit_kl, vit_vq

NETS = {name: TINY[name] for name in ("vit_sphere", "vit_fsq", "vit_kl", "vit_kl_conv")}
D = 16  # channels of a head in the tests of positions
# Positions.


def logits(height: int, width: int, query: Tensor, key: Tensor) -> Tensor:
    """Logits (h, w, h, w) of one query and one key (D,) that stand at every position."""
    turns = rotations(grid(height, width), channels=D)
    queries, keys = (rotate(x.expand(1, 1, height * width, D), turns)[0, 0] for x in (query, key))
    return (queries @ keys.T).view(height, width, height, width)


def test_logits_depend_only_on_the_offset() -> None:
    found = logits(5, 7, *torch.randn(2, D).unbind())
    for down, right in [(0, 0), (1, 0), (0, 1), (2, 3), (3, -4)]:
        row, column = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
        inside = (row + down < 5) & (0 <= column + right) & (column + right < 7)
        row, column = row[inside], column[inside]
        values = found[row, column, row + down, column + right]
        assert values.max() - values.min() < 1e-4
    assert abs(found[0, 0, 1, 0] - found[0, 0, 0, 1]) > 1e-3  # rows are no columns


def test_logits_are_those_of_complex_rotations() -> None:
    """RoFormer, eq. 12: the real part of q conj(k) e^(i m theta), summed over planes."""
    query, key = torch.randn(2, D).double().unbind()
    angles = BASE ** -(torch.arange(D // 4).double() * 4 / D)
    turn = torch.cat([2 * angles, -3 * angles])  # the query is 2 rows below, 3 columns to the left
    planes = [torch.complex(x[: D // 2], x[D // 2 :]) for x in (query, key)]
    expected = (planes[0] * planes[1].conj() * torch.polar(torch.ones(D // 2).double(), turn)).sum()
    found = logits(4, 6, query.float(), key.float())[3, 1, 1, 4]
    torch.testing.assert_close(found, expected.real.float())


def test_the_size_of_the_grid_does_not_move_a_position() -> None:
    small, large = (rotations(grid(*size), channels=D) for size in ((2, 3), (4, 5)))
    corner = large.unflatten(1, (4, 5))[:, :2, :3].flatten(1, 2)
    assert torch.equal(small, corner)


# What each patch sees.


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [(4, 4), (8, 40), (40, 8), (28, 20)])
@torch.no_grad()
def test_any_multiple_of_the_patch_works(name: str, size: tuple[int, int]) -> None:
    net: Any = NETS[name]()
    z = family_of(net).encode(net, images(*size))
    assert z.shape[2:] == (size[0] // 4, size[1] // 4)
    assert family_of(net).decode(net, z).shape[2:] == size


def test_other_sizes_are_an_error() -> None:
    with pytest.raises(UserError, match=r"multiples of patch_size 4 \(got 8 x 10 pixels\)"):
        vit_kl().encode(images(8, 10))


def test_every_latent_depends_on_every_patch() -> None:
    x = images(12, 20).requires_grad_()
    vit_kl().encode(x).latent_dist.mean[0, :, 2, 4].sum().backward()
    assert x.grad is not None
    patches = F.max_pool2d(x.grad.abs(), 4).amax(1)
    assert patches.shape == (1, 3, 5) and patches.min() > 1e-6


def test_every_patch_depends_on_every_latent() -> None:
    z = torch.randn(1, 4, 3, 5, requires_grad=True)
    vit_kl().decode(z).sample[0, :, :4, :4].sum().backward()
    assert z.grad is not None and z.grad.abs().amax(1).min() > 1e-6


@torch.no_grad()
def test_a_token_knows_its_place() -> None:
    """Without positions, a transformer would permute its outputs as its inputs are permuted."""
    net: Any = vit_kl().encoder.transformer
    maps = torch.randn(1, 16, 3, 5)
    assert largest(net(maps.flip(3)).flip(3), net(maps)) > 1e-2


# Heads.


def test_patches_are_placed_as_by_pixel_shuffle() -> None:
    tokens = torch.randn(2, 3 * 16, 3, 5)
    assert torch.equal(to_pixels(tokens, patch_size=4), F.pixel_shuffle(tokens, 4))


@pytest.mark.parametrize(("head", "crosses"), [("linear", False), ("conv", True)])
def test_only_the_conv_head_sees_across_the_edge_of_a_patch(head: Any, crosses: bool) -> None:
    decoder = vit_kl(decoder_head=head).decoder
    decoder.transformer = nn.Identity()
    tokens = torch.randn(1, 24, 1, 2, requires_grad=True)
    decoder(tokens)[..., :4].sum().backward()  # pixels of the left patch
    assert tokens.grad is not None
    assert tokens.grad[..., 0].abs().max() > 0
    assert (tokens.grad[..., 1].abs().max() > 0) == crosses


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_images_are_linear_in_the_last_layer(name: str) -> None:
    net: Any = NETS[name]()
    wrapper, x = FAMILIES[family_of(net).options().architecture].wrapper(net), images(8, 12)
    before = wrapper(x, sample=False).recon
    wrapper.last_layer.mul_(2.0)
    net.decoder.conv_out.bias.mul_(2.0)
    torch.testing.assert_close(wrapper(x, sample=False).recon, 2.0 * before)


def test_logit_laplace_gives_two_maps_for_each_channel() -> None:
    net = vit_vq("sphere", likelihood="logit_laplace")
    codes = net.quantize.codes(net.tokenize(images(8, 8)).indices)
    assert net.decode_parameters(codes).shape == (1, 6, 8, 8)
    assert net.decode(codes, force_not_quantize=True).sample.shape == (1, 3, 8, 8)


# Training.


@pytest.mark.parametrize("name", NETS)
def test_checkpointed_gradients_are_equal(name: str) -> None:
    net: Any = NETS[name]().train()
    wrapper, x = family_of(net).wrapper(net), images(12, 8, count=2)
    runs, gradients = [0, 0], []
    for checkpointed in (0, 1):

        def count(*_: Any, at: int = checkpointed) -> None:
            runs[at] += 1

        handle = net.decoder.transformer.blocks[0].register_forward_pre_hook(count)
        net.zero_grad()
        wrapper(x, sample=False).recon.square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        handle.remove()
        net.enable_gradient_checkpointing()
    assert runs == [1, 2]  # once more in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_muon_trains_the_matrices_of_the_blocks() -> None:
    net: Any = vit_vq("sphere", decoder_head="conv")
    names = {id(p): name for name, p in net.named_parameters()}
    chosen = {names[id(p)] for p in FAMILIES["vit_vq"].matrices(net)}
    layers = [f"attention.{name}" for name in ("query", "key", "value", "out")]
    layers += [f"feed_forward.{name}" for name in ("gate", "up", "out")]
    blocks = ["encoder.transformer.blocks.0"]
    blocks += [f"decoder.transformer.blocks.{i}" for i in range(2)]
    expected = {f"{block}.{layer}.weight" for block in blocks for layer in layers}
    assert chosen == expected | {"decoder.head.expand.weight", "decoder.head.conv.weight"}


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_give_the_same_images() -> None:
    torch.compiler.reset()
    net = vit_kl()
    expected = net(images(8, 12)).sample
    assert compile_blocks(net, backend="aot_eager") == 3
    torch.testing.assert_close(net(images(8, 12)).sample, expected)


def test_the_first_blocks_keep_the_scale_of_their_input() -> None:
    net: Any = vit_kl(encoder_blocks=12).encoder.transformer
    seen: list[Tensor] = []
    net.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.randn(1, 16, 8, 8))
    assert 0.5 < seen[0].std() < 3.0


# diffusers' methods.


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_a_tuple_holds_what_the_output_holds(name: str) -> None:
    net: Any = NETS[name]()
    x = images(8, 12)
    encoded, (first,) = net.encode(x), net.encode(x, return_dict=False)
    if hasattr(encoded, "latent_dist"):
        assert torch.equal(encoded.latent_dist.parameters, first.parameters)
    else:
        assert torch.equal(encoded.latents, first)
    assert torch.equal(net(x).sample, net(x, return_dict=False)[0])


@torch.no_grad()
def test_forward_decodes_the_mode_or_a_sample() -> None:
    net, x = vit_kl(), images(8, 8)
    posterior = net.encode(x).latent_dist
    assert torch.equal(net(x).sample, net.decode(posterior.mode()).sample)
    seed = torch.Generator().manual_seed
    sampled = net(x, sample_posterior=True, generator=seed(3)).sample
    assert torch.equal(sampled, net.decode(posterior.sample(seed(3))).sample)


@torch.no_grad()
def test_shards_load_in_bfloat16(tmp_path: Path) -> None:
    net = vit_kl()
    net.save_pretrained(tmp_path, variant="bf16", max_shard_size="20KB")
    loaded: Any = ViTAutoencoderKL.from_pretrained(
        tmp_path, variant="bf16", torch_dtype=torch.bfloat16
    )
    expected = net.bfloat16()(images(8, 8).bfloat16()).sample
    assert torch.equal(loaded(images(8, 8).bfloat16()).sample, expected)


# Options.


def test_the_defaults_are_vit_vqgan_base() -> None:
    """12 + 12 blocks, each with as many weights as a block with a plain feed-forward layer."""
    with torch.device("meta"):
        net: Any = ViTTokenizer()
    blocks = [block for half in (net.encoder, net.decoder) for block in half.transformer.blocks]
    plain = (4 + 2 * 4) * 768**2  # attention, and two layers with 4 x 768 channels between
    assert len(blocks) == 24
    for block in blocks:
        assert sum(p.numel() for p in block.parameters()) == pytest.approx(plain, rel=1e-3)
    assert (net.quantize.num_codes, net.quantize.code_channels) == (8192, 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_head_dim": 10}, "attention_head_dim 10 is not a multiple of 4"),
        (
            {"encoder_channels": 20},
            "encoder_channels 20 is not a multiple of attention_head_dim 8. The nearest multiple "
            "is 16.",
        ),
    ],
)
def test_heads_that_do_not_fit_are_named(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FAMILIES["vit_kl"].options(**VIT | changes)
