"""What every entry of the table of bottlenecks keeps, in every variant that its options name.

A new entry is tested by being in the table. Numbers are tested beside each bottleneck, in
tests/bottlenecks.

`B` batch, `C` feature channels, `D` code width, `h w` positions, `K` codes, `L` levels.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from latentvae.bottlenecks import BOTTLENECKS, QUANTIZERS, Quantizer
from latentvae.bottlenecks.bottleneck_config import BottleneckConfig
from latentvae.tasks.autoencoder.config import parse

# Values to try of options whose defaults leave something out, wherever a bottleneck has them.
TRY = {"codebook_decay": 0.9, "entropy_weight": 0.1, "restart_threshold": 0.3}


def variants(config: type[BottleneckConfig]) -> Iterator[dict[str, Any]]:
    """Yield changes to the default options: none, every switch, every other choice, every `TRY`."""
    yield {}
    for name, field in config.model_fields.items():
        if name in TRY:
            yield {name: TRY[name]}
        elif field.annotation is bool:
            yield {name: not field.default}
        elif name != "type" and get_origin(field.annotation) is Literal:
            yield from ({name: v} for v in get_args(field.annotation) if v != field.default)


def cases(table: dict[str, Any]) -> Any:
    """Parametrise over all variants of a table's entries."""
    found = [(name, changes) for name, entry in table.items() for changes in variants(entry.config)]
    ids = ["-".join([name, *(f"{k}={v}" for k, v in changes.items())]) for name, changes in found]
    return pytest.mark.parametrize(("name", "changes"), found, ids=ids)


EVERY = cases(BOTTLENECKS)
DISCRETE = cases(QUANTIZERS)


