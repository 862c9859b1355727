"""Wrong options fail before any work, in one sentence that names the value and the nearest valid
one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from latentvae.bottlenecks import QUANTIZERS
from latentvae.cli.train import config_from_arguments
from latentvae.config.presets import preset_names
from latentvae.config.run_config import flat, option_names
from latentvae.errors import UserError
from latentvae.models import build_autoencoder_kl
from latentvae.models.table import MODELS
from latentvae.option_marks import Elsewhere, marks
from latentvae.proofs.preflight import preflight
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.config import TrainConfig, load_preset, parse
from latentvae.tasks.autoencoder.images import train_transform
from tests.tasks.autoencoder.small import small_config

PRESETS = {
    "kl_f4": (4, 3),
    "kl_f8": (8, 4),
    "kl_f8_d16": (8, 16),
    "kl_f16": (16, 16),
    "kl_f32": (32, 64),
    "dc_f32": (32, 32),
    "sd_asymmetric": (8, 4),
    "vq_small": (8, 64),
    "vqvae2_small": (8, 64),
    "vqvae2_256": (8, 128),
    "vq_f4": (4, 3),
    "vq_f8": (8, 4),
    "vq_f16": (16, 256),
    "vq_f16_l2": (16, 256),
    "fsq_f8": (8, 256),
    "lfq_f16": (16, 256),
    "rq_f16": (16, 256),
    "dvae_f8": (8, 256),
    "simvq_f16": (16, 256),
    "vit_vq_small": (8, 192),
    "vit_vq_base": (8, 768),
    "vit_kl_base": (16, 16),
    "kl_small": (8, 4),
    "kl_small_d16": (8, 16),
    "sd_decoder_finetune": (8, 4),
    "sdxl_decoder_finetune": (8, 4),
    "flux_decoder_finetune": (8, 16),
}


def test_every_preset_is_known_here() -> None:
    assert set(preset_names(TrainConfig)) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_its_shape_and_an_origin(name: str) -> None:
    config = load_preset(name)
    assert (config.model.f, config.model.latent_channels) == PRESETS[name]
    from latentvae.config.presets import presets_folder

    assert (presets_folder() / f"{name}.yaml").read_text().startswith("# ")


def test_kl_f8_has_stable_diffusions_parameters() -> None:
    """83,653,863: the parameter count of Stable Diffusion 1.x's autoencoder."""
    config = load_preset("kl_f8")
    net = build_autoencoder_kl(**config.model.shape())
    assert sum(p.numel() for p in net.parameters()) == 83_653_863
    assert net.config["latent_channels"] == 4


def test_kl_f8_d16_has_the_shape_of_sd3s_autoencoder() -> None:
    """83,819,683: the parameter count of SD3's and FLUX.1's autoencoder."""
    net = build_autoencoder_kl(**load_preset("kl_f8_d16").model.shape())
    assert sum(p.numel() for p in net.parameters()) == 83_819_683
    assert net.quant_conv is None and net.post_quant_conv is None


@pytest.mark.parametrize(
    ("architecture", "quantizer"),
    [
        (architecture, quantizer)
        for architecture in MODELS
        for quantizer in (["vq"] if architecture == "vqvae2" else QUANTIZERS)
    ],
)
def test_leaf_names_are_unique(architecture: str, quantizer: str) -> None:
    model: dict[str, Any] = {"architecture": architecture}
    if MODELS[architecture]().has_codes:
        model["quantizer"] = {"type": quantizer}
    config = parse({"model": model}, source="test")
    names = list(leaves(config))
    assert len(names) == len(set(names)) == len(flat(config))


def leaves(section: BaseModel) -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        yield from leaves(value) if isinstance(value, BaseModel) else [name]


def test_flags_override_the_preset_and_both_spellings_work() -> None:
    config = config_from_arguments(
        [
            "--config",
            "kl_f8",
            "--train-batch-size",
            "3",
            "--no-random_flip",
            "--block_out_channels",
            "32",
            "64",
            "--disc_augment",
            "color",
            "cutout",
        ],
        description="",
    )
    assert config.discriminator.disc_augment == ("color", "cutout")
    assert (config.run.train_batch_size, config.data.random_flip, config.model.f) == (3, False, 2)
    assert config.optimizer.adam_beta1 == 0.5


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"data": {"resolution": 32}}))
    assert config_from_arguments(["--config", str(path)], description="").data.resolution == 32


