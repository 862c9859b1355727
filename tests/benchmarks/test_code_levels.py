"""The comparison of two levels with one: what the predictor reads, and errors at equal bits."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from latentvae.errors import UserError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "code_levels.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_code_levels", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the option parser reads the source through it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("context", [False, True])
@torch.no_grad()
def test_a_code_is_predicted_from_known_codes_alone(
    script: ModuleType, top: bool, context: bool
) -> None:
    torch.manual_seed(0)
    model = script.Predictor(8, top=top, context=context)
    tops, bottoms = torch.randint(8, (1, 4, 4)), torch.randint(8, (1, 8, 8))
    before = model(tops, bottoms)

    # another bottom code changes only the predictions to its right and below
    other = bottoms.clone()
    other[0, 3, 5] = (other[0, 3, 5] + 1) % 8
    changed = (model(tops, other) != before).any(3)[0].nonzero().tolist()
    assert changed == ([[3, 6], [4, 5]] if context else [])

    # another top code changes only the predictions near it
    other = tops.clone()
    other[0, 0, 0] = (other[0, 0, 0] + 1) % 8
    changed = (model(other, bottoms) != before).any(3)[0]
    assert changed[:4, :4].all() == top and not changed[4:].any() and not changed[:, 4:].any()


def test_errors_are_compared_at_equal_bits(script: ModuleType) -> None:
    one = {
        "one level, 4 codes, seed 1": {"bits": 100.0, "mse": 0.4},
        "one level, 8 codes, seed 1": {"bits": 200.0, "mse": 0.2},
        "one level, 8 codes, seed 2": {"bits": 150.0, "mse": 9.0},
    }
    for bits, expected in ((150.0, 0.3), (100.0, 0.4), (99.0, None), (201.0, None)):
        two = {"two levels, 4 codes, seed 1": {"bits": bits, "mse": 0.1, "codes": 4}}
        [found] = script.compared({"runs": two | one}, 1)
        assert found["one_level_mse"] == pytest.approx(expected) and found["bits"] == bits
        assert script.compared({"runs": two}, 1) == []


def test_crops_are_parts_of_their_photos(script: ModuleType) -> None:
    photos = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)
    crops = script.RandomCrops(photos, side=2, seed=0)
    parts = script.as_images(photos).unfold(2, 2, 1).unfold(3, 2, 1).movedim(1, 3)
    known = torch.stack([parts, parts.flip(5)], dim=1).flatten(1, 3)  # (2, 18, 3, 2, 2)

    found = torch.stack([crops([0, 1]) for _ in range(50)], dim=1)  # (2, 50, 3, 2, 2)
    equal = (found[:, :, None] == known[:, None]).flatten(3).all(3)
    assert equal.any(2).all()  # each crop is a window of its own photo, or mirrored
    assert (equal.any(1).sum(1) > 12).all()  # windows and mirror images vary


def test_a_crop_larger_than_the_photos_is_one_sentence(script: ModuleType, tmp_path: Path) -> None:
    options = script.Options(data="a", validation_data="b", json=tmp_path / "out.json", crop=225)
    with pytest.raises(UserError, match=r"crop must be from 1 to resolution, 224 \(got 225\)"):
        script.run(options)
