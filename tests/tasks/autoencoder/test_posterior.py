"""Runs with a flow or a fixed variance: they resume to the bit, and the export is the network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.log import read_rows
from latentvae.errors import UserError
from latentvae.proofs.preflight import preflight
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.run_export import export_folder
from tests.tasks.autoencoder.small import broken_off, built, small_config
from tests.tasks.autoencoder.test_families import MODELS
from tests.tasks.autoencoder.test_resume import (
    assert_same_run,
    killed_and_resumed,
    run_to_the_end,
    tensors,
)
from tests.tiny import images

FLOW: dict[str, Any] = {
    "posterior_flow": 2,
    "posterior_flow_channels": 4,
    "kl_scale": 0.1,
    "mixed_precision": "no",
}
SIMFLOW = {**FLOW, "posterior_logvar": -1.386, "adam_weight_decay": 0.1}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both options, and with a weight decay that moves the written variance."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run_to_the_end(folder, **SIMFLOW)
    return folder


def test_a_killed_run_resumes_to_the_bit(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = tmp_path / "resumed"
    killed_and_resumed(resumed, monkeypatch, update=4, micro_step=1, **SIMFLOW)
    assert_same_run(straight, resumed)
    found = tensors(straight / "checkpoint-6")
    name = "bottleneck.flow.layers.0.last.weight"
    assert found[f"model/{name}"].any()
    assert not torch.equal(found[f"model/{name}"], found[f"model_average/{name}"])


def test_the_export_is_the_network_without_the_flow(straight: Path, tmp_path: Path) -> None:
    average = load_checkpoint(straight / "checkpoint-6").tensors["model_average"]
    weights = {k.removeprefix("net."): v for k, v in average.items() if k.startswith("net.")}
    net = AutoencoderKL.from_pretrained(straight / "export", use_safetensors=True).eval()
    export = net.state_dict()
    assert export.keys() == weights.keys()
    changed = {name for name in export if not torch.equal(export[name], weights[name])}
    assert changed == {"quant_conv.bias"}  # weight decay has moved the variance

    # encode and decode as the trained network, with the constant variance
    batch = images(32, 32, count=2)
    with torch.no_grad():
        found = net.encode(batch).latent_dist
        net.load_state_dict(weights)
        trained = net.encode(batch).latent_dist
    assert torch.equal(found.mean, trained.mean)
    assert torch.equal(found.logvar, torch.full_like(found.mean, -1.386))
    assert not torch.equal(trained.logvar, found.logvar)

    # a later export is the same
    export_folder(straight, out=tmp_path / "again")
    again, first = tensors(tmp_path / "again"), tensors(straight / "export")
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_run_logs_what_is_defined(straight: Path) -> None:
    row = next(row for row in read_rows(straight / "log.jsonl") if "latent/kl_nats" in row)
    assert row["latent/kl_bits_per_element"] > 0 and "latent/active_units" in row
    assert "latent/silent_channels" not in row


def test_the_first_update_equals_that_without_a_flow(tmp_path: Path) -> None:
    """The flow starts as the identity, and draws no numbers that others need."""
    options: dict[str, Any] = {"kl_scale": 0.1, "disc_scale": 0.0, "log_steps": 1}
    options |= {"max_train_steps": 1, "gradient_accumulation_steps": 1, "mixed_precision": "no"}
    found = []
    for name, flow in (("plain", 0), ("flow", 2)):
        train(small_config(tmp_path / name, **options, posterior_flow=flow))
        (row,) = [r for r in read_rows(tmp_path / name / "log.jsonl") if "loss/rec" in r]
        weights = load_checkpoint(tmp_path / name / "checkpoint-1").tensors["model"]
        found.append((row, {k: v for k, v in weights.items() if k.startswith("net.")}))
    (plain, before), (flow, after) = found
    for name in ("loss/rec", "loss/lpips", "loss/kl", "latent/kl_nats", "latent/rms"):
        assert flow[name] == pytest.approx(plain[name], rel=1e-5)
    assert plain["grad/model"] != flow["grad/model"]  # with the flow's own gradient
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=2.5e-3, rtol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["asymmetric", "vit_kl"])
def test_other_networks_resume_to_the_bit(architecture: str, tmp_path: Path) -> None:
    options = {"model": {**MODELS[architecture], **{k: FLOW[k] for k in list(FLOW)[:2]}}}
    options["model"]["posterior_logvar"] = -2.0
    more: dict[str, Any] = {"kl_scale": 0.1, "max_train_steps": 3, "gradient_accumulation_steps": 1}
    whole = train(small_config(tmp_path / "whole", **options, **more))
    broken_off(tmp_path / "whole", tmp_path / "broken", update=2)
    broken = train(small_config(tmp_path / "broken", **options, **more))
    expected, found = tensors(whole), tensors(broken)
    assert expected and all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_fine_tuning_starts_at_the_identity(straight: Path, tmp_path: Path) -> None:
    base = str(straight / "export")
    config = small_config(tmp_path, **FLOW, pretrained_model_name_or_path=base)
    wrapper: Any = built(config, tmp_path).task.wrapper
    assert not wrapper.bottleneck.flow.layers[0].last.weight.any()
    bias = wrapper.net.quant_conv.bias
    assert torch.equal(bias[4:], torch.full((4,), -1.386))  # learns from here


@pytest.mark.slow
@pytest.mark.parametrize("options", [FLOW, SIMFLOW, {"posterior_logvar": -1.386}])
def test_a_sound_run_passes_preflight(options: dict[str, Any], tmp_path: Path) -> None:
    assert preflight(small_config(tmp_path / "run", train_batch_size=2, **options)) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"posterior_flow": 2, "kl_scale": 0.0}, "posterior_flow 2 learns only from the KL"),
        ({"posterior_flow": 2, "free_bits": 0.5}, "free_bits 0.5 limits the KL of each channel"),
        (
            {"posterior_flow": 2, "deterministic_posterior": True},
            "posterior_flow 2 and deterministic_posterior exclude each other",
        ),
        (
            {"posterior_flow": 2, "freeze_encoder": True, "pretrained_model_name_or_path": "x"},
            "posterior_flow 2 and freeze_encoder exclude each other",
        ),
        ({"posterior_flow_channels": 8}, "posterior_flow_channels 8 has no effect while"),
        ({"posterior_flow": -1}, "posterior_flow is -1"),
        (
            {"posterior_logvar": -2.0, "initial_posterior_logvar": -6.0},
            "initial_posterior_logvar -6 has no effect with posterior_logvar -2",
        ),
        ({"posterior_logvar": 30.0}, "posterior_logvar is 30"),
        (
            {
                "posterior_logvar": -2.0,
                "freeze_encoder": True,
                "pretrained_model_name_or_path": "x",
            },
            "posterior_logvar -2 and freeze_encoder exclude each other",
        ),
        (
            {"posterior_logvar": 0.0, "deterministic_posterior": True},
            "posterior_logvar 0 and deterministic_posterior exclude each other",
        ),
        # 0.5 (exp(-2) - 1 + 2) / ln 2 = 0.819
        ({"posterior_logvar": -2.0, "kl_target": 0.8}, "the KL is never below 0.819 bits"),
        ({"posterior_logvar": -2.0, "kl_capacity": 0.8}, "kl_capacity 0.8 has no effect"),
        ({"posterior_logvar": -2.0, "free_bits": 0.8}, "free_bits 0.8 has no effect"),
    ],
)
def test_options_without_a_meaning_are_errors(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        small_config(tmp_path, **changes)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"posterior_logvar": -2.0, "kl_target": 0.9},
        {"posterior_logvar": -2.0, "posterior_flow": 2, "kl_target": 0.5},
        {"posterior_flow": 2, "kl_capacity": 0.5},
        {"posterior_flow": 2, "kl_warmup_steps": 3},
        {"posterior_logvar": -2.0, "rec_target": 0.1},
    ],
)
def test_options_of_the_kl_that_work(changes: dict[str, Any], tmp_path: Path) -> None:
    small_config(tmp_path, **changes)
