"""CompVis' names against a list written by hand and diffusers' converter, and back again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentvae.cli.main import main
from latentvae.errors import UserError
from latentvae.export.original import original_config, to_original
from latentvae.models import load_network
from latentvae.models.original_names import from_original
from tests.export.tokenizers import export
from tests.tiny import tokenizer

# taming.models.vqgan.VQModel with the ddconfig below: name -> shape of its weight, beside which
# all but the codebook have a bias.
DDCONFIG = {
    "double_z": False,
    "z_channels": 6,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [16],
    "dropout": 0.0,
}
EXPECTED = {
    "encoder.conv_in": (32, 3, 3, 3),
    "encoder.down.0.block.0.norm1": (32,),
    "encoder.down.0.block.0.conv1": (32, 32, 3, 3),
    "encoder.down.0.block.0.norm2": (32,),
    "encoder.down.0.block.0.conv2": (32, 32, 3, 3),
    "encoder.down.0.downsample.conv": (32, 32, 3, 3),
    "encoder.down.1.block.0.norm1": (32,),
    "encoder.down.1.block.0.conv1": (64, 32, 3, 3),
    "encoder.down.1.block.0.norm2": (64,),
    "encoder.down.1.block.0.conv2": (64, 64, 3, 3),
    "encoder.down.1.block.0.nin_shortcut": (64, 32, 1, 1),
    "encoder.down.1.attn.0.norm": (64,),
    "encoder.down.1.attn.0.q": (64, 64, 1, 1),
    "encoder.down.1.attn.0.k": (64, 64, 1, 1),
    "encoder.down.1.attn.0.v": (64, 64, 1, 1),
    "encoder.down.1.attn.0.proj_out": (64, 64, 1, 1),
    "encoder.norm_out": (64,),
    "encoder.conv_out": (6, 64, 3, 3),
    "quant_conv": (4, 6, 1, 1),
    "quantize.embedding": (16, 4),
    "post_quant_conv": (6, 4, 1, 1),
    "decoder.conv_in": (64, 6, 3, 3),
    "decoder.up.1.block.0.norm1": (64,),
    "decoder.up.1.block.0.conv1": (64, 64, 3, 3),
    "decoder.up.1.block.0.norm2": (64,),
    "decoder.up.1.block.0.conv2": (64, 64, 3, 3),
    "decoder.up.1.block.1.norm1": (64,),
    "decoder.up.1.block.1.conv1": (64, 64, 3, 3),
    "decoder.up.1.block.1.norm2": (64,),
    "decoder.up.1.block.1.conv2": (64, 64, 3, 3),
    "decoder.up.1.attn.0.norm": (64,),
    "decoder.up.1.attn.0.q": (64, 64, 1, 1),
    "decoder.up.1.attn.0.k": (64, 64, 1, 1),
    "decoder.up.1.attn.0.v": (64, 64, 1, 1),
    "decoder.up.1.attn.0.proj_out": (64, 64, 1, 1),
    "decoder.up.1.attn.1.norm": (64,),
    "decoder.up.1.attn.1.q": (64, 64, 1, 1),
    "decoder.up.1.attn.1.k": (64, 64, 1, 1),
    "decoder.up.1.attn.1.v": (64, 64, 1, 1),
    "decoder.up.1.attn.1.proj_out": (64, 64, 1, 1),
    "decoder.up.1.upsample.conv": (64, 64, 3, 3),
    "decoder.up.0.block.0.norm1": (64,),
    "decoder.up.0.block.0.conv1": (32, 64, 3, 3),
    "decoder.up.0.block.0.norm2": (32,),
    "decoder.up.0.block.0.conv2": (32, 32, 3, 3),
    "decoder.up.0.block.0.nin_shortcut": (32, 64, 1, 1),
    "decoder.up.0.block.1.norm1": (32,),
    "decoder.up.0.block.1.conv1": (32, 32, 3, 3),
    "decoder.up.0.block.1.norm2": (32,),
    "decoder.up.0.block.1.conv2": (32, 32, 3, 3),
    "decoder.norm_out": (32,),
    "decoder.conv_out": (3, 32, 3, 3),
}
for _part in ("encoder", "decoder"):
    for _name in ("block_1", "block_2"):
        for _layer in ("norm1", "norm2"):
            EXPECTED[f"{_part}.mid.{_name}.{_layer}"] = (64,)
        for _layer in ("conv1", "conv2"):
            EXPECTED[f"{_part}.mid.{_name}.{_layer}"] = (64, 64, 3, 3)
    EXPECTED[f"{_part}.mid.attn_1.norm"] = (64,)
    for _layer in ("q", "k", "v", "proj_out"):
        EXPECTED[f"{_part}.mid.attn_1.{_layer}"] = (64, 64, 1, 1)


def vq_model(**options: Any) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (32, 64),
        "latent_channels": 6,
        "num_vq_embeddings": 16,
        "vq_embed_dim": 4,
    }
    return VQModel(**shape | options)


def kl(levels: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(32, 32, 64)[:levels],
        **options,
    )


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_names_and_shapes_are_those_of_taming() -> None:
    found = {name: tuple(value.shape) for name, value in to_original(vq_model()).items()}
    expected = {f"{name}.weight": shape for name, shape in EXPECTED.items()}
    biased = EXPECTED.keys() - {"quantize.embedding"}
    expected |= {f"{name}.bias": EXPECTED[name][:1] for name in biased}
    assert found == expected
    assert original_config(vq_model()) == {"embed_dim": 4, "n_embed": 16, "ddconfig": DDCONFIG}


@pytest.mark.parametrize("net", [vq_model(), kl()], ids=["vq", "kl"])
def test_there_and_back_is_the_same(net: Any) -> None:
    tensors = to_original(net)
    assert same(from_original(tensors, net), net.state_dict())
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"][:, :1]
    with pytest.raises(ValueError, match=r"conv_in\.weight has the shape \(32, 1, 3, 3\)"):
        from_original(tensors, net)
    tensors.pop("encoder.conv_in.weight")
    with pytest.raises(KeyError, match=r"encoder\.conv_in\.weight"):
        from_original(tensors, net)


def test_diffusers_own_converter_reads_it() -> None:
    net = kl()
    assert same(convert_ldm_vae_checkpoint(to_original(net), dict(net.config)), net.state_dict())
    assert original_config(net)["ddconfig"]["double_z"]


def test_the_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = tokenizer("sphere", block_out_channels=(32, 32), norm_num_groups=32)
    folder, out = export(net, tmp_path / "export").path, tmp_path / "sub" / "vqgan.safetensors"
    main(["convert", str(folder), "--out", str(out)])
    loaded: Any = VQModel.from_pretrained(folder)
    assert same(from_original(load_file(out), loaded), loaded.state_dict())
    with safe_open(out, framework="pt") as file:
        params = json.loads(file.metadata()["params"])
    assert params["n_embed"] == 32 and params["ddconfig"]["ch_mult"] == [1, 1]
    assert "n_embed: 32" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    before = out.stat().st_ino
    for given, message in (
        (out, "--overwrite"),
        (out.with_suffix(".ckpt"), "must be a .safetensors"),
    ):
        with pytest.raises(SystemExit):
            main(["convert", str(folder), "--out", str(given)])
        said = capsys.readouterr().err
        assert message in said and len(said.strip().splitlines()) == 1
    assert out.stat().st_ino == before
    main(["convert", str(folder), "--out", str(out), "--overwrite"])


KL_F16 = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (32, 64),
    "latent_channels": 16,
}
WRITTEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "kl": (AutoencoderKL, {"scaling_factor": 0.5, "shift_factor": 0.25}),
    "kl_f16": (AutoencoderKL, KL_F16 | {"scaling_factor": 0.7}),
    "eight": (AutoencoderKL, {"latent_channels": 8, "layers_per_block": 3}),
    "sdxl": (AutoencoderKL, {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}),
    "vq": (VQModel, KL_F16 | {"latent_channels": 6, "vq_embed_dim": 4, "num_vq_embeddings": 16}),
    "wide_vq": (VQModel, {"latent_channels": 5, "num_vq_embeddings": 9, "scaling_factor": 0.3}),
}


@pytest.fixture
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A network, and the file that `convert` wrote of it."""
    cls, options = WRITTEN[request.param]
    torch.manual_seed(0)
    net = cls(**{"block_out_channels": (32,), "sample_size": 48} | options)
    net.save_pretrained(tmp_path / "vae")
    main(["convert", str(tmp_path / "vae"), "--out", str(tmp_path / "vae.safetensors")])
    return net, tmp_path / "vae.safetensors"


