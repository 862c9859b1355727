"""Single files with CompVis' names and diffusers', alone and in whole checkpoints."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models import modeling_utils
from safetensors.torch import save_file
from torch import Tensor

import latentvae
from latentvae.errors import UserError
from latentvae.models import load_network

LEVELS = 3
RENAMES = [  # diffusers to CompVis
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
]


def network(channels: int = 4, *, quant_conv: bool = True) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        block_out_channels=(32, 32, 64),
        latent_channels=channels,
        layers_per_block=1,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    ).eval()


def original(net: AutoencoderKL) -> dict[str, Tensor]:
    """Return the weights with CompVis' names, the attention's as 1 x 1 convolutions."""
    tensors = {}
    for name, value in net.state_dict().items():
        renamed = re.sub(
            r"up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)",
            lambda m: f"up.{LEVELS - 1 - int(m[1])}." + (f"block.{m[3]}" if m[3] else "upsample"),
            name,
        )
        for pattern, other in RENAMES:
            renamed = re.sub(pattern, other, renamed)
        attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", renamed)
        tensors[renamed] = value[:, :, None, None].clone() if attention else value.clone()
    return tensors


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def file_of(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


@torch.no_grad()
def equal(loaded: Any, net: Any) -> bool:
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = net.encode(images).latent_dist.parameters
    if not torch.equal(loaded.eval().encode(images).latent_dist.parameters, z):
        return False
    z = net.encode(images).latent_dist.mode()
    return torch.equal(loaded.decode(z).sample, net.decode(z).sample)


@pytest.mark.parametrize(
    ("family", "channels", "scaling", "shift"),
    [
        ("sd", 4, 0.18215, None),
        ("sdxl", 4, 0.13025, None),
        ("sd3", 16, 1.5305, 0.0609),
        ("flux", 16, 0.3611, 0.1159),
    ],
)
def test_a_file_is_the_network(
    family: Any, channels: int, scaling: float, shift: float | None, tmp_path: Path
) -> None:
    net = network(channels, quant_conv=channels == 4)
    path = file_of(tmp_path / "vae.safetensors", original(net))
    loaded = load_network(path, family=family)
    assert equal(loaded, net)
    config = loaded.config
    assert (config["scaling_factor"], config["shift_factor"]) == (scaling, shift)
    assert config["use_quant_conv"] == config["use_post_quant_conv"] == (channels == 4)
    in_diffusers_names = file_of(tmp_path / "other.safetensors", net.state_dict())
    assert equal(load_network(in_diffusers_names, family=family), net)
    model = latentvae.load(path, family=family)
    assert (model.name, model.f, model.scaling_factor) == ("vae", 4, scaling)


def test_a_whole_checkpoint_tells_its_family(tmp_path: Path) -> None:
    net = network()
    for text_encoder, scaling in (
        ("cond_stage_model", 0.18215),
        ("conditioner.embedders", 0.13025),
    ):
        tensors = prefixed("first_stage_model.", original(net))
        tensors |= {f"{text_encoder}.0.weight": torch.zeros(1)}
        tensors |= {"model.diffusion_model.out.0.weight": torch.zeros(2)}
        loaded = load_network(file_of(tmp_path / "whole.safetensors", tensors))
        assert equal(loaded, net) and loaded.config["scaling_factor"] == scaling


@pytest.mark.parametrize(("blocks", "family"), [("joint", "sd3"), ("double", "flux")])
def test_a_whole_checkpoint_of_16_channels_tells_its_family(
    blocks: str, family: str, tmp_path: Path
) -> None:
    net = network(16, quant_conv=False)
    tensors = prefixed("first_stage_model." if family == "sd3" else "vae.", original(net))
    tensors |= {f"model.diffusion_model.{blocks}_blocks.0.x.weight": torch.zeros(1)}
    loaded = load_network(file_of(tmp_path / "whole.safetensors", tensors))
    assert equal(loaded, net)
    assert loaded.config["scaling_factor"] == {"sd3": 1.5305, "flux": 0.3611}[family]


def test_a_whole_checkpoint_keeps_the_scale_that_it_measured(tmp_path: Path) -> None:
    """Latent diffusion's scale_by_std writes it as a buffer."""
    net = network(3)
    tensors = prefixed("first_stage_model.", original(net)) | {"scale_factor": torch.tensor(0.25)}
    tensors |= {"cond_stage_model.x": torch.zeros(1)}  # but no autoencoder of the family 'sd'
    loaded = load_network(file_of(tmp_path / "whole.safetensors", tensors))
    assert equal(loaded, net) and loaded.config["scaling_factor"] == 0.25


