"""What is learned in equal time: speeds, budgets, recipes and curves."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from latentvae.data import open_source
from latentvae.errors import UserError
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models import build_autoencoder_kl

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

TINY = """
preset: kl_small
model: {block_out_channels: [8, 8], latent_channels: 2, norm_num_groups: 2}
data: {resolution: 32}
objective: {perceptual_scale: 0.0}
discriminator: {disc_scale: 0.0}
run: {train_batch_size: 2}
"""


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))  # where it finds the modules beside it
    yield importlib.import_module("learning")
    sys.path.remove(str(BENCHMARKS))


def test_the_start_counts_as_training_time(script: ModuleType) -> None:
    recipe = script.read_recipe("no_disc")
    speed = script.Speed(start=30.0, update=0.5)
    assert speed.updates_in(5, recipe) == 540
    assert speed.minutes_of(540, recipe, total=540) == 5.0
    assert speed.updates_in(0.4, recipe) == 0


def test_updates_with_the_discriminator_take_longer(script: ModuleType) -> None:
    recipe = script.read_recipe("kl_small")  # the discriminator starts after 75 % of the run
    speed = script.Speed(start=0.0, update=1.0, with_discriminator=3.0)
    assert speed.updates_in(10, recipe) == 400
    assert speed.minutes_of(300, recipe, total=400) == 5.0
    assert speed.minutes_of(400, recipe, total=400) == 10.0


def test_a_recipe_changes_only_what_it_says(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: kl_small\noptimizer: {learning_rate: 0.01}\n")
    own, preset = script.read_recipe(str(path)), script.read_recipe("kl_small")
    assert own.name == "mine" and own.config().optimizer.learning_rate == 0.01
    rate = {"learning_rate": preset.config().optimizer.learning_rate}
    assert own.config().with_changes({"optimizer": rate}) == preset.config()


def test_a_recipe_changes_one_option_of_a_nested_section(
    script: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: vq_small\nmodel: {quantizer: {num_codes: 64}}\n")
    quantizer = script.read_recipe(str(path)).config().model.quantizer
    assert (quantizer.num_codes, quantizer.code_channels) == (64, 8)


def test_a_share_of_the_run_follows_the_number_of_updates(
    script: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: kl_small\noptimizer: {lr_warmup_steps: 0.1}\n")
    recipe = script.read_recipe(str(path))
    assert recipe.config(400).optimizer.lr_warmup_steps == 40
    assert recipe.config().optimizer.lr_warmup_steps == 200


def test_recipes_of_the_folder_can_be_read_and_others_are_an_error(
    script: ModuleType, tmp_path: Path
) -> None:
    names = sorted(path.stem for path in (BENCHMARKS / "recipes").glob("*.yaml"))
    assert names and all(script.read_recipe(name).config() is not None for name in names)
    with pytest.raises(UserError, match="did you mean 'kl_small'"):
        script.read_recipe("kl_smal")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("preset: kl_small\noptimiser: {learning_rate: 1}\n")
    with pytest.raises(UserError, match="optimiser"):
        script.read_recipe(str(wrong))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed_updates": 19}, "speed_updates must be at least 20"),
        ({"points": 0}, "points must be at least 1"),
        ({"recipes": ("a.yaml", "b/a.yaml")}, "two recipes are called 'a'"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    script: ModuleType, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        script.run(script.Options(out=tmp_path, json=tmp_path / "l.json", **options))


@pytest.mark.slow  # starts training processes
def test_curves_of_two_recipes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    options = script.Options(
        recipes=("tiny.yaml", "reference"),
        minutes=0.15,
        seeds=(3,),
        json=Path("results/learning.json"),
        points=2,
        speed_updates=20,
        resolution=64,
    )
    monkeypatch.setattr(script.Speed, "updates_in", lambda *_: 5)
    script.run(options)

    result = json.loads(options.json.read_text())
    assert [run["recipe"] for run in result["runs"]] == ["tiny", "reference"]
    for run in result["runs"]:
        assert [point["update"] for point in run["curve"]] == [2, 5]
        minutes = [point["minutes"] for point in run["curve"]]
        cost = result["recipes"][run["recipe"]]
        passed = cost["seconds_before_first_update"] + 5 * cost["seconds_per_update"]
        assert minutes == sorted(minutes) and minutes[-1] == pytest.approx(passed / 60)
        assert len({point["psnr"] for point in run["curve"]}) == 2  # two sets of weights
        assert all(5 < point["psnr"] < 40 and point["lpips_vgg"] > 0 for point in run["curve"])
    assert options.json.with_suffix(".png").stat().st_size > 0

    # The same command again trains nothing. A finished training only says that it is finished.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    script.run(options)
    assert json.loads(options.json.read_text())["runs"] == result["runs"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == times


def test_every_update_of_the_reference_is_timed(script: ModuleType) -> None:
    torch.manual_seed(0)
    trained = importlib.import_module("reference").train_reference(
        build_autoencoder_kl(block_out_channels=(8, 8), norm_num_groups=4),
        open_source("samples", split="train"),
        PerceptualLoss(load_lpips("alex")),
        resolution=32,
        batch_size=1,
        updates=3,
        learning_rate=1e-4,
        warmup=1,
        seed=0,
    )
    seconds = list(trained)
    assert len(seconds) == 3 and min(seconds) > 0
