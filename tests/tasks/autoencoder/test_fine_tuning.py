"""Fine-tuning a pretrained network: the decoder alone, and all of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from skimage import data
from torch import Tensor

from latentvae.engine.checkpoint_files import load_checkpoint, optimizer_tensors
from latentvae.engine.log import read_rows
from latentvae.errors import UserError
from latentvae.models import build_autoencoder_kl, load_network
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.fine_tuning import BASE_NAME, open_base, with_shape_of
from latentvae.tasks.autoencoder.reach import few_validation_images, without_effect
from latentvae.tasks.autoencoder.run_export import export_folder
from tests.tasks.autoencoder.small import built, small_config


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock network of another shape than the run's preset, with a scale and a shift."""
    torch.manual_seed(0)
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=3,
        sample_size=64,
        scaling_factor=0.3,
        shift_factor=0.1,
    )
    folder = tmp_path_factory.mktemp("pretrained") / "vae"
    net.save_pretrained(folder)
    return folder


def fine_tune(folder: Path, base: Path, **changes: Any) -> Any:
    options = {"pretrained_model_name_or_path": str(base), "freeze_encoder": True, "kl_scale": 0.0}
    return small_config(folder, **options | changes)


def unseen() -> Tensor:
    pixels = torch.from_numpy(np.array(data.chelsea()[100:164, 100:196]))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def load(folder: Path) -> Any:
    net: Any = AutoencoderKL.from_pretrained(folder)
    return net.eval()


@torch.no_grad()
def error(net: Any) -> float:
    return (
        (net.decode(net.encode(unseen()).latent_dist.mode()).sample - unseen())
        .square()
        .mean()
        .item()
    )


def test_the_decoder_learns_and_the_encoder_stays(pretrained: Path, tmp_path: Path) -> None:
    options = {"max_train_steps": 40, "gradient_accumulation_steps": 1, "disc_scale": 0.0}
    options |= {"ema_decay": 0.5, "validation_steps": 40, "checkpointing_steps": 40}
    export = train(fine_tune(tmp_path / "run", pretrained, **options))
    base, tuned = load(pretrained), load(export)
    with torch.no_grad():
        latents = [net.encode(unseen()).latent_dist.parameters for net in (base, tuned)]
    assert torch.equal(*latents)
    assert error(tuned) < 0.8 * error(base)
    kept = ("scaling_factor", "shift_factor", "sample_size", "latent_channels")
    assert all(tuned.config[key] == base.config[key] for key in kept)
    card = (export / "README.md").read_text()
    assert "bit for bit that of the pretrained network" in card
    assert str(pretrained.parent) not in card
    assert json.loads((tmp_path / "run" / BASE_NAME).read_text())["encoder_sha256"] in card
    measured = [r for r in read_rows(tmp_path / "run" / "log.jsonl") if "validation/psnr" in r]
    gain = measured[-1]["validation/psnr"] - measured[0]["validation/psnr"]
    assert measured[0]["update"] == 0 and f"({gain:+.2f} dB)" in card


@pytest.mark.slow
def test_it_goes_on_to_the_bit_without_the_base(pretrained: Path, tmp_path: Path) -> None:
    base, broken, constant = tmp_path / "base", tmp_path / "broken", {"lr_scheduler": "constant"}
    shutil.copytree(pretrained, base)
    whole = train(fine_tune(tmp_path / "whole", base, max_train_steps=6, **constant))
    train(fine_tune(broken, base, max_train_steps=4, **constant))
    shutil.rmtree(base)
    resumed = train(fine_tune(broken, base, max_train_steps=6, **constant))
    expected, found = load(whole), load(resumed)
    for key in ("scaling_factor", "shift_factor", "sample_size", "block_out_channels"):
        assert found.config[key] == expected.config[key]
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in expected.state_dict().items())
    export_folder(broken, out=tmp_path / "again")
    again = load(tmp_path / "again").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in expected.state_dict().items())


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_base(
    pretrained: Path, tmp_path: Path
) -> None:
    config = fine_tune(tmp_path / "run", pretrained, max_train_steps=1)
    first = open_base(config)
    assert first is not None
    (tmp_path / "run").mkdir()
    first.write(tmp_path / "run")
    again = open_base(config)
    assert again is not None
    weights = again.net.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in first.net.state_dict().items())


