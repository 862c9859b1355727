"""Runs of networks beside AutoencoderKL: they learn, go on to the bit, and diffusers loads them."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import latentvae
from latentvae.cli.train import config_from_arguments
from latentvae.engine.log import read_rows
from latentvae.errors import UserError
from latentvae.models import build_autoencoder_kl
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.run_export import export_folder
from tests.tasks.autoencoder.small import broken_off, small_config

ENCODER = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
MODELS: dict[str, dict[str, Any]] = {
    "asymmetric": {
        "architecture": "asymmetric",
        "up_block_out_channels": [8, 16, 32, 32],
        "layers_per_up_block": 1,
        **ENCODER,
    },
    "dc": {
        "architecture": "dc",
        "block_out_channels": [8, 16, 16],
        "encoder_layers_per_block": [1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1],
        "attention_levels": [2],
        "attention_head_dim": 8,
    },
}
VIT: dict[str, Any] = {
    "patch_size": 8,
    "encoder_channels": 8,
    "encoder_blocks": 1,
    "decoder_channels": 16,
    "decoder_blocks": 1,
    "attention_head_dim": 8,
}
MODELS["vit_kl"] = {"architecture": "vit_kl", "decoder_head": "conv", **VIT}
MODELS["vit_vq"] = {
    "architecture": "vit_vq",
    "latent_channels": 8,
    "quantizer": {"type": "vq", "num_codes": 32, "code_channels": 4, "restart_threshold": 0.2},
    **VIT,
}
CLASSES = {"asymmetric": "AsymmetricAutoencoderKL", "dc": "AutoencoderDC"}


def load(folder: Path) -> Any:
    return getattr(diffusers, CLASSES[folder.parent.parent.name]).from_pretrained(folder).eval()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CLASSES)
def test_a_run_goes_on_to_the_bit_and_diffusers_loads_it(architecture: str, tmp_path: Path) -> None:
    folder, model = tmp_path / architecture, MODELS[architecture]
    options = {"model": model, "max_train_steps": 3}
    whole = train(small_config(folder / "whole", **options))
    broken_off(folder / "whole", folder / "broken", update=2)
    broken = train(small_config(folder / "broken", **options))
    expected, found = load(whole), load(broken)
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in expected.state_dict().items())
    assert found.config["scaling_factor"] == expected.config["scaling_factor"] != 1.0
    again = folder / "again" / "export"
    export_folder(folder / "broken", out=again)
    assert all(torch.equal(v, load(again).state_dict()[k]) for k, v in found.state_dict().items())
    rows = read_rows(folder / "whole" / "log.jsonl")
    assert any("latent/active_units" in row for row in rows)
    assert any("latent/kl_nats" in row for row in rows) == (architecture != "dc")


def test_a_larger_decoder_learns_on_a_frozen_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = build_autoencoder_kl(**ENCODER).eval()
    base.register_to_config(scaling_factor=0.5)
    base.save_pretrained(tmp_path / "base")
    model = MODELS["asymmetric"] | {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "freeze_encoder": True,
    }
    export = train(small_config(tmp_path / "asymmetric" / "run", model=model, max_train_steps=3))
    tuned, images = load(export), torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        ours, theirs = (n.encode(images).latent_dist.parameters for n in (tuned, base))
    assert torch.equal(ours, theirs)
    assert tuned.config["scaling_factor"] == 0.5
    assert "bit for bit that of the pretrained network" in (export / "README.md").read_text()


@pytest.mark.parametrize("architecture", ["vit_kl", "vit_vq"])
def test_a_vision_transformer_resumes_and_is_fine_tuned(architecture: str, tmp_path: Path) -> None:
    options = {"max_train_steps": 3, "gradient_checkpointing": True, "optimizer": "muon"}
    whole = train(small_config(tmp_path / "whole", MODELS[architecture], **options))
    broken_off(tmp_path / "whole", tmp_path / "broken", update=2)
    broken = train(small_config(tmp_path / "broken", MODELS[architecture], **options))
    base, again = latentvae.load(whole), latentvae.load(broken)
    expected, found = base.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())

    model = {"pretrained_model_name_or_path": str(whole), "freeze_encoder": True}
    config = small_config(tmp_path / "tuned", MODELS[architecture] | {"patch_size": 4} | model)
    tuned, images = latentvae.load(train(config)), torch.rand(2, 3, 32, 40) * 2 - 1
    assert torch.equal(tuned.encode(images), base.encode(images))
    assert not torch.equal(tuned.reconstruct(images), base.reconstruct(images))
    assert tuned.net.config["scaling_factor"] == base.net.config["scaling_factor"] != 1.0


def test_a_base_of_another_kind_is_named(tmp_path: Path) -> None:
    build_autoencoder_kl(**ENCODER).save_pretrained(tmp_path / "base")
    model = MODELS["dc"] | {"pretrained_model_name_or_path": str(tmp_path / "base")}
    with pytest.raises(UserError, match=r"is a AutoencoderKL, but .* fine-tunes AutoencoderDC"):
        train(small_config(tmp_path / "run", model=model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"free_bits": 0.1}, "free_bits 0.1 has no meaning for the architecture dc"),
        ({"deterministic_posterior": True}, "deterministic_posterior has no meaning"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing does not exist"),
        ({"export_profile": "sd3"}, "export_profile sd3 has no meaning"),
    ],
)
def test_options_without_a_meaning_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        small_config(tmp_path, model=MODELS["dc"], **options)


def test_the_preset_decides_which_flags_there_are() -> None:
    config = config_from_arguments(
        ["--config", "dc_f32", "--attention_head_dim", "64"], description="Train."
    )
    assert config.model.shape()["attention_head_dim"] == 64
    with pytest.raises(
        UserError, match="option '--use_quant_conv' has no meaning for config dc_f32"
    ):
        config_from_arguments(["--config", "dc_f32", "--use_quant_conv"], description="Train.")
    with pytest.raises(UserError, match="unknown option '--architecture'"):
        config_from_arguments(["--architecture", "dc"], description="Train.")