def test_the_home_folder_is_meant_in_a_flag_that_the_shell_leaves_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = config_from_arguments(["--output_dir=~/runs/first"], description="")
    assert config.run.output_dir == "/home/someone/runs/first"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resolutoin", "64"], "unknown option '--resolutoin'; did you mean '--resolution'?"),
        (["--zzz"], "unknown option '--zzz'. `--help` lists all options."),
        (["--lr", "1e-4"], "unknown option '--lr'; did you mean '--learning_rate'?"),
        (["--batch-size=8"], "did you mean '--train_batch_size'?"),
        (["--use_ema", "false"], "takes no value (got 'false'); did you mean '--no_use_ema'?"),
        (["--random_flip=True"], "takes no value (got 'True'); did you mean '--random_flip'?"),
        (["--no-use_ema", "true"], "did you mean '--no_use_ema'?"),
        (["--resolution", "1", "2", "3"], "--resolution"),
        (["--max_pixels", "0"], "max_pixels is 0"),
        (["--config", "kl_f9"], "did you mean 'kl_f8'?"),
        (["--config", "nowhere/kl_f8.yml"], "neither a file nor a preset"),
        (["--rec_loss", "l3"], "rec_loss is 'l3', but should be 'l1' or 'l2'"),
        (["--crop", "centre"], "did you mean 'center'?"),
        (
            ["--resolution", "60"],
            "resolution 60 is not a multiple of the model's f = 8. The nearest multiple is 64.",
        ),
        (
            ["--crops_per_image", "5"],
            "8 is not a multiple of crops_per_image 5. The nearest multiple is 10.",
        ),
        (
            ["--crop_max_side", "0.3"],
            "crop_min_side must be at most crop_max_side (got 0.5 and 0.3)",
        ),
        (["--resolution", "big"], "--resolution"),
        (["--learning_rate", "-1"], "learning_rate is -1.0, but should be greater than 0"),
        (["--max_train_steps", "0"], "max_train_steps is 0"),
        (["--mixed_precision", "fp16"], "fp16 fails with two optimizers"),
        (["--norm_num_groups", "24"], "norm_num_groups 24 does not divide the width 32"),
        (["--attention_levels", "7"], "attention_levels names level 7"),
        (
            ["--export_profile", "sdxl", "--latent_channels", "8"],
            "export_profile sdxl needs latent_channels 4",
        ),
        (["--config", "kl_f8", "--config=kl_f16"], "--config is given 2 times: kl_f16, kl_f8"),
        (["stray"], "stray"),
        (["--seed"], "--seed"),
        (["--learn_logvar", "maybe"], "maybe"),
        (["--disc_channels", "12"], "disc_channels is 12"),
        (["--validation_share", "1"], "validation_share is 1.0"),
        (["--disc_augment", "color", "colour"], "disc_augment is 'colour', but should be"),
        (["--pretrained_family", "sdx"], "did you mean 'sdxl'?"),
    ],
)
def test_wrong_options_are_told_in_one_sentence(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_arguments(arguments, description="")
    assert said in str(error.value)
    assert "\n" not in str(error.value) and "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("vq_small --num_codes 1", "num_codes is 1, but should be greater than or equal to 2"),
        (
            "fsq_f8 --levels 2 2",
            "(got (2, 2)). For two levels use the preset lfq_f16.",
        ),
        ("fsq_f8 --levels", "(got ())"),
        (
            "fsq_f8 --levels 1000 1000 1000",
            "at most 16,777,216 codes, but (1000, 1000, 1000) give 1,000,000,000",
        ),
        ("lfq_f16 --num_bits 25", "num_bits is 25"),
        ("fsq_f8 --no-l2_normalize", "only for the presets vit_vq_base, vit_vq_small, vq_f16"),
        (
            "kl_small --commitment_weight 1",
            "has no meaning for config kl_small, only for the presets",
        ),
        ("fsq_f8 --codebook_size 9", "'--codebook_size' (here '--num_codes') has no meaning for"),
        ("vq_small --codebook_size 9", "did you mean '--num_codes'?"),
        ("vq_small --n_embed 9", "did you mean '--num_codes'?"),
        ("vq_small --num_vq_embeddings=9", "did you mean '--num_codes'?"),
        ("vq_small --embed-dim 9", "did you mean '--code_channels'?"),
        ("vq_small --beta 1", "did you mean '--commitment_weight'?"),
        (
            "vq_small --quantizer fsq",
            "--config sets this option, with a preset (fsq: fsq_f8; gumbel: dvae_f8;",
        ),
        ("vq_small --quantizer.type fsq", "--config sets this option"),
        (
            "kl_small --architecture vq",
            "--config sets this option, with a preset (asymmetric: sd_asymmetric;",
        ),
        (
            "vq_small --kl_scale 1",
            "kl_scale 1 has no meaning for the architecture vq (vq), which has",
        ),
        (
            "vq_small --entropy_temperature 0.1",
            "entropy_temperature 0.1 has no effect while entropy_weight is 0. Set entropy_weight",
        ),
        (
            "lfq_f16 --entropy_weight 0 --batch_entropy_gamma 2",
            "batch_entropy_gamma 2 has no effect while entropy_weight is 0",
        ),
        (
            "vq_small --codebook_decay 0.9 --codebook_weight 0.5",
            "codebook_weight 0.5 has no effect with codebook_decay 0.9",
        ),
        (
            "rq_f16 --codebook_weight 0",
            "codebook_weight 0 has no effect with codebook_decay 0.99",
        ),
        (
            "dvae_f8 --rec_loss l2",
            "rec_loss l2 has no meaning, because likelihood logit_laplace replaces it. "
            "Leave it at l1.",
        ),
        ("fsq_f8 --lookup_from_codebook", "does not search for the nearest code in a list"),
        ("kl_f8 --lookup_from_codebook", "which has no codes"),
        (
            "vq_f16 --resolution 250",
            "not a multiple of the model's f = 16. The nearest multiple is 256.",
        ),
    ],
)
def test_wrong_options_of_tokenizers(arguments: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_arguments(["--config", *arguments.split()], description="")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "vq_small --entropy_weight 0.1 --entropy_temperature 0.1 --batch_entropy_gamma 2",
        "vq_small --batch_entropy_gamma 1 --codebook_decay 0.9 --codebook_weight 1",
        "vq_small --codebook_weight 0.5",
        "dvae_f8 --rec_loss l1",
        "vq_small --likelihood logit_laplace --rec_loss l1",
    ],
)
def test_options_that_have_a_meaning_or_their_defaults_are_taken(arguments: str) -> None:
    config_from_arguments(["--config", *arguments.split()], description="")


