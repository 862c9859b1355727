"""Discriminators, their losses and stabilisers, and control of the posterior, in whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentvae.engine.log import read_rows
from latentvae.errors import UserError
from latentvae.tasks.autoencoder import train
from tests.tasks.autoencoder.small import broken_off, built, small_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
CASES: dict[str, dict[str, Any]] = {
    "spectral": {"disc_norm": "spectral", "disc_lecam_weight": 0.1, "disc_augment": ["color"]},
    "stylegan": {
        "disc_type": "stylegan",
        "disc_loss": "non_saturating",
        "disc_r1_weight": 1.0,
        "disc_r1_interval": 2,
        "disc_augment": ["translation", "cutout"],
        "disc_layers": None,
    },
    "free_bits": {"free_bits": 0.2, "kl_warmup_steps": 3, "kl_scale": 1e-2},
    "capacity": {"kl_capacity": 0.5, "kl_capacity_steps": 4, "kl_scale": 1e-2},
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case in ("stylegan", "free_bits") else [])
        for case in CASES
    ],
)
def test_a_stopped_run_goes_on_to_the_bit(case: str, tmp_path: Path) -> None:
    options = CASES[case] | {"max_train_steps": 5, "disc_start": 1, "log_steps": 1}
    whole = train(small_config(tmp_path / "whole", **options))
    folder = broken_off(tmp_path / "whole", tmp_path / "broken", update=2)
    broken = train(small_config(folder, **options))
    expected, found = (load_file(export / WEIGHTS) for export in (whole, broken))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    rows = [
        {key: value for key, value in row.items() if not key.startswith(("time", "memory"))}
        for run in ("whole", "broken")
        for row in read_rows(tmp_path / run / "log.jsonl")
        if row.get("update") == 5 and "loss/rec" in row
    ]
    assert len(rows) == 2 and rows[0] == rows[1]
    assert 0 <= rows[0]["latent/active_units"] <= 4


@pytest.mark.slow
def test_each_option_changes_what_is_learned(tmp_path: Path) -> None:
    """In the run's only two updates; the discriminator learns in the first, the model by it in
    both."""
    plain = {"disc_start": 0, "disc_ramp_steps": 0, "kl_scale": 1e-2, "max_train_steps": 2}
    plain |= {"perceptual_scale": 0.0, "train_batch_size": 2, "gradient_accumulation_steps": 1}
    changes: list[dict[str, Any]] = [
        {},
        {"disc_norm": "none"},
        {"disc_norm": "spectral"},
        {"disc_loss": "non_saturating"},
        {"disc_augment": ["cutout"]},
        {"disc_r1_weight": 10.0},
        {"disc_lecam_weight": 1.0},
        {"kl_warmup_steps": 10},
        {"free_bits": 1.0},
        {"kl_capacity": 1.0},
    ]
    learned = []
    for number, change in enumerate(changes):
        export = train(small_config(tmp_path / str(number), **plain | change))
        learned.append(load_file(export / WEIGHTS)["decoder.conv_out.weight"])
    for number, weights in enumerate(learned):
        assert not any(torch.equal(weights, other) for other in learned[:number]), changes[number]


def test_the_discriminator_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    for change, name in (({}, "PatchGAN"), ({"disc_type": "stylegan"}, "StyleGANDiscriminator")):
        config = small_config(tmp_path / "run", disc_layers=None, resolution=64, **change)
        assert type(built(config, tmp_path).task.discriminator).__name__ == name


def test_options_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"free_bits 1 and kl_capacity 2"):
        small_config(tmp_path, free_bits=1.0, kl_capacity=2.0)
    with pytest.raises(UserError, match="disc_norm spectral is for the patch discriminator"):
        small_config(tmp_path, disc_type="stylegan", disc_norm="spectral")
    with pytest.raises(UserError, match="disc_augment"):
        small_config(tmp_path, disc_augment=["colour"])