@pytest.mark.parametrize("convolutions", [False, True])
def test_early_names_of_the_attention(convolutions: bool, tmp_path: Path) -> None:
    """diffusers before 0.17 wrote query, key, value and proj_attn."""
    net, tensors = network(), {}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, value in net.state_dict().items():
        renamed = re.sub(r"(attentions\.0\.)(to_[qkv]|to_out\.0)", lambda m: m[1] + old[m[2]], name)
        matrix = renamed != name and name.endswith("weight")
        tensors[renamed] = (value[:, :, None, None] if matrix and convolutions else value).clone()
    assert sum("proj_attn" in name for name in tensors) == 4
    path = file_of(tmp_path / "early.safetensors", tensors)
    assert equal(load_network(path, family="sd"), net)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("_orig_mod.", "'_orig_mod.' (torch.compile)"),
        ("module._orig_mod.", "'module.' (DistributedDataParallel) and '_orig_mod.'"),
        ("base_model.model.", "'base_model.model.' (PEFT)"),
        ("net.", "begin with 'net.'"),
        ("module.vae.", "'module.' (DistributedDataParallel)"),
    ],
)
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_prefixes_of_training_tools_are_removed_and_named(
    prefix: str, said: str, names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = network()
    tensors = original(net) if names == "original" else net.state_dict()
    path = file_of(tmp_path / "vae.safetensors", prefixed(prefix, tensors))
    assert equal(load_network(path, family="sd"), net)
    assert said in capsys.readouterr().err


def test_wrappers_inside_of_names_are_removed(tmp_path: Path) -> None:
    net = network()
    tensors = {
        re.sub(r"^(encoder|decoder)\.", r"\1._orig_mod.", name).replace(
            "conv1.", "conv1.base_layer."
        ): value
        for name, value in net.state_dict().items()
    }
    assert equal(load_network(file_of(tmp_path / "vae.safetensors", tensors), family="sd"), net)


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    halves = {name: value.half() for name, value in original(network()).items()}
    loaded = load_network(file_of(tmp_path / "half.safetensors", halves), family="sd")
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_diffusers_says_nothing(
    dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(modeling_utils.logger, "warning", said.append)
    path = file_of(tmp_path / "vae.safetensors", original(network()))
    loaded = load_network(path, family="sd", dtype=dtype)
    assert loaded.dtype == (dtype or torch.float32) and not said


def test_other_files_are_one_sentence(tmp_path: Path) -> None:
    net = network()
    alone = file_of(tmp_path / "vae.safetensors", original(net))
    cut = dict(original(net))
    cut.pop("decoder.conv_out.bias")
    headless = dict(original(net))
    headless.pop("encoder.conv_in.weight")

    # missing tensors and wrong families
    wrong = [
        (file_of(tmp_path / "headless.safetensors", headless), "sd", "encoder.conv_in.weight"),
        (alone, None, "sd, sdxl, sd3, flux"),
        (alone, "flux", "4 latent channels, but autoencoders of the family 'flux' have 16"),
        (alone, "sdx", "did you mean 'sdxl'"),
        (file_of(tmp_path / "cut.safetensors", cut), "sd", "decoder.conv_out.bias"),
        (file_of(tmp_path / "unet.safetensors", {"a": torch.zeros(1)}), "sd", "no autoencoder"),
        (
            file_of(tmp_path / "vit.safetensors", {"encoder.layer.0": torch.zeros(1)}),
            "sd",
            "other names",
        ),
    ]

    # too few channels
    narrow = {"encoder.down.0.block.0.conv1.weight": torch.zeros(48, 48, 3, 3)}
    narrow |= {"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}
    wrong += [
        (file_of(tmp_path / "narrow.safetensors", narrow), "sd", "48 channels.* multiples of 32")
    ]

    # other tensors, names and shapes
    tokenizer = original(net) | {"quantize.embedding.weight": torch.zeros(8, 4)}
    attention = {"encoder.down.1.attn.0.q.weight": torch.zeros(32, 32, 1, 1)}
    in_diffusers_names = {"encoder.down_blocks.1.attentions.0.to_q.weight": torch.zeros(32, 32)}
    lora = {"encoder.conv_in.lora_A.default.weight": torch.zeros(4, 3, 3, 3)}
    turned = dict(net.state_dict())
    turned["encoder.conv_in.weight"] = turned["encoder.conv_in.weight"].transpose(0, 1).contiguous()
    for name, more, message in (
        ("vq", tokenizer, "encoder.conv_out.weight has the shape"),
        ("attention", original(net) | attention, "encoder.down.1.attn.0.* is missing"),
        ("new", net.state_dict() | in_diffusers_names, "attentions.0.* is missing"),
        ("wide", original(network(8)), "8 latent channels.*give 'other'"),
        ("more", original(net) | {"encoder.x": torch.zeros(1)}, "1 other tensors, such as enc"),
        ("turned", turned, "encoder.conv_in.weight has the shape .3, 32, 3, 3."),
        ("lora", net.state_dict() | lora, "lora_A.*merge_and_unload"),
    ):
        wrong.append((file_of(tmp_path / f"{name}.safetensors", more), "sd", message))

    # other formats
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    (tmp_path / "text.safetensors").write_text("hello")
    wrong += [
        (tmp_path / "model.ckpt", "sd", "Other formats can hold code"),
        (tmp_path / "text.safetensors", "sd", "cannot read"),
    ]

    # each file is refused
    for path, family, message in wrong:
        with pytest.raises(UserError, match=message):
            load_network(path, family=family)  # type: ignore[arg-type]