def build(name: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    entry = BOTTLENECKS[name]
    return entry.build(entry.config(**changes).arguments())


def features_for(bottleneck: Any, *, batch: int = 2, size: tuple[int, int] = (3, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, bottleneck.in_channels, *size, generator=generator)


def numbers_of(found: Any) -> dict[str, Tensor]:
    """Every tensor of a bottleneck's output by name."""
    numbers: dict[str, Tensor] = {}
    for name, value in found._asdict().items():
        if value is not None:  # a flow has no KL per channel
            numbers |= value if isinstance(value, dict) else {name: value}
    return numbers


def seeded_call(bottleneck: Any, features: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return numbers_of(bottleneck(features))


def vectors_of(features: Tensor) -> Tensor:
    """(N, C)"""
    return features.movedim(1, -1).flatten(0, -2)


@EVERY
def test_it_has_the_name_of_its_module_and_config(name: str, changes: dict[str, Any]) -> None:
    entry = BOTTLENECKS[name]
    config = entry.config(**changes)
    assert name == entry.module.kind == config.type
    assert entry.discrete == issubclass(entry.module, Quantizer)


@DISCRETE
def test_a_preset_chooses_it_by_type(name: str, changes: dict[str, Any]) -> None:
    quantizer = {"type": name, **changes}
    config = parse({"model": {"architecture": "vq", "quantizer": quantizer}}, source="test")
    assert type(config.model.bottleneck) is QUANTIZERS[name].config
    assert config.model.has_kl == config.model.bottleneck.has_kl


@EVERY
@pytest.mark.parametrize("size", [(3, 5), (1, 1)])
def test_shapes(name: str, changes: dict[str, Any], size: tuple[int, int]) -> None:
    bottleneck = build(name, changes)
    found = bottleneck(features_for(bottleneck, size=size))
    assert found.z.shape == (2, bottleneck.code_channels, *size)
    assert found.z.dtype == torch.float32
    assert all(value.isfinite().all() for value in numbers_of(found).values())
    if isinstance(bottleneck, Quantizer):
        levels = () if bottleneck.num_levels == 1 else (bottleneck.num_levels,)
        assert found.indices.shape == (2, *levels, *size)
        assert found.indices.dtype == torch.int64
        assert ((found.indices >= 0) & (found.indices < bottleneck.num_codes)).all()
        assert all(loss.shape == () for loss in found.losses.values())


@EVERY
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_gradients_reach_the_features_and_are_finite(
    name: str, changes: dict[str, Any], scale: float
) -> None:
    bottleneck = build(name, changes)
    features = (scale * features_for(bottleneck)).requires_grad_()
    found = bottleneck(features)
    losses = [*getattr(found, "losses", {}).values()]
    losses += [found.kl.sum()] if hasattr(found, "kl") else []
    (found.z.square().sum() + sum(losses, start=torch.zeros(()))).backward()
    for leaf in (features, *bottleneck.parameters()):
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    if scale == 1.0:
        assert features.grad is not None and features.grad.any()


@EVERY
def test_the_same_again(name: str, changes: dict[str, Any]) -> None:
    bottleneck = build(name, changes).eval()
    features = features_for(bottleneck)
    first, again = seeded_call(bottleneck, features), seeded_call(bottleneck, features)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


@DISCRETE
def test_in_evaluation_nothing_is_random(name: str, changes: dict[str, Any]) -> None:
    quantiser = build(name, changes).eval()
    state = torch.get_rng_state()
    found = quantiser(features_for(quantiser))
    assert torch.equal(torch.get_rng_state(), state)
    assert found.statistics == {}
    warm = quantiser(features_for(quantiser), temperature=0.5)
    assert torch.equal(warm.z, found.z)


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_autocast_changes_nothing(name: str, changes: dict[str, Any], training: bool) -> None:
    bottleneck = build(name, changes).train(training)
    features = features_for(bottleneck).bfloat16()
    expected = seeded_call(bottleneck, features.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = seeded_call(bottleneck, features)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {value.dtype for value in found.values()} <= {torch.float32, torch.int64}


@EVERY
def test_half_precision_weights_give_float32(name: str, changes: dict[str, Any]) -> None:
    bottleneck = build(name, changes).bfloat16()
    found = numbers_of(bottleneck(features_for(bottleneck).bfloat16()))
    assert {value.dtype for value in found.values()} <= {torch.float32, torch.int64}


@EVERY
def test_saved_and_loaded_it_is_the_same(name: str, changes: dict[str, Any]) -> None:
    bottleneck, features = build(name, changes), features_for(build(name, changes))
    if isinstance(bottleneck, Quantizer):  # so that there is something that it has learned
        out = bottleneck(features)
        generator = torch.Generator().manual_seed(3)
        bottleneck.update(out.statistics, features=vectors_of(features), generator=generator)
    torch.manual_seed(4)
    entry = BOTTLENECKS[name]
    loaded = entry.build(entry.config(**changes).arguments())
    loaded.load_state_dict(load(save(bottleneck.state_dict())))
    expected = seeded_call(bottleneck.eval(), features)
    found = seeded_call(loaded.eval(), features)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@DISCRETE
def test_codes_of_indices_are_what_quantising_gives(name: str, changes: dict[str, Any]) -> None:
    quantiser = build(name, changes).eval()
    found = quantiser(features_for(quantiser))
    codes = quantiser.codes(found.indices)
    assert torch.equal(codes, found.z) and codes.is_contiguous()


@DISCRETE
def test_statistics_of_micro_steps_add_up(name: str, changes: dict[str, Any]) -> None:
    quantiser = build(name, changes)
    features = features_for(quantiser, batch=4)
    whole = quantiser(features).statistics
    halves = [quantiser(half).statistics for half in features.chunk(2)]
    assert all(half.keys() == whole.keys() for half in halves)
    for key, value in whole.items():
        torch.testing.assert_close(halves[0][key] + halves[1][key], value)
        assert not value.requires_grad


@DISCRETE
def test_starts_and_updates_are_the_same_on_every_rank(name: str, changes: dict[str, Any]) -> None:
    ranks = [build(name, changes) for _ in range(2)]
    vectors = torch.randn(40, ranks[0].in_channels, generator=torch.Generator().manual_seed(5))
    restarted = []
    for quantiser in ranks:
        quantiser.initialise(vectors, generator=torch.Generator().manual_seed(6), batch_vectors=30)
        statistics = quantiser(features_for(quantiser)).statistics
        restarted.append(
            quantiser.update(
                statistics, features=vectors, generator=torch.Generator().manual_seed(7)
            )
        )
    assert torch.equal(*restarted) and restarted[0].shape == ()
    first, second = (quantiser.state_dict() for quantiser in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)


@DISCRETE
def test_listed_codes_are_those_a_search_finds(name: str, changes: dict[str, Any]) -> None:
    quantiser = build(name, changes).eval()
    if reason := quantiser.why_not_listed():
        assert "\n" not in reason and not reason.endswith(".")
        with pytest.raises(NotImplementedError):
            quantiser.listed_codes()
        return
    features = features_for(quantiser)
    found, codes = quantiser(features), quantiser.listed_codes()
    assert codes.shape == (quantiser.num_codes, quantiser.code_channels)
    assert torch.equal(vectors_of(found.z), codes[found.indices.flatten()])
    distances = torch.cdist(vectors_of(features).double(), codes.double())
    assert torch.equal(distances.argmin(1), found.indices.flatten())


@EVERY
def test_what_a_run_asks_of_its_options(name: str, changes: dict[str, Any]) -> None:
    config, bottleneck = BOTTLENECKS[name].config(**changes), build(name, changes)
    found = bottleneck(features_for(bottleneck))
    losses = set(getattr(found, "losses", {}))
    assert config.has_kl == (hasattr(found, "kl") or "kl" in losses)
    assert losses - {"kl"} <= config.weights().keys()
    assert all(math.isfinite(weight) for weight in config.weights().values())
    assert all(config.temperature_at(update) > 0 for update in (0, 1, 10**6))
    assert config.num_codebooks == getattr(bottleneck, "num_codebooks", 1)
    same = config.shape_of(config.arguments())
    assert same["type"] == name and type(config)(**same).shape_of(same) == same