@pytest.mark.parametrize("written", WRITTEN, indirect=True)
def test_what_is_written_loads_as_the_same_network(written: tuple[Any, Path]) -> None:
    net, path = written
    loaded = load_network(path)
    assert type(loaded) is type(net) and same(loaded.state_dict(), net.state_dict())
    names = [name for name in net.config if not name.startswith("_")]
    ours, theirs = ([n.config[name] for name in names] for n in (loaded, net))
    assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))


@pytest.mark.parametrize("written", ["kl_f16", "eight", "vq", "wide_vq"], indirect=True)
def test_shapes_suffice_without_metadata(
    written: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    net, path = written
    save_file(load_file(path), path)
    if net.config["latent_channels"] == 16:
        with pytest.raises(UserError, match="how its latents are scaled"):
            load_network(path)
    loaded = load_network(path, family="other" if net.config["latent_channels"] == 16 else None)
    assert type(loaded) is type(net) and same(loaded.state_dict(), net.state_dict())
    assert loaded.config["scaling_factor"] == 1.0
    said = capsys.readouterr().err
    assert ("scaling_factor is 1.0" in said) == (net.config["latent_channels"] == 8)


@pytest.mark.parametrize("written", ["kl"], indirect=True)
def test_the_scale_is_printed_kept_and_wins_over_the_family(
    written: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = written
    main(["convert", str(path.with_name("vae")), "--out", str(path), "--overwrite"])
    printed = capsys.readouterr().out
    assert "scaling_factor: 0.5\n" in printed and "shift_factor: 0.25\n" in printed
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["scaling_factor"], metadata["shift_factor"]) == ("0.5", "0.25")
    loaded = load_network(path, family="sd")
    assert (loaded.config["scaling_factor"], loaded.config["shift_factor"]) == (0.5, 0.25)
    note = capsys.readouterr().err
    assert "scaling_factor is 0.5, so the value 0.18215 of family 'sd' is not" in note


@pytest.mark.parametrize("written", ["kl"], indirect=True)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not the config of an AutoencoderKL or VQModel"),
        ('{"_class_name": "UNet2DModel"}', "not the config of an AutoencoderKL or VQModel"),
        ('{"_class_name": "AutoencoderKL", "layers_per_block": 5000}', r"at most 1000 \(got 5000"),
        ('{"_class_name": "AutoencoderKL", "block_out_channels": [64]}', "has the shape"),
        ('{"_class_name": "VQModel", "block_out_channels": [32]}', "has the shape"),
        ('{"_class_name": "AutoencoderKL", "block_out_channels": "x"}', "cannot|can be read"),
    ],
)
def test_metadata_that_does_not_fit_is_one_sentence(
    written: tuple[Any, Path], config: str, message: str
) -> None:
    _, path = written
    save_file(load_file(path), path, metadata={"diffusers_config": config})
    with pytest.raises(UserError, match=message):
        load_network(path)


