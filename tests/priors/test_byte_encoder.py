"""The text encoder over bytes: padding, both directions, cut texts, saved and loaded."""

from pathlib import Path

import torch

from latentvae.priors.byte_encoder import ByteTextEncoder
from latentvae.priors.text import encode_prompts


def tiny(**options: int) -> ByteTextEncoder:
    torch.manual_seed(0)
    return ByteTextEncoder(**{"channels": 16, "depth": 2, "num_heads": 2} | options).eval()


def test_a_text_is_its_bytes() -> None:
    words = tiny(max_bytes=4).split(["aé", "", "abcdef"])
    assert words.ids.tolist() == [[97, 195, 169, 0], [0, 0, 0, 0], [97, 98, 99, 100]]
    assert words.mask.sum(dim=1).tolist() == [3, 0, 4]
    assert tiny().split([""]).ids.shape == (1, 1)
    assert 1e6 < sum(p.numel() for p in ByteTextEncoder().parameters()) < 2e6


@torch.no_grad()
def test_padding_changes_no_state() -> None:
    net = tiny()
    alone, beside = net(net.split(["a cat"])), net(net.split(["a cat", "a much longer text", ""]))
    torch.testing.assert_close(beside.states[:1, :5], alone.states, atol=1e-5, rtol=0)
    assert beside.states.isfinite().all()


@torch.no_grad()
def test_every_state_depends_on_every_byte_and_its_place() -> None:
    net = tiny()
    base, changed, turned = (net(net.split([t])).states[0] for t in ("abcd", "abce", "bacd"))
    assert ((base - changed).abs().amax(dim=1) > 1e-6).all()
    assert ((base - turned).abs().amax(dim=1) > 1e-6).all()


def test_it_loads_as_it_was_saved(tmp_path: Path) -> None:
    net = tiny()
    net.save_pretrained(tmp_path)
    loaded = ByteTextEncoder.from_pretrained(tmp_path, use_safetensors=True)
    states = [encode_prompts(["a cat", "ÿ"], None, part).states for part in (net, loaded)]
    assert torch.equal(*states)
