"""The prior's network: causal, conditional, saved and loaded without loss."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from latentvae.priors.transformer import NO_CLASS, Text, TokenTransformer, places_of


def tiny(**options: object) -> TokenTransformer:
    """A network of two levels with random output layers, so that all inputs count."""
    torch.manual_seed(0)
    shape = {"num_codes": 11, "levels": [(1, 2), (2, 4)], "width": 32, "depth": 2, "num_heads": 4}
    net = TokenTransformer(**{**shape, **options}).eval()
    for output in net.outputs:
        nn.init.normal_(output.weight)
    return net


def test_it_starts_at_equally_likely_codes() -> None:
    net = TokenTransformer(num_codes=11, levels=[(2, 2)], width=32, depth=1, num_heads=4)
    indices = torch.randint(11, (3, 4))
    loss = F.cross_entropy(net(indices).logits.flatten(0, 1), indices.flatten())
    assert loss.item() == pytest.approx(math.log(11), abs=1e-6)


@pytest.mark.parametrize("place", range(10))
def test_a_token_depends_on_the_tokens_before_it_alone(place: int) -> None:
    net, indices = tiny(), torch.randint(11, (1, 10))
    other = indices.clone()
    other[0, place] = (other[0, place] + 1) % 11
    changed = (net(indices).logits != net(other).logits).any(dim=2)[0]
    assert changed.tolist() == [i > place for i in range(10)]


def test_classes_and_their_absence_change_every_logit() -> None:
    net, indices = tiny(num_classes=3), torch.randint(11, (1, 10)).expand(4, -1)
    logits = net(indices, torch.tensor([0, 1, NO_CLASS, NO_CLASS])).logits
    assert torch.equal(logits[2], logits[3]) and torch.equal(logits[2], net(indices).logits[0])
    assert (logits[0] != logits[1]).any(dim=1).all() and (logits[0] != logits[2]).any(dim=1).all()


def test_padding_of_a_text_changes_nothing() -> None:
    net, indices = tiny(text_channels=6), torch.randint(11, (1, 10))
    states, mask = torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool)
    padded = Text(F.pad(states, (0, 0, 0, 2), value=9.0), F.pad(mask, (0, 2)))
    short, long = (net(indices, text=text).logits for text in (Text(states, mask), padded))
    torch.testing.assert_close(short, long, atol=1e-5, rtol=0)
    dropped = net(indices, text=Text(states, torch.zeros_like(mask))).logits
    torch.testing.assert_close(dropped, net(indices).logits, atol=1e-5, rtol=0)
    assert (short - dropped).abs().max() > 1e-2


def test_levels_share_places_of_the_image() -> None:
    coarse, *fine = places_of([(1, 1), (2, 2)])
    assert torch.equal(coarse, torch.stack(fine).mean(dim=0))
    assert fine[1].tolist() == [0.0, 1.0]  # row 0, column 1


def test_checkpointing_has_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        net = tiny(dropout=0.0).train()
        if checkpointing:
            net.enable_gradient_checkpointing()
        net(torch.arange(10)[None]).logits.square().mean().backward()
        found.append([p.grad for p in net.blocks.parameters()])
    torch.testing.assert_close(*found)


def test_it_loads_as_it_was_saved(tmp_path: Path) -> None:
    net = tiny(num_classes=2, class_names=["a", "b"], item_shape=[10])
    net.save_pretrained(tmp_path)
    loaded, indices = TokenTransformer.from_pretrained(tmp_path), torch.randint(11, (2, 10))
    assert torch.equal(loaded(indices).logits, net(indices).logits)
    assert net(indices, return_dict=False)[0].shape == (2, 10, 11)
    assert loaded.config["class_names"] == ["a", "b"]