@pytest.mark.parametrize(("family", "channels"), [("sd", 4), ("flux", 16)])
@torch.no_grad()
def test_a_network_without_quant_conv_gets_identities(
    family: Any, channels: int, tmp_path: Path
) -> None:
    net = kl(latent_channels=channels, use_quant_conv=False, use_post_quant_conv=False).eval()
    net.save_pretrained(tmp_path / "vae")
    main(["convert", str(tmp_path / "vae"), "--out", str(tmp_path / "vae.safetensors")])
    tensors = load_file(tmp_path / "vae.safetensors")
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        assert torch.equal(tensors[f"{name}.weight"][:, :, 0, 0], torch.eye(width))
        assert torch.equal(tensors[f"{name}.bias"], torch.zeros(width))
    save_file(tensors, tmp_path / "bare.safetensors")  # read from the tensors alone
    loaded = load_network(tmp_path / "bare.safetensors", family=family).eval()
    images = torch.rand(1, 3, 16, 24)
    moments = net.encode(images).latent_dist.parameters
    torch.testing.assert_close(loaded.encode(images).latent_dist.parameters, moments)
    z = moments[:, :channels]
    torch.testing.assert_close(loaded.decode(z).sample, net.decode(z).sample)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (tokenizer("fsq"), "no DiscreteAutoencoder"),
        (vq_model(norm_num_groups=16), "32 groups, not 16"),
        (vq_model(block_out_channels=(64, 96)), "multiples of the first, not 64, 96"),
        (vq_model(mid_block_add_attention=False), "middle block has attention"),
        (vq_model(up_block_types=("UpDecoderBlock2D",) * 2), "attention at the same levels"),
        (kl(act_fn="relu"), "activation is silu, not relu"),
        (vq_model(norm_type="spatial"), "no spatial norm"),
        (vq_model(lookup_from_codebook=True), "export without lookup_from_codebook"),
    ],
)
def test_what_the_original_code_cannot_be_is_one_sentence(net: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_original(net)
