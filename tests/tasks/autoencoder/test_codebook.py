"""What a codebook learns once per update: over micro-steps, and what restarts with a code."""

import pytest
import torch
from torch import Tensor, nn

from latentvae.bottlenecks.vector import VectorQuantizer
from latentvae.outputs import AutoencoderOutput, Latent
from latentvae.tasks.autoencoder.codebook import CodebookUpdate, computed_alone
from tests.tiny import TRAINABLE


def output(quantizer: VectorQuantizer, features: Tensor) -> AutoencoderOutput:
    quantized = quantizer(features)
    latent = Latent(z=quantized.z, features=features, statistics=quantized.statistics)
    return AutoencoderOutput(recon=features, latents=(latent,))


def test_micro_steps_are_one_batch() -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 3, 5, 5)
    books = []
    for parts in (1, 2):
        torch.manual_seed(1)
        quantizer = VectorQuantizer(num_codes=6, code_channels=3, ema_decay=0.5)
        update = CodebookUpdate((quantizer,), seed=0)
        for part in features.chunk(parts):
            update.add(output(quantizer, part))
        update.apply(0, optimizer=torch.optim.AdamW([nn.Parameter(features)]), averages={})
        books.append(quantizer.codebook)
    torch.testing.assert_close(books[0], books[1])
    assert books[0].abs().max() > 0.3  # it has moved from its start within 1/6


def test_what_is_known_of_a_dead_code_goes_with_it() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(num_codes=4, code_channels=2, restart_threshold=0.3)
    with torch.no_grad():
        quantizer.weight.copy_(torch.tensor([[1.0, 0], [0, 1.0], [9.0, 9.0], [8.0, 8.0]]))
        quantizer.usage.copy_(torch.tensor([1.0, 1.0, 0.1, 0.1]))
    optimizer = torch.optim.AdamW([quantizer.weight], lr=0.0)
    quantizer.weight.square().sum().backward()
    optimizer.step()
    average = torch.full((4, 2), 5.0)
    update = CodebookUpdate((quantizer,), seed=0)
    features = torch.tensor([[1.0, 0.1], [0.1, 1.0]] * 4).view(1, 2, 4, 2).contiguous()
    update.add(output(quantizer, features))
    assert isinstance(quantizer.weight, nn.Parameter)
    logged = update.apply(0, optimizer=optimizer, averages={quantizer.weight: average})
    assert logged["tokens/restarted"] == 2
    moments = optimizer.state[quantizer.weight]
    for value, kept in ((average, 5.0), (moments["exp_avg"], None), (moments["exp_avg_sq"], None)):
        assert kept is None or (value[:2] == kept).all()
        assert (value[:2] != 0).any(1).all()
    assert torch.equal(average[2:], quantizer.weight[2:])
    assert (moments["exp_avg"][2:] == 0).all() and (moments["exp_avg_sq"][2:] == 0).all()


def test_two_levels_update_as_each_alone_does() -> None:
    """With other statistics and other random vectors for restarts, but the same rule."""
    torch.manual_seed(0)
    together, alone = (
        [VectorQuantizer(num_codes=6, code_channels=3, ema_decay=0.5) for _ in range(2)]
        for _ in range(2)
    )
    for one, other in zip(together, alone, strict=True):
        other.load_state_dict(one.state_dict())
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    update = CodebookUpdate(together, seed=0)
    kept: list[dict[str, Tensor]] = [{}, {}]
    for _ in range(2):  # micro-steps
        features = (torch.randn(2, 3, side, side) for side in (2, 4))
        found = zip(together, features, strict=True)
        latents = tuple(output(quantizer, x).latents[0] for quantizer, x in found)
        update.add(AutoencoderOutput(recon=torch.zeros(1), latents=latents))
        for sums, latent in zip(kept, latents, strict=True):
            for name, value in (latent.statistics or {}).items():
                sums[name] = sums.get(name, torch.zeros(())) + value
    update.apply(0, optimizer=optimizer, averages={})
    for one, other, sums in zip(together, alone, kept, strict=True):
        other.update(sums, features=torch.zeros(1, 3), generator=torch.Generator())
        assert torch.equal(one.codebook, other.codebook)
    assert not torch.equal(together[0].codebook, together[1].codebook)


def test_each_level_restarts_at_its_own_vectors() -> None:
    torch.manual_seed(0)
    books = [VectorQuantizer(num_codes=8, code_channels=2, restart_threshold=0.3) for _ in "ab"]
    for book in books:
        book.usage.zero_()
    update = CodebookUpdate(books, seed=0)
    features = [torch.rand(1, 2, 4, 4) + 10.0 * place for place in (1, 2)]
    latents = [output(q, x).latents[0] for q, x in zip(books, features, strict=True)]
    update.add(AutoencoderOutput(recon=torch.zeros(1), latents=tuple(latents)))
    optimizer = torch.optim.AdamW([book.weight for book in books])
    logged = update.apply(0, optimizer=optimizer, averages={})
    assert logged["tokens/restarted"] >= 8  # of both levels
    for place, book in enumerate(books):
        moved = book.codebook[book.codebook[:, 0] > 1]
        assert len(moved) and ((moved // 10) == place + 1).all()


def test_nothing_is_done_without_statistics() -> None:
    quantizer = VectorQuantizer(num_codes=4, code_channels=2)
    update = CodebookUpdate((quantizer,), seed=0)
    latent = Latent(z=torch.zeros(1, 2, 1, 1), features=torch.zeros(1, 2, 1, 1))
    update.add(AutoencoderOutput(recon=torch.zeros(1), latents=(latent,)))
    assert update.apply(0, optimizer=torch.optim.AdamW(quantizer.parameters()), averages={}) == {}


@pytest.mark.parametrize("after", [0, 1])
def test_a_cleared_update_starts_anew(after: int) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(num_codes=4, code_channels=2, ema_decay=0.5)
    update = CodebookUpdate((quantizer,), seed=0)
    update.add(output(quantizer, torch.randn(1, 2, 3, 3)))
    update.clear()
    before = quantizer.codebook.clone()
    if after:
        update.add(output(quantizer, torch.randn(1, 2, 3, 3)))
    update.apply(0, optimizer=torch.optim.AdamW([nn.Parameter(before)]), averages={})
    assert torch.equal(quantizer.codebook, before) == (not after)


def test_a_rank_that_computes_alone_waits_for_no_other() -> None:
    """In train mode an entropy loss is averaged over ranks, which would wait for the others."""
    net = TRAINABLE["vq"]["lfq"]().train()
    with computed_alone(net):
        assert not net.quantize.training and net.encoder.training
    assert net.quantize.training
