"""The KL by target: a closed form, whole runs that hold their target, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentvae.engine.checkpoint import load_checkpoint
from latentvae.engine.log import read_rows
from latentvae.errors import UserError
from latentvae.losses.objective_config import ObjectiveConfig
from latentvae.outputs import AutoencoderOutput, Latent
from latentvae.tasks.autoencoder.kl_control import held, kl_in_loss, next_log_factor
from latentvae.tasks.autoencoder.latent_values import bits_per_element
from latentvae.tasks.autoencoder.loop import train
from latentvae.tasks.autoencoder.run import build_run, open_data, start_accelerator
from latentvae.tasks.autoencoder.state import restore
from latentvae.tasks.autoencoder.updates import Updates
from tests.tasks.autoencoder.small import small_config
from tests.tasks.autoencoder.test_resume import assert_same_run, killed_and_resumed, run_to_the_end

LATENTS = {"few": ((4, 8, 8), 3 * 64**2), "many": ((16, 4, 4), 3 * 32**2)}  # and image elements


def output(z: Tensor, kl_per_channel: Tensor) -> AutoencoderOutput:
    latent = Latent(z=z, kl=kl_per_channel.sum(1), kl_per_channel=kl_per_channel)
    return AutoencoderOutput(latents=(latent,))


def toy(shape: tuple[int, int, int], pixels: int, options: ObjectiveConfig) -> dict[str, float]:
    """Posteriors N(0, v) under the loss `v + w / pixels * KL`, KL = (v - 1 - log v) / 2 an element,
    least where v / (1 - v) = w r / 2 with r latent elements to a pixel; an update goes a tenth of
    the way there."""
    logvar, log_factor, error, found = torch.full(shape, -3.0), 0.0, 0.0, {}
    for _ in range(1600):
        kl = 0.5 * (logvar.exp() - 1.0 - logvar).sum((1, 2))
        out = output(torch.zeros(1, *shape), kl[None])
        found = {
            "latent/kl_bits_per_element": bits_per_element(out),
            "loss/rec": logvar.exp().mean(),
        }
        value = held([found], options).item()
        log_factor, error = next_log_factor(log_factor, options, found=value, last_error=error)
        odds = options.kl_scale * math.exp(log_factor) * logvar.numel() / pixels / 2
        logvar = logvar + 0.1 * (math.log(odds / (1 + odds)) - logvar)
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize("start", [0.1, 100.0])
@pytest.mark.parametrize("latent", LATENTS)
def test_bits_are_held_from_both_sides_whatever_the_shape(latent: str, start: float) -> None:
    options = ObjectiveConfig(kl_target=1.0, kl_scale=start, kl_target_rate=0.02)
    found = toy(*LATENTS[latent], options)
    assert found["latent/kl_bits_per_element"] == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("latent", LATENTS)
def test_an_error_is_held_from_both_sides_whatever_the_shape(latent: str, start: float) -> None:
    options = ObjectiveConfig(rec_target=0.1, kl_scale=start, kl_target_rate=0.02)
    found = toy(*LATENTS[latent], options)
    assert found["loss/rec"] == pytest.approx(0.1, rel=1e-2)


def test_the_factor_is_on_the_gradient_of_the_mean_kl() -> None:
    kl = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    out = output(torch.zeros(2, 2, 3, 3), kl)
    in_loss = kl_in_loss(out, ObjectiveConfig(kl_target=1.0), update=0, log_factor=math.log(3.0))
    assert in_loss is not None and in_loss.item() == pytest.approx(3.0 * 5.0)
    in_loss.backward()
    assert kl.grad is not None and torch.allclose(kl.grad, torch.tensor(1.5))
    assert kl_in_loss(out, ObjectiveConfig(), update=0, log_factor=1.0) is None


def test_a_step_is_relative_clipped_and_within_bounds() -> None:
    options = ObjectiveConfig(kl_target=2.0, kl_scale=1e-4, kl_target_rate=0.1)
    assert next_log_factor(0.3, options, found=2.0) == (0.3, 0.0)
    error = math.log(1.5)
    first, again = (
        next_log_factor(0.0, options, found=3.0, last_error=last) for last in (0.0, error)
    )
    assert first == pytest.approx((2.1 * error, error))  # rate and damping
    assert again == pytest.approx((0.1 * error, error))  # the rate alone
    assert next_log_factor(0.0, options, found=1e9, last_error=1.0) == pytest.approx((0.1, 1.0))
    # A KL of rounding.
    assert next_log_factor(0.0, options, found=-1e-9, last_error=-1.0) == pytest.approx((-0.1, -1))
    factor = error = 0.0
    for _ in range(200):
        factor, error = next_log_factor(factor, options, found=0.0, last_error=error)
    assert 1e-4 * math.exp(factor) == pytest.approx(1e-8)
    for _ in range(400):
        factor, error = next_log_factor(factor, options, found=9.0, last_error=error)
    assert 1e-4 * math.exp(factor) == pytest.approx(1e4)


def test_a_step_by_an_error_is_steeper_and_never_far_below_the_start() -> None:
    options = ObjectiveConfig(rec_target=0.1, kl_scale=1e-4, kl_target_rate=0.1)
    moved, error = next_log_factor(0.0, options, found=0.11, last_error=0.3)
    assert (moved, error) == pytest.approx((0.1 * error, -4.0 * math.log(1.1)))
    assert next_log_factor(0.0, options, found=0.05) == pytest.approx((0.1, 1.0))
    absurd = ObjectiveConfig(rec_target=1e-80, kl_target_rate=0.1)
    assert next_log_factor(0.0, absurd, found=0.5)[1] == -1.0
    factor = 0.0
    for _ in range(50):  # a network that has learned nothing yet
        factor, _ = next_log_factor(factor, options, found=0.5)
    assert math.exp(factor) == pytest.approx(0.1)


def test_what_is_held_is_the_mean_of_the_micro_steps() -> None:
    logged = [{"loss/rec": torch.tensor(value)} for value in (0.1, 0.3)]
    assert held(logged, ObjectiveConfig(rec_target=0.5)).tolist() == pytest.approx([0.2])
    assert held(logged, ObjectiveConfig()).numel() == 0


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
    train(small_config(tmp_path, **TRAINING, kl_target=2.0))
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
    assert values["kl_log_factor"] != 0.0 and len(set(weights)) == len(weights) == 3


def test_a_checkpoint_from_before_the_option_goes_on(tmp_path: Path) -> None:
    config = small_config(tmp_path, max_train_steps=1, validation_steps=9)
    train(config)
    snapshot = load_checkpoint(tmp_path / "checkpoint-1")
    del snapshot.values["kl_log_factor"], snapshot.values["kl_error"]
    accelerator = start_accelerator(config, tmp_path)
    run = build_run(config, folder=tmp_path, accelerator=accelerator, data=open_data(config))
    assert restore(run, snapshot).kl_log_factor == 0.0


def test_an_update_that_is_skipped_does_not_move_the_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = Updates.micro_step, []

    def spoiling(self: Updates, *args: Any) -> Any:
        logged = original(self, *args)
        seen.append(self.progress.kl_log_factor)
        if self.progress.update == 1:
            for parameter in self.run.wrapper.parameters():
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


def test_the_weight_rests_while_only_the_critic_learns(tmp_path: Path) -> None:
    critic: dict[str, Any] = {"disc_start": 1, "disc_warmup_steps": 2, "disc_ramp_steps": 0}
    options: dict[str, Any] = {
        "rec_target": 0.01,
        "max_train_steps": 4,
        "log_steps": 1,
        "validation_steps": 9,
    }
    train(small_config(tmp_path, **critic, **options))
    rows = read_rows(tmp_path / "log.jsonl")
    weights = [row["objective/kl_weight"] for row in rows if "objective/kl_weight" in row]
    assert weights[0] > weights[1] == weights[2] == weights[3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kl_target": 1.0, "rec_target": 0.1}, "kl_target 1 and rec_target 0.1 both say where"),
        ({"kl_target": 1.0, "free_bits": 0.5}, r"free_bits 0.5 and kl_target 1 .* one of them"),
        ({"rec_target": 0.1, "kl_capacity": 2.0}, "kl_capacity 2 and rec_target 0.1"),
        ({"kl_target": 1.0, "kl_warmup_steps": 5}, "kl_warmup_steps 5 and kl_target 1 both move"),
        ({"kl_target": 1.0, "kl_scale": 0.0}, "from 1e-08 to 10000; the nearest that is: 1e-08"),
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
    with pytest.raises(UserError, match=r"rec_target 0.1 has no meaning with likelihood"):
        small_config(
            tmp_path, gumbel | {"likelihood": "logit_laplace"}, rec_target=0.1, learn_logvar=False
        )
