"""The benchmark of likelihoods of images: both commands on small images."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.anomaly.test_image_likelihood import SIDE, write_vae

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "image_anomaly.py"
pytestmark = pytest.mark.usefixtures("own_accelerate")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_image_anomaly", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_noise(folder: Path, *, low: int, high: int, count: int, side: int = SIDE) -> Path:
    """Write pictures of uniform grey noise."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(low)
    for i in range(count):
        pixels = draws.integers(low, high, (side, side)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_flat_images_are_rated_too_likely_and_the_corrections_mend_it(
    script: ModuleType, tmp_path: Path
) -> None:
    """A model of mid-grey noise gives flat mid-grey images the larger likelihood."""
    model = write_vae(tmp_path / "vae", scale=0.1)
    background = write_vae(tmp_path / "background", scale=0.01)
    normal = write_noise(tmp_path / "normal", low=90, high=165, count=30)
    flat = write_noise(tmp_path / "flat", low=127, high=128, count=30)
    command = ["pairs", "--model", str(model), "--background", str(background)]
    data = ["--normal", str(normal), "--others", str(flat), "--max_images", "20"]
    script.main([*command, *data, "--out", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = content["rows"]
    assert row["none"] == 0 and row["complexity"] == 1 and row["ratio"] == 1
    assert content["mean_scores"][str(flat)]["none"] < content["mean_scores"][str(normal)]["none"]


def test_a_class_is_left_out_of_the_training(script: ModuleType, tmp_path: Path) -> None:
    write_noise(tmp_path / "data" / "dark", low=0, high=80, count=130, side=28)
    write_noise(tmp_path / "data" / "bright", low=170, high=255, count=130, side=28)
    data = str(tmp_path / "data")
    command = ["classes", "--train", data, "--test", data, "--out", str(tmp_path / "out")]
    options = ["--updates", "30", "--left_out", "0", "--max_images", "20", "--perturb_rate", "0"]
    script.main([*command, *options])
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    # class 0 is "bright", the first folder by name
    assert row["left_out"] == 0 and row["images"] == 10 and row["none"] > 0.9
    kept = list((tmp_path / "out" / "images-without-0").glob("*.png"))
    assert len(kept) == 130 and max(np.asarray(Image.open(path)).max() for path in kept) < 80


def test_a_wrong_command_is_one_sentence(script: ModuleType) -> None:
    with pytest.raises(script.UserError, match="must be one of pairs, classes \\(got 'pears'\\)"):
        script.main(["pears"])
