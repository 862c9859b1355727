"""The export folder: equal to the trained network, with the config that pipelines need."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL

import latentvae.export.continuous as export_module
from latentvae.errors import UserError
from latentvae.export import ExportReport, ModelCard, export_autoencoder
from latentvae.latents import LatentStatistics, latent_statistics
from latentvae.models import family_of
from latentvae.models.conv.asymmetric import build_asymmetric_kl
from tests.tiny import dc


def tiny(d: int = 4, *, quant: bool = True) -> AutoencoderKL:
    torch.manual_seed(0)
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=d,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    return net.eval()


def unsafe(net: AutoencoderKL) -> AutoencoderKL:
    """Activations of about 1e6 before a GroupNorm: the pictures stay, float16 overflows."""
    with torch.no_grad():
        net.decoder.conv_in.weight.mul_(1e7)
    return net


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def write(images: torch.Tensor, tmp_path: Path) -> Callable[..., ExportReport]:
    def call(net: AutoencoderKL, **options) -> ExportReport:
        options.setdefault("out", tmp_path / "runs" / "export")
        options.setdefault("statistics", measure(net, images))
        return export_autoencoder(net, sample_size=64, probe=images, **options)

    return call


def measure(net: AutoencoderKL, images: torch.Tensor) -> LatentStatistics:
    return latent_statistics(net, [images], generator=torch.Generator().manual_seed(2))


def load(report: ExportReport) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(report.path, use_safetensors=True)


@pytest.mark.parametrize("quant", [True, False])
def test_loaded_export_equals_the_trained_network(write, images, quant: bool) -> None:
    net = tiny(quant=quant)
    net.to(memory_format=torch.channels_last)
    before = copy.deepcopy(net.state_dict())
    loaded = load(write(net)).state_dict()
    assert loaded.keys() == before.keys()
    assert all(torch.equal(loaded[name], value) for name, value in before.items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@torch.no_grad()
def test_odd_sizes_decode_alike(write) -> None:
    net = tiny()
    loaded = copy.deepcopy(load(write(net)))
    images = torch.rand(1, 3, 29, 43) * 2 - 1
    z = net.encode(images).latent_dist
    assert torch.equal(z.parameters, loaded.encode(images).latent_dist.parameters)
    assert torch.equal(net.decode(z.mode()).sample, loaded.decode(z.mode()).sample)


def test_scale_of_the_sd_profile(write, images) -> None:
    net = tiny()
    report = write(net)
    config, statistics = load(report).config, measure(net, images)
    assert config.scaling_factor == statistics.scaling_factor
    assert config.shift_factor == 0.0  # never null: SD3 and FLUX pipelines add it
    assert config.latents_mean is None
    assert config.latents_std is None
    assert config.sample_size == 64
    assert type(config.sample_size) is int
    assert report.old_scaling_factor == 0.18215


def test_scale_of_the_sd3_profile(write, images) -> None:
    net = tiny(16, quant=False)
    config = load(write(net, profile="sd3")).config
    assert config.scaling_factor == measure(net, images).scaling_factor
    assert config.shift_factor == measure(net, images).mean != 0.0


def test_scale_of_the_sdxl_profile(write, images) -> None:
    net = tiny()
    config, statistics = load(write(net, profile="sdxl")).config, measure(net, images)
    assert config.scaling_factor == 1.0
    assert config.latents_mean == statistics.channel_mean.tolist()
    assert config.latents_std == statistics.channel_std.tolist()


def test_a_frozen_encoder_keeps_its_scale(write, images) -> None:
    net = tiny()
    net.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    report = write(net, frozen_encoder=True)
    assert (load(report).config.scaling_factor, load(report).config.shift_factor) == (0.5, 0.25)
    assert report.measured_scaling_factor == measure(net, images).scaling_factor
    assert "before 0.50000" in report.summary()


def test_float16_decides_force_upcast(write, tmp_path: Path) -> None:
    safe = write(tiny(quant=False))
    assert safe.half_precision.safe
    assert not load(safe).config.force_upcast
    assert load(safe).post_quant_conv is None

    report = write(unsafe(tiny(quant=False)), out=tmp_path / "unsafe")
    assert load(report).config.force_upcast
    assert report.identity_post_quant_conv
    assert next(iter(load(report).post_quant_conv.parameters())).dtype == torch.float32

    report = write(unsafe(tiny(quant=True)), out=tmp_path / "unsafe_quant")
    assert load(report).config.force_upcast
    assert not report.identity_post_quant_conv


def test_no_private_config_is_carried_over(write, tmp_path: Path) -> None:
    first = write(tiny(), out=tmp_path / "secret")
    second = write(load(first), out=tmp_path / "second")
    assert "secret" not in (second.path / "config.json").read_text()


def test_files_and_modes_follow_the_umask(write, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        path = write(tiny()).path
    finally:
        os.umask(old)
    names = {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    assert {file.name for file in path.iterdir()} == names
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}
    assert path.stat().st_mode & 0o777 == 0o750
    assert [entry.name for entry in path.parent.iterdir()] == ["export"]


def test_no_random_numbers_are_drawn(write, images) -> None:
    net = tiny()
    statistics = measure(net, images)
    state = torch.get_rng_state()
    write(net, statistics=statistics)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_earlier_export_is_replaced_only_when_asked(write) -> None:
    first = write(tiny())
    old = (first.path / "config.json").read_text()
    with pytest.raises(UserError, match="holds an export"):
        write(tiny(8))
    assert (first.path / "config.json").read_text() == old
    assert load(write(tiny(8), overwrite=True)).config.latent_channels == 8


def test_a_folder_of_something_else_is_never_replaced(write, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"precious")
    with pytest.raises(UserError, match="not an export"):
        write(tiny(), out=tmp_path / "photos", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert load(write(tiny(), out=tmp_path / "empty"))


def asymmetric() -> AsymmetricAutoencoderKL:
    torch.manual_seed(0)
    return build_asymmetric_kl(
        block_out_channels=(8, 8, 8, 8),
        up_block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        layers_per_up_block=1,
        norm_num_groups=4,
    ).eval()


@pytest.mark.parametrize("build", [asymmetric, dc])
def test_no_pipeline_upcasts_a_class_without_the_option(write, build, tmp_path: Path) -> None:
    net = build()
    report = write(net, out=tmp_path / "safe")
    assert "float16 safe" in report.summary() and "float16 is safe" in report.facts()
    with torch.no_grad():
        net.decoder.conv_in.bias.fill_(7e4)
    report = write(net, out=tmp_path / "unsafe")
    assert not report.half_precision.safe and not report.force_upcast
    assert not type(net).load_config(report.path).get("force_upcast")
    for text in (report.summary(), (report.path / "README.md").read_text()):
        assert "not safe: load the model in float32 or bfloat16" in text
        assert "force_upcast" not in text and "pipelines decode" not in text


@pytest.mark.parametrize("build", [asymmetric, dc])
def test_profiles_need_a_class_that_has_their_options(write, build) -> None:
    for profile, names in (("sd3", "shift_factor"), ("sdxl", "latents_mean and latents_std")):
        with pytest.raises(
            UserError, match=rf"writes {names}, which .* does not have\. Use profile"
        ):
            write(build(), profile=profile)


def test_wrong_profiles_are_refused(write) -> None:
    with pytest.raises(UserError, match="did you mean 'sdxl'"):
        write(tiny(), profile="sdlx")
    with pytest.raises(UserError, match=r"4 latent channels \(got 16\)"):
        write(tiny(16), profile="sdxl")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_difference_fails_and_leaves_the_earlier_export(write, monkeypatch, part: str) -> None:
    path = write(tiny()).path
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    load_back = export_module.load_back

    def damaged(folder: Path, cls: type) -> AutoencoderKL:
        net = load_back(folder, cls)
        with torch.no_grad():
            getattr(net, part).conv_out.bias[0] += 1e-6
        return net

    monkeypatch.setattr(export_module, "load_back", damaged)
    with pytest.raises(RuntimeError, match=f"the exported {part} differs .* at 32 x 24"):
        write(tiny(), overwrite=True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [entry.name for entry in path.parent.iterdir()] == ["export"]


def test_the_card_is_one_the_hub_reads(write, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard as HubCard

    grid = tmp_path / "grid.png"
    grid.write_bytes(b"png")
    card = ModelCard(
        name="my-autoencoder",
        metrics={"PSNR (dB)": 31.41592},
        protocol="3 unseen photos at 64 px.",
        training={
            "learning_rate": 1e-4,
            "train_data_dir": "/home/me/x",
            "validation_data_dir": "~me/y",
            "config": "../me/z.yaml",
            "hub_token": "hf_canary",
        },
        sample_grid=grid,
        license="mit",
        resolution=32,
        base_model="us/base",
        dataset="us/photos",
    )
    report = write(tiny(), card=card)
    text = (report.path / "README.md").read_text()
    hub = HubCard(text)
    assert (hub.data.library_name, hub.data.license) == ("diffusers", "mit")
    assert hub.data.get("base_model_relation") == "finetune"
    assert (hub.data.get("base_model"), hub.data.get("datasets")) == ("us/base", "us/photos")
    assert "latentvae" in hub.data.tags and hub.data.get("pipeline_tag") is None
    assert "at 32 pixels" in text
    assert "train_data_dir: x\nvalidation_data_dir: y\nconfig: z.yaml" in text
    assert (report.path / "samples.png").read_bytes() == b"png"
    assert "| PSNR (dB) | 31.42 |" in text
    assert "learning_rate: 0.0001" in text
    assert "canary" not in text
    assert "/home/me" not in text and "~me" not in text


@torch.no_grad()
def test_the_cards_code_runs(write, monkeypatch) -> None:
    report = write(tiny())
    text = (report.path / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    scope = {"images": torch.zeros(1, 3, 16, 16)}
    exec(code.replace("path/to/this/folder", str(report.path)), scope)
    assert scope["recon"].shape == (1, 3, 16, 16)
    assert scope["latents"].shape == (1, 4, 4, 4)


@torch.no_grad()
def test_the_cards_latents_are_those_of_pipelines(write) -> None:
    net = tiny()
    per_channel = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0, 1.0, 0.5, 3.0]}
    net.register_to_config(scaling_factor=0.5, **per_channel)
    report = write(net, frozen_encoder=True)
    text = (report.path / "README.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("latents = "))
    scope = {"torch": torch, "vae": load(report), "z": torch.randn(1, 4, 2, 3)}
    exec(line, scope)
    expected = family_of(net).normalization(net).apply(scope["z"])
    torch.testing.assert_close(scope["latents"], expected)


def test_config_is_plain_json(write) -> None:
    config = json.loads((write(tiny(), profile="sdxl").path / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL"
    assert len(config["latents_std"]) == 4


def test_a_new_networks_scale_before_is_diffusers_default(write) -> None:
    report = write(tiny())
    assert "before 0.18215 (diffusers' default), measured" in report.summary()
    assert "(before 0.18215 (diffusers' default), " in report.facts()