def test_names_of_other_trainers_are_none_of_ours() -> None:
    ours, elsewhere = set(option_names(TrainConfig)), marks(TrainConfig, Elsewhere)
    assert set(elsewhere) <= ours
    others = [other for mark in elsewhere.values() for other in mark.names.split()]
    assert not ours & set(others) and len(others) == len(set(others))


@pytest.mark.parametrize("script", ["kl_small", "vq_small"])
def test_every_script_takes_every_preset(script: str) -> None:
    for name in ("kl_small", "fsq_f8", "dc_f32"):
        config = config_from_arguments(["--config", name], description="", default_config=script)
        assert config == load_preset(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: vq", "model is 'vq', but should be a section"),
        (
            "model: {architecture: vq, quantizer: fsq}",
            "quantizer is 'fsq', but should be a section",
        ),
        ("model: {architecture: vq, quantizer: [1]}", "quantizer is [1], but should be a section"),
        ("model: {architecture: vq, quantizer: {type: fsqq}}", "did you mean 'fsq'?"),
        ("model: {quantizer: {type: fsq}}", "must be under model, with architecture: vq"),
        ("quantizer: {type: fsq}", "must be under model, with architecture: vq"),
        ("data: {resolutoin: 64}", "unknown option 'data.resolutoin'; did you mean 'resolution'?"),
        ("dta: {resolution: 64}", "unknown option 'dta'; did you mean 'data'?"),
        ("data: [1, 2]", "data"),
        ("- 1", "must hold sections"),
        ("a: b: c", "not valid YAML"),
        ("run: {seed: !!python/object/apply:os.system [true]}", "not valid YAML"),
    ],
)
def test_wrong_files_are_told_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_preset(str(path))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        config_from_arguments(["--help"], description="Train.")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in flat(TrainConfig()) if name != "architecture")
    assert all(name in text for name in preset_names(TrainConfig))


@pytest.mark.parametrize("call", [train, preflight])
@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        ("data", "resolution", 33, "resolution 33 is not a multiple of the model's f = 4"),
        ("objective", "rec_loss", "huber", "rec_loss is 'huber', but should be"),
        ("optimizer", "lr_scheduler", "linear", "lr_scheduler is 'linear', but should be"),
    ],
)
def test_options_set_by_assignment_are_checked_too(
    call: Any, section: str, name: str, value: Any, said: str, tmp_path: Path
) -> None:
    config = small_config(tmp_path / "run")
    setattr(getattr(config, section), name, value)
    with pytest.raises(UserError, match=re.escape(said)):
        call(config)
    assert not (tmp_path / "run").exists()


def test_the_crops_have_the_sides_that_the_options_give() -> None:
    sides = {"crop_min_side": 0.12, "crop_max_side": 0.4}
    transform = train_transform(TrainConfig().with_changes({"data": sides}))
    shares = [transform.draw(np.random.default_rng(i)).share for i in range(200)]
    assert 0.12 <= min(shares) < 0.14 and 0.38 < max(shares) <= 0.4
