"""Folders with variants of weights, other files beside them, and names that tools changed."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from latentvae.cli.main import main
from latentvae.errors import UserError
from latentvae.models import load_network
from latentvae.models.weight_files import choose_variant
from tests.models.test_single_file import equal, network

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def net() -> AutoencoderKL:
    return network()


@pytest.fixture(scope="module")
def saved(net: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    net.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "vae"))


def rename(folder: Path, *names: str) -> None:
    """Put the folder's weights under other names, which all hold the same."""
    weights = folder / f"{WEIGHTS}.safetensors"
    for name in names:
        shutil.copy(weights, folder / name)
    weights.unlink()


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_the_only_variant_is_loaded_and_named(
    variant: str, folder: Path, net: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    rename(folder, f"{WEIGHTS}.{variant}.safetensors")
    loaded = load_network(folder)
    assert equal(loaded, net) and loaded.dtype == torch.float32
    assert f"only as the variant '{variant}'" in capsys.readouterr().err


def test_a_variant_is_chosen(folder: Path, net: AutoencoderKL) -> None:
    net.save_pretrained(folder, variant="fp16")
    other = load_file(folder / f"{WEIGHTS}.safetensors")
    other["decoder.conv_out.bias"] += 1
    save_file(other, folder / f"{WEIGHTS}.safetensors")
    assert not equal(load_network(folder), net)  # the plain weights
    assert equal(load_network(folder, variant="fp16"), net)
    with pytest.raises(UserError, match=r"no variant 'fp61'.*plain weights, 'fp16'; did you mean"):
        load_network(folder, variant="fp61")


def test_several_variants_ask_for_a_choice(folder: Path, net: AutoencoderKL) -> None:
    rename(folder, f"{WEIGHTS}.fp16.safetensors", f"{WEIGHTS}.ema.safetensors")
    with pytest.raises(UserError, match=r"variants 'ema', 'fp16'. Choose one, such as --variant"):
        load_network(folder)
    assert equal(load_network(folder, variant="ema"), net)
    out = folder.parent / "vae.safetensors"
    main(["convert", str(folder), "--out", str(out), "--variant", "fp16"])
    assert equal(load_network(out), net)


def test_shards_of_a_variant_load(folder: Path, net: AutoencoderKL) -> None:
    (folder / f"{WEIGHTS}.safetensors").unlink()
    net.save_pretrained(folder, variant="fp16", max_shard_size="500KB")
    assert len(list(folder.glob(f"{WEIGHTS}.fp16-*.safetensors"))) > 1
    assert equal(load_network(folder), net)


@pytest.mark.parametrize("name", [f"{WEIGHTS}.bin", f"{WEIGHTS}.fp16.bin", "model.ckpt"])
def test_pickles_are_refused_because_they_can_hold_code(name: str, folder: Path) -> None:
    rename(folder, name)
    with pytest.raises(UserError, match=f"only in {re.escape(name)}.*can hold code.*safetensors"):
        load_network(folder)


def test_no_weights_name_what_is_there(folder: Path) -> None:
    rename(folder, "sdxl_vae.safetensors")
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model.safetensors, but has sdxl"):
        load_network(folder)
    assert choose_variant([f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin"], None, path="x") is None


def test_variants_on_the_hub(
    folder: Path, net: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's files are put where it would download them to."""
    rename(folder, f"{WEIGHTS}.fp16.safetensors")
    real = AutoencoderKL.from_pretrained, AutoencoderKL.load_config

    def local(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _, **options: call(folder, **options | {"subfolder": None})

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", local(real[0]))
    monkeypatch.setattr(AutoencoderKL, "load_config", local(real[1]))
    monkeypatch.setattr(
        "latentvae.models.weight_files.list_repo_files",
        lambda _: ["README.md", "unet/x.bin", f"vae/{WEIGHTS}.fp16.safetensors"],
    )
    assert equal(load_network("somebody/something/vae"), net)
    assert equal(load_network("somebody/something/vae", variant="fp16"), net)
    with pytest.raises(UserError, match="cannot load the weights in 'somebody/something/unet'"):
        load_network("somebody/something/unet")


OTHER_CONFIGS = [
    '{"model_type": "clip"}',
    '{"_class_name": "UNet2DConditionModel"}',
    "[]",
    "{broken",
    "",
]


@pytest.mark.parametrize(
    ("config", "name"),
    [(config, f"{WEIGHTS}.safetensors") for config in OTHER_CONFIGS]
    + [(config, "vae.safetensors") for config in [*OTHER_CONFIGS, '{"_class_name": "VQModel"}']],
)
def test_another_config_beside_a_single_file_does_not_matter(
    config: str, name: str, net: AutoencoderKL, tmp_path: Path
) -> None:
    save_file(net.state_dict(), tmp_path / name)
    (tmp_path / "config.json").write_text(config)
    assert equal(load_network(tmp_path / name, family="sd"), net)


def test_a_folder_with_only_a_single_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").touch()
    with pytest.raises(UserError, match=r"no config\.json.*did you mean '.*vae\.safetensors'"):
        load_network(tmp_path)


def test_the_weights_of_a_folder_load_as_the_folder(folder: Path, net: AutoencoderKL) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.7}))
    rename(folder, f"{WEIGHTS}.fp16.safetensors", f"{WEIGHTS}.ema.safetensors")
    loaded = load_network(folder / f"{WEIGHTS}.fp16.safetensors")
    assert equal(loaded, net) and loaded.config["scaling_factor"] == 0.7


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_prefixes_in_a_folder_are_removed_and_named(
    prefix: str, folder: Path, net: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / f"{WEIGHTS}.safetensors"
    save_file({prefix + name: value for name, value in net.state_dict().items()}, weights)
    loaded = load_network(folder, dtype=torch.float64)
    assert loaded.dtype == torch.float64 and equal(loaded.float(), net)
    assert f"'{prefix}'" in capsys.readouterr().err
    save_file({f"{prefix}{name}x": value for name, value in net.state_dict().items()}, weights)
    with pytest.raises(UserError, match="cannot load the weights"):
        load_network(folder)


def test_adapters_must_be_merged_first(folder: Path, tmp_path: Path) -> None:
    weights = folder / f"{WEIGHTS}.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.encoder.conv_in.lora_A.weight"] = torch.zeros(4, 3, 3, 3)
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"adapters that are not merged.*merge_and_unload"):
        load_network(folder)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter of PEFT, which must be merged"):
        load_network(tmp_path / "adapter")
