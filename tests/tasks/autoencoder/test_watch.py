"""What the collapse watch tells, of made-up rows and of runs in which each collapse is real."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentvae.distributed import rank
from latentvae.engine.resume import check_same_config
from latentvae.errors import UserError
from latentvae.losses.posterior import silent_channels
from latentvae.tasks.autoencoder import collapse_watch, train
from latentvae.tasks.autoencoder.collapse_watch import (
    CollapseWatch,
    Finding,
    Watched,
    what_to_watch,
)
from latentvae.tasks.autoencoder.task import AutoencoderTask
from tests.forks import ranks
from tests.tasks.autoencoder.small import small_config
from tests.tasks.autoencoder.test_resume import Killed, kill_in_update, rows, tensors

WATCHED = Watched(
    posterior_from=100,
    num_channels=4,
    codes_from=100,
    num_codes=1000,
    codes_remedy="--restart_threshold 0.1",
    discriminator_from=100,
    effective_from=50,
)
Observe = Callable[[CollapseWatch, int, float], list[Finding]]


def posterior(watching: CollapseWatch, update: int, active: float) -> list[Finding]:
    values = {"latent/active_units": active, "latent/silent_channels": 4 - active}
    return watching.row(update, values)


def discriminator(watching: CollapseWatch, update: int, loss: float) -> list[Finding]:
    values = {
        "discriminator/loss": loss,
        "discriminator/logits_real": 3.0,
        "discriminator/logits_fake": -2.0,
    }
    return watching.row(update, values)


def codes(watching: CollapseWatch, update: int, usage: float) -> list[Finding]:
    values = {"validation/usage": usage, "validation/perplexity": 1000 * usage}
    return watching.validation(
        update, {**values, "validation/tokens": 4096, "validation/lpips": 0.2}
    )


def lpips(watching: CollapseWatch, update: int, value: float) -> list[Finding]:
    return watching.validation(update, {"validation/lpips": value})


# How it is observed; a healthy value; a bad one; observations that it takes; what is said.
CONDITIONS: dict[str, tuple[Observe, float, float, int, str]] = {
    "posterior_collapse": (posterior, 3.0, 1.0, 3, "3 of 4 latent channels have nearly no KL"),
    "discriminator_won": (
        discriminator,
        0.06,
        0.04,
        3,
        r"its loss is 0.04 \(1 for pure guessing.* 3 for images and -2",
    ),
    "codebook_collapse": (codes, 0.12, 0.09, 2, "90 of 1,000 codes are used by 4,096 tokens"),
    "lpips_diverges": (lpips, 0.2, 0.23, 3, "it is 0.230, and was 0.200 at update 150"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_is_told_once_when_it_lasts_and_again_when_it_came_back(name: str) -> None:
    observe, good, bad, patience, said = CONDITIONS[name]
    watching, told = CollapseWatch(WATCHED), {}
    # Bad but for a moment, then for good, then well again for a moment, then for good, then bad.
    values = [good, bad, good, *[bad] * 4, good, bad, *[good] * 4, *[bad] * 4]
    for i, value in enumerate(values):
        for found in observe(watching, 150 + 50 * i, value):
            told[i] = found
    assert list(told) == [3 + patience - 1, 13 + patience - 1]
    assert {found.name for found in told.values()} == {name}
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(told[3 + patience - 1].sentence)
    assert "since update 300" in told[3 + patience - 1].sentence
    assert watching.flags() == {f"watch/{name}": 1.0}
    summary = watching.summary()
    first, last = 300 + 50 * (patience - 1), 800 + 50 * (patience - 1)
    times = f"from update {first}, then 1 times more, last from update {last} on: "
    assert summary is not None and times in summary


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_healthy_run_hears_nothing(name: str) -> None:
    observe, good, *_ = CONDITIONS[name]
    watching = CollapseWatch(WATCHED)
    assert not [found for i in range(40) for found in observe(watching, 150 + 50 * i, good)]
    assert watching.summary() is None and watching.flags() == {}


@pytest.mark.parametrize("name", ["posterior_collapse", "discriminator_won", "codebook_collapse"])
def test_the_beginning_is_not_watched(name: str) -> None:
    observe, _, bad, *_ = CONDITIONS[name]
    watching = CollapseWatch(WATCHED)
    assert not [found for update in range(10, 101, 10) for found in observe(watching, update, bad)]
    assert not CollapseWatch(Watched()).row(
        500, {"latent/silent_channels": 4, "discriminator/loss": 0.0}
    )


def test_rows_of_each_update_tell_no_sooner_than_fifty_updates() -> None:
    watching = CollapseWatch(WATCHED)
    told = [update for update in range(101, 200) if discriminator(watching, update, 0.0)]
    assert told == [151]


@pytest.mark.parametrize("cut", range(1, 17, 3))
def test_a_watch_goes_on_from_its_state(cut: int) -> None:
    for observe, good, bad, *_ in CONDITIONS.values():
        values = [good, bad, good, *[bad] * 4, good, bad, *[good] * 4, *[bad] * 4]
        whole, part = CollapseWatch(WATCHED), CollapseWatch(WATCHED)
        for i, value in enumerate(values):
            if i == cut:
                saved = json.loads(json.dumps(part.state_dict()))
                part = CollapseWatch(WATCHED, saved=saved)
            assert observe(whole, 150 + 50 * i, value) == observe(part, 150 + 50 * i, value)
        assert whole.state_dict() == part.state_dict()


def test_codes_that_fall_out_of_use_and_tokens_of_a_few_codes() -> None:
    watching = CollapseWatch(WATCHED)
    told = [codes(watching, 150 + 50 * i, usage) for i, usage in enumerate([0.8, 0.3, 0.3])]
    assert "300 of 1,000 codes are used (800 at most before)" in told[2][0].sentence
    values = {"validation/usage": 0.9, "validation/perplexity": 40.0, "validation/lpips": 0.2}
    for tokens, expected in ((4096, 1), (500, 0)):  # of which 500 cannot use 1,000 codes evenly
        watching = CollapseWatch(WATCHED)
        told = [watching.validation(u, values | {"validation/tokens": tokens}) for u in (150, 250)]
        assert len(told[1]) == expected


def test_one_dead_level_of_several_is_seen() -> None:
    """The means over both levels look healthy."""
    watching, found = CollapseWatch(WATCHED), []
    for update in (150, 250):
        values = {"validation/lpips": 0.2, "validation/usage": 0.5, "validation/perplexity": 400.0}
        values |= {"validation/tokens": 1024}
        for level, (used, tokens) in enumerate([(0.002, 1024), (0.998, 4096)]):
            values[f"validation/usage_level{level}"] = used
            values[f"validation/perplexity_level{level}"] = 800 * used
            values[f"validation/tokens_level{level}"] = tokens
        found = watching.validation(update, values)
    assert "the codebook of level 0 collapses: 2 of 1,000 codes" in found[0].sentence
    saved = json.loads(json.dumps(watching.state_dict()))
    assert saved["most_used"] == {"_level0": 2, "_level1": 998}
    assert CollapseWatch(WATCHED, saved=saved).state_dict() == watching.state_dict()


def test_nan_diverges_and_the_discriminator_is_blamed_for_what_came_after_it() -> None:
    for start, blamed in ((500, False), (50, True)):
        watching = CollapseWatch(Watched(effective_from=start))
        told = [lpips(watching, 100 * i, v) for i, v in enumerate([0.2, *[float("nan")] * 3], 1)]
        assert [len(found) for found in told] == [0, 0, 0, 1]
        assert watching.blames_discriminator() == blamed == ("disc_scale" in told[3][0].sentence)
        assert json.loads(json.dumps(watching.state_dict(), allow_nan=False))["best_lpips"] == 0.2


def test_a_discriminator_that_is_off_is_neither_blamed_nor_left_as_the_winner() -> None:
    watching = CollapseWatch(WATCHED)
    for update in (150, 200, 250):
        discriminator(watching, update, 0.0)
    assert watching.blames_discriminator()
    saved = watching.state_dict()
    unwatched = CollapseWatch(
        replace(WATCHED, discriminator_from=None, effective_from=None), saved=saved
    )
    assert unwatched.flags() == {} and not unwatched.blames_discriminator()
    watching.discriminator_stops(250)
    told = [lpips(watching, 300 + 100 * i, v) for i, v in enumerate([0.2, 0.4, 0.4, 0.4])]
    assert "disc_scale" not in told[3][0].sentence and not watching.blames_discriminator()


def test_what_other_images_gave_is_not_compared() -> None:
    watching = CollapseWatch(replace(WATCHED, validated_on="a 1000"))
    codes(watching, 150, 0.9)
    for images, told in (("a 1000", 1), ("a 100", 0)):
        later = CollapseWatch(replace(WATCHED, validated_on=images), saved=watching.state_dict())
        found = [codes(later, update, 0.3) for update in (200, 250, 300)]
        assert sum(map(len, found)) == told


def test_what_is_asked_for_is_no_collapse_and_remedies_are_open_to_the_run(tmp_path: Path) -> None:
    def watched(**options: Any) -> Watched:
        return what_to_watch(
            small_config(tmp_path, **options), discriminator_start=0, num_codes=None
        )

    assert watched(rec_target=0.1).posterior_from is None
    assert watched(kl_target=0.01).posterior_from is None
    assert watched(kl_target=2.0).posterior_remedy == "a higher --kl_target than 2"
    assert "--free_bits" in watched().posterior_remedy
    assert "--free_bits" not in watched(posterior_flow=2).posterior_remedy


def test_a_flow_has_active_units_alone() -> None:
    watching = CollapseWatch(WATCHED)
    said = [
        finding.sentence
        for update in range(200, 1200, 100)
        for finding in watching.row(update, {"latent/active_units": 0.0})
    ]
    assert len(said) == 1 and "collapses: 0 of 4 latent channels vary with the image, so" in said[0]


def test_silent_channels_by_hand() -> None:
    kl = torch.tensor([[0.0, 0.1, 4.0], [0.02, 0.1, 0.0]])  # nats of 4 positions: 0.04 is the bound
    assert silent_channels(kl, positions=4).item() == 1.0
    assert silent_channels(kl, positions=11).item() == 2.0


def test_what_there_is_to_watch_follows_the_options(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "disc_ramp_steps": 30,
        "disc_warmup_steps": 5,
        "kl_capacity_steps": 900,
    }
    config = small_config(tmp_path, disc_loss="non_saturating", lr_warmup_steps=200, **options)
    found = what_to_watch(config, discriminator_start=40, num_codes=None)
    assert (found.posterior_from, found.codes_from) == (900, None)
    assert (found.effective_from, found.discriminator_from) == (45, 75)
    assert found.discriminator_loss == pytest.approx(2 * 0.693147, rel=1e-5)
    changes: list[dict[str, Any]] = [{"disc_watch": "off"}, {"disc_scale": 0.0}]
    for change in changes:
        silent = what_to_watch(
            small_config(tmp_path, **change), discriminator_start=0, num_codes=None
        )
        assert silent.discriminator_from is silent.effective_from is None
    vector = what_to_watch(small_config(tmp_path, CODES), discriminator_start=0, num_codes=1024)
    assert (vector.posterior_from, vector.codes_from, vector.num_codes) == (None, 100, 1024)
    assert "--restart_threshold" in vector.codes_remedy and "kmeans" not in vector.codes_remedy


# Whole runs, in which the bounds in updates are shortened so that they take seconds.

CODES = {
    "architecture": "vq",
    "block_out_channels": [8, 8, 16],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 4,
    "quantizer": {"type": "vq", "num_codes": 1024, "code_channels": 2, "kmeans_iterations": 1},
}
PLAIN: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "perceptual_scale": 0.0,
    "train_batch_size": 2,
    "learn_logvar": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "disc_start": 0,
    "disc_ramp_steps": 0,
    "disc_layers": 1,
    "log_steps": 2,
    "max_train_steps": 20,
    "checkpointing_steps": 10,
    "validation_steps": 10,
}
# The model stands still. Of a few photos with random crops, a discriminator's loss stays near 0
# for some rows only: the bound is raised with the others.
WINNING = {"learning_rate": 1e-12, "disc_learning_rate": 1e-2, "disc_norm": "none"}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse_watch, "BEGINNING", 2)
    monkeypatch.setattr(collapse_watch, "LASTING", 4)
    monkeypatch.setattr(collapse_watch, "WON_SHARE", 0.5)


def finished(folder: Path, **changes: Any) -> Path:
    return train(small_config(folder, **PLAIN | changes))


def last_row(folder: Path) -> dict[str, float]:
    return [row for row in rows(folder) if "loss/rec" in row][-1]


@pytest.mark.usefixtures("soon")
def test_a_huge_kl_weight_collapses_the_posterior(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path, kl_scale=100.0, learning_rate=1e-2, disc_scale=0.0, max_train_steps=30)
    said = capsys.readouterr().out
    assert said.count("of 4 latent channels have nearly no KL") == 2  # and at the end
    assert "findings of the collapse watch in this run:\n  posterior collapse, from update" in said
    assert last_row(tmp_path)["watch/posterior_collapse"] == 1.0


@pytest.mark.usefixtures("soon")
def test_a_codebook_that_stands_still_collapses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantizer = CODES["quantizer"] | {"kmeans_iterations": 0}
    model = {**CODES, "quantizer": quantizer}
    finished(tmp_path, model=model, learning_rate=1e-12, disc_scale=0.0, validation_steps=5)
    said = capsys.readouterr().out
    assert said.count("the codebook collapses: ") == 2 and "of 1,024 codes are used by 128" in said


@pytest.mark.usefixtures("soon")
@pytest.mark.slow
def test_a_discriminator_that_has_won_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path, **WINNING)
    said = capsys.readouterr().out
    assert said.count("the discriminator has won") == 2 and "switched off" not in said
    assert "discriminator/loss" in last_row(tmp_path)
    # As its sentence advises: what was found is acted on, though it is not found anew.
    finished(tmp_path, **WINNING, disc_watch="disable", max_train_steps=22)
    assert "update 20: the discriminator is switched off for the rest" in capsys.readouterr().out
    assert "discriminator/loss" not in last_row(tmp_path)
    finished(tmp_path / "off", **WINNING, disc_watch="off")
    assert "watch" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("soon")
def test_a_discriminator_that_is_switched_off_stays_so_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**WINNING, "disc_watch": "disable", "checkpointing_steps": 5}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    finished(straight, **options)
    said = capsys.readouterr().out
    assert said.count("the discriminator is switched off for the rest of the run") == 1
    state = json.loads((straight / "checkpoint-20" / "state.json").read_text())
    stopped = state["task"]["discriminator_stopped"]
    assert 4 <= stopped < 19
    for row in rows(straight):
        if "loss/rec" in row:
            assert ("discriminator/loss" in row) == (row["update"] <= stopped)
    for update in (stopped, stopped + 1):  # in the update that decides, and after it
        with monkeypatch.context() as patch:
            kill_in_update(patch, update)
            with pytest.raises(Killed):
                finished(resumed, **options)
    finished(resumed, **options)
    left, right = (tensors(run / "checkpoint-20") for run in (straight, resumed))
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
    assert rows(straight) == rows(resumed)
    assert json.loads((resumed / "checkpoint-20" / "state.json").read_text()) == state


@pytest.mark.slow
@pytest.mark.usefixtures("soon")
def test_a_validation_decides_whether_or_not_a_kill_came_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made after the checkpoint of its update, which knows nothing of it."""
    monkeypatch.setattr(collapse_watch, "WORSE", 0.0)  # every LPIPS is worse than the best
    monkeypatch.setattr(collapse_watch, "WON_SHARE", 0.0)
    options: dict[str, Any] = {
        "disc_watch": "disable",
        "validation_steps": 4,
        "max_train_steps": 14,
    }
    options |= {"checkpointing_steps": 4, "log_steps": 3}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    finished(straight, **options)
    for update in (6, 14):  # after the validations of 4 and of 12, which stops the discriminator
        with monkeypatch.context() as patch:
            kill_in_update(patch, update)
            with pytest.raises(Killed):
                finished(resumed, **options)
    started: list[bool] = []
    original = AutoencoderTask.micro_step

    def noting(self: AutoencoderTask, batch: Any, update: int) -> Any:
        started.append(self.adversary(update) is not None)
        return original(self, batch, update)

    monkeypatch.setattr(AutoencoderTask, "micro_step", noting)
    finished(resumed, **options)
    assert started and not any(started)
    left, right = (
        json.loads((r / "checkpoint-14" / "state.json").read_text()) for r in (straight, resumed)
    )
    assert left == right and left["task"]["discriminator_stopped"] == 12
    one, other = (tensors(run / "checkpoint-14") for run in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_decides_may_not_change_while_it_may_disable(tmp_path: Path) -> None:
    def config(**changes: Any) -> Any:
        return small_config(tmp_path, **changes)

    check_same_config(config(log_steps=1, disc_watch="disable"), config())
    check_same_config(config(log_steps=1), config(disc_watch="off"))
    with pytest.raises(UserError, match=r"log_steps \(2 then, 1 now\)"):
        check_same_config(config(log_steps=1, disc_watch="disable"), config(disc_watch="disable"))


@pytest.mark.slow
def test_a_healthy_run_of_some_hundred_updates_is_told_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = PLAIN | {
        "max_train_steps": 300,
        "validation_steps": 75,
        "log_steps": 10,
    }
    options |= {"disc_start": 100, "disc_ramp_steps": 50, "lr_warmup_steps": 50}
    options |= {"perceptual_scale": 1.0, "train_batch_size": 4, "learning_rate": 1e-3}
    train(small_config(tmp_path, **options))
    assert "watch" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("soon")
def test_two_ranks_decide_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse_watch, "WON_SHARE", 0.9)
    original = AutoencoderTask.export

    def exporting(self: AutoencoderTask, *args: Any, **options: Any) -> Any:
        (tmp_path / f"rank-{rank()}.json").write_text(self.state().model_dump_json())
        return original(self, *args, **options)

    monkeypatch.setattr(AutoencoderTask, "export", exporting)
    said = ranks(
        lambda: finished(tmp_path / "run", **WINNING, disc_watch="disable"),
        output=tmp_path / "output.txt",
    )
    assert said.count("the discriminator is switched off for the rest of the run") == 1
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["discriminator_stopped"] is not None
