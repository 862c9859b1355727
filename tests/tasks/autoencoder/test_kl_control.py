"""Runs whose KL has a target: they hold it, go on from a checkpoint, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.log import read_rows
from latentvae.engine.updates import Updates
from latentvae.errors import UserError
from latentvae.tasks.autoencoder import train
from tests.tasks.autoencoder.small import small_config
from tests.tasks.autoencoder.test_resume import assert_same_run, killed_and_resumed, run_to_the_end

TRAINING: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "perceptual_scale": 0.0,
    "disc_scale": 0.0,
    "rec_loss": "l2",
    "learn_logvar": False,
    "lr_scheduler": "constant",
    "learning_rate": 3e-3,
    "initial_posterior_logvar": -6.0,
    "kl_scale": 0.05,
    "kl_target_rate": 0.02,
    "log_steps": 50,
    "checkpointing_steps": 400,
    "validation_steps": 400,
    "max_train_steps": 400,
}


@pytest.mark.slow
def test_a_run_holds_its_bits(tmp_path: Path) -> None:
    # The weight that holds the target falls in so short a run. A slow controller stays behind it.
    options = TRAINING | {"kl_target_rate": 0.05}
    train(small_config(tmp_path, **options, kl_target=2.0))
    rows = [row for row in read_rows(tmp_path / "log.jsonl") if "objective/kl_weight" in row]
    assert rows[-1]["update"] == 400
    for row in rows[-2:]:  # each the mean of fifty updates
        assert row["latent/kl_bits_per_element"] == pytest.approx(2.0, rel=0.1)


SHORT: dict[str, Any] = {"kl_target": 2.0, "kl_target_rate": 0.5, "kl_scale": 1e-2}


def test_a_run_killed_inside_an_update_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_to_the_end(straight, **SHORT)
    killed_and_resumed(resumed, monkeypatch, update=4, micro_step=1, **SHORT)
    assert_same_run(straight, resumed)  # its state.json too
    values = load_checkpoint(straight / "checkpoint-6").values
    rows = read_rows(straight / "log.jsonl")
    weights = [row["objective/kl_weight"] for row in rows if "objective/kl_weight" in row]
    assert values["task"]["kl_target"]["log_factor"] != 0.0
    assert len(set(weights)) == len(weights) == 3


def test_an_update_that_is_skipped_does_not_move_the_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = Updates.micro_step, []

    def spoiling(self: Updates, *args: Any) -> Any:
        logged = original(self, *args)
        task: Any = self.training.task
        seen.append(task.objective.kl_target.log_factor)
        if self.progress.update == 1:
            for parameter in task.wrapper.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(float("nan"))
        return logged

    monkeypatch.setattr(Updates, "micro_step", spoiling)
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 1,
        "max_train_steps": 4,
        "validation_steps": 9,
    }
    train(small_config(tmp_path, **SHORT, **options))
    assert seen[0] == 0.0 and seen[1] != 0.0 and seen[2] == seen[1] and seen[3] != seen[2]


def test_the_weight_rests_while_only_the_discriminator_learns(tmp_path: Path) -> None:
    discriminator: dict[str, Any] = {"disc_start": 1, "disc_warmup_steps": 2, "disc_ramp_steps": 0}
    options: dict[str, Any] = {
        "rec_target": 0.01,
        "max_train_steps": 4,
        "log_steps": 1,
        "validation_steps": 9,
    }
    train(small_config(tmp_path, **discriminator, **options))
    rows = read_rows(tmp_path / "log.jsonl")
    weights = [row["objective/kl_weight"] for row in rows if "objective/kl_weight" in row]
    assert weights[0] > weights[1] == weights[2] == weights[3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kl_target": 1.0, "rec_target": 0.1}, "kl_target 1 and rec_target 0.1 both decide"),
        ({"kl_target": 1.0, "free_bits": 0.5}, r"free_bits 0.5 and kl_target 1 .* one of them"),
        ({"rec_target": 0.1, "kl_capacity": 2.0}, "kl_capacity 2 and rec_target 0.1"),
        ({"kl_target": 1.0, "kl_warmup_steps": 5}, "kl_warmup_steps 5 and kl_target 1 both change"),
        ({"kl_target": 1.0, "kl_scale": 0.0}, "kl_scale must be from 1e-08 to 10000"),
        ({"kl_target": -1.0}, "kl_target"),
        ({"kl_target": 1.0, "kl_target_rate": 0.0}, "kl_target_rate"),
        (
            {
                "kl_target": 1.0,
                "pretrained_model_name_or_path": "sd-vae",
                "freeze_encoder": True,
            },
            "kl_target 1 and freeze_encoder exclude each other",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        small_config(tmp_path, **changes)


def test_targets_without_a_kl_or_an_error_are_refused(tmp_path: Path) -> None:
    codes = {"architecture": "vq", "quantizer": {"type": "vq", "num_codes": 16}}
    with pytest.raises(UserError, match=r"kl_target 1 has no meaning for the architecture vq"):
        small_config(tmp_path, codes, kl_target=1.0, learn_logvar=False)
    gumbel = {"architecture": "vq", "quantizer": {"type": "gumbel", "num_codes": 16}}
    with pytest.raises(UserError, match=r"rec_target 0.1 needs a pixel error"):
        small_config(
            tmp_path, gumbel | {"likelihood": "logit_laplace"}, rec_target=0.1, learn_logvar=False
        )