def test_the_presets_attention_does_not_matter(pretrained: Path, tmp_path: Path) -> None:
    shape = {"block_out_channels": [8, 8, 8], "attention_levels": [2]}
    config = fine_tune(tmp_path / "run", pretrained, **shape)
    assert with_shape_of(config, open_base(config)).model.f == 2


def test_the_bases_attention_is_recorded(tmp_path: Path) -> None:
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    net.save_pretrained(tmp_path / "vae")
    config = fine_tune(tmp_path / "run", tmp_path / "vae")
    shape = with_shape_of(config, open_base(config)).model.shape()
    assert shape["attention_levels"] == (1,)
    own = build_autoencoder_kl(**shape, sample_size=32).state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_all_of_it_can_learn(pretrained: Path, tmp_path: Path) -> None:
    export = train(fine_tune(tmp_path / "run", pretrained, freeze_encoder=False, kl_scale=1e-6))
    base, tuned = load(pretrained), load(export)
    moved = [
        name
        for name, value in tuned.state_dict().items()
        if not torch.equal(value, base.state_dict()[name])
    ]
    assert any(name.startswith("encoder.") for name in moved)
    assert tuned.config["scaling_factor"] != 0.3  # measured anew


def test_a_new_discriminator_learns_alone_first(pretrained: Path, tmp_path: Path) -> None:
    options = {"disc_start": 0, "disc_warmup_steps": 3, "disc_ramp_steps": 0, "log_steps": 1}
    options |= {"max_train_steps": 4, "ema_decay": 0.0, "validation_steps": 4}
    tiny = {"learning_rate": 1e-60}  # 0 in float32: no weight changes
    export = train(fine_tune(tmp_path / "a", pretrained, **options | tiny))
    base, alone = load(pretrained), load(export)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in alone.state_dict().items())
    card = (export / "README.md").read_text()
    assert "unchanged weights" in card and "fine-tuned" not in card.lower()

    rows = [row for row in read_rows(tmp_path / "a" / "log.jsonl") if "discriminator/loss" in row]
    assert all("loss/rec" not in row and "grad/model" not in row for row in rows[:3])
    assert rows[2]["discriminator/loss"] != rows[0]["discriminator/loss"]
    then = load(train(fine_tune(tmp_path / "b", pretrained, **options | {"max_train_steps": 5})))
    assert not torch.equal(then.decoder.conv_out.weight, base.decoder.conv_out.weight)
    last = [row for row in read_rows(tmp_path / "b" / "log.jsonl") if "loss/rec" in row]
    assert [row["update"] for row in last] == [4, 5]
    assert last[0]["discriminator/adaptive_weight"] > 0

    # the model's warm-up of two updates begins with its first one
    rates = [r["optimizer/learning_rate"] for r in read_rows(tmp_path / "b" / "log.jsonl")
             if "loss/rec" in r]  # fmt: skip
    assert rates == pytest.approx([0.5e-3, 1e-3])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"disc_start": 0, "disc_warmup_steps": 6}, "model would make no update"),
        ({"disc_start": 0, "disc_warmup_steps": 60}, "--max_train_steps above 60"),
    ],
)
def test_a_run_that_would_not_train_the_model_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(small_config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_what_a_run_ends_before_is_one_line_each(tmp_path: Path) -> None:
    late = {"disc_start": 2, "disc_ramp_steps": 8, "kl_warmup_steps": 10}
    lines = without_effect(small_config(tmp_path, **late))
    assert [line.split()[0] for line in lines] == ["disc_ramp_steps", "kl_warmup_steps"]
    assert "only 38% of disc_scale" in lines[0] and "only 50% of kl_scale" in lines[1]
    never = without_effect(small_config(tmp_path, disc_start=6))
    assert len(never) == 1 and "never starts" in never[0]
    assert without_effect(small_config(tmp_path)) == []
    gumbel = {"architecture": "vq", "quantizer": {"type": "gumbel", "num_codes": 16}}
    (line,) = without_effect(small_config(tmp_path, gumbel, learn_logvar=False))
    assert line.startswith("temperature_steps") and "--temperature_steps 3" in line


def test_few_validation_images_are_a_sentence_with_the_share_to_give(tmp_path: Path) -> None:
    config = small_config(tmp_path, train_data_dir="photos")
    (line,) = few_validation_images(config, count=2, training=198)
    assert "only 2 images" in line and "--validation_share 0.08 (200 images" in line
    assert few_validation_images(config, count=8, training=10) == []
    (line,) = few_validation_images(
        small_config(tmp_path, max_validation_images=4), count=50, training=1000
    )
    assert "only 4 images" in line and "--max_validation_images 8" in line


def test_what_cannot_be_is_told_before_the_work(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="freeze_encoder needs pretrained_model_name_or_path"):
        small_config(tmp_path / "run", freeze_encoder=True)
    with pytest.raises(UserError, match=r"did you mean '.*/vae'"):
        train(fine_tune(tmp_path / "run", pretrained.with_name("vaa")))
    with pytest.raises(UserError, match=r"resolution 33 .* f = 2.*34"):
        train(fine_tune(tmp_path / "run", pretrained, block_out_channels=[8], resolution=33))
    grey = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    grey.save_pretrained(tmp_path / "grey")
    with pytest.raises(UserError, match="takes 1-channel images"):
        train(fine_tune(tmp_path / "run", tmp_path / "grey"))
    assert not (tmp_path / "run").exists()


def test_the_card_links_a_base_of_the_hub(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_network(pretrained)
    monkeypatch.setattr(
        "latentvae.tasks.autoencoder.fine_tuning.load_network", lambda *_, **__: loaded
    )
    train(fine_tune(tmp_path / "run", Path("us/models/vae"), max_train_steps=1))
    monkeypatch.undo()
    export_folder(tmp_path / "run", out=tmp_path / "again")  # what it remembers of the base
    for export in (tmp_path / "run" / "export", tmp_path / "again"):
        card = ModelCard.load(export / "README.md")
        assert card.data.get("base_model") == "us/models"
        assert card.data.get("base_model_relation") == "finetune"
        assert "The decoder of us/models/vae, fine-tuned." in card.text


def test_a_new_run_starts_with_the_discriminator_of_an_earlier_one(tmp_path: Path) -> None:
    train(small_config(tmp_path / "first", max_train_steps=3, validation_steps=3))
    saved = load_checkpoint(tmp_path / "first" / "checkpoint-3").tensors
    new = small_config(
        tmp_path / "second", discriminator_from=str(tmp_path / "first"), learning_rate=1e-4
    )
    training = built(new, tmp_path / "second")
    learner = training.task.learners["discriminator"]
    weights = learner.module.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in saved["discriminator"].items())
    state = optimizer_tensors(learner.optimizer, learner.module)
    assert all(torch.equal(v, state[k]) for k, v in saved["discriminator_optimizer"].items())

    # the message of a resume with other options names the way
    with pytest.raises(UserError, match="--discriminator_from") as refused:
        train(small_config(tmp_path / "first", max_train_steps=3, learning_rate=1e-4))
    assert f"--pretrained_model_name_or_path {tmp_path / 'first'}/export" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no checkpoint that can be used"),
        ({"disc_scale": 0.0}, "has no effect with disc_scale 0"),
    ],
)
def test_a_discriminator_that_is_not_there_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        given = {"discriminator_from": str(tmp_path / "none"), **options}
        built(small_config(tmp_path / "run", **given), tmp_path / "run")
