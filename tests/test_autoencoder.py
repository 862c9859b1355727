"""Loading any AutoencoderKL folder; images of any size and kind in and out."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderRAE,
    AutoencoderTiny,
    VQModel,
)
from PIL import Image
from skimage import data

import latentvae
from latentvae.autoencoder import Autoencoder, load, pad_to_multiple
from latentvae.compute import inference
from latentvae.compute.winograd import convolutions
from latentvae.compute.winograd.convolutions import Limits, WinogradConv2d
from latentvae.compute.winograd.nnpack import has_winograd
from latentvae.errors import UserError
from latentvae.models import DiscreteAutoencoder
from tests.tiny import RAE


@pytest.fixture(scope="module")
def net() -> AutoencoderKL:
    torch.manual_seed(0)
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    return net.eval()


@pytest.fixture
def folder(net: AutoencoderKL, tmp_path: Path) -> Path:
    net.save_pretrained(tmp_path / "first" / "export")
    return tmp_path / "first" / "export"


@pytest.fixture
def model(net: AutoencoderKL) -> Autoencoder:
    return Autoencoder(net, name="first")


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((45, 30), Image.Resampling.LANCZOS)


def tensor(height: int, width: int, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_loads_a_folder(folder: Path, net: AutoencoderKL) -> None:
    model = latentvae.load(folder)
    assert (model.name, model.f, model.latent_channels) == ("first", 4, 4)
    assert (model.scaling_factor, model.shift_factor) == (0.5, 0.25)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in model.net.state_dict().items())
    assert not model.net.training
    assert not any(value.requires_grad for value in model.net.parameters())
    assert load(str(folder), dtype=torch.bfloat16).net.dtype == torch.bfloat16


@torch.no_grad()
def test_equals_stock_calls_where_f_divides(model: Autoencoder, net: AutoencoderKL) -> None:
    images = tensor(16, 24, count=2)
    z = net.encode(images).latent_dist.mode()
    assert torch.equal(model.encode(images), z)
    assert torch.equal(model.decode(z), net.decode(z).sample.clamp(-1, 1))
    drawn = net.encode(images).latent_dist.sample(torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(model.encode(images, sample=True, generator=generator), drawn)


def test_scaled_latents_are_what_sd3_pipelines_see(model: Autoencoder) -> None:
    images = tensor(16, 16)
    z, scaled = model.encode(images), model.encode(images, scaled=True)
    torch.testing.assert_close(scaled, (z - 0.25) * 0.5)
    torch.testing.assert_close(model.decode(scaled, scaled=True), model.decode(z))


def test_scaled_latents_per_channel_are_what_sdxl_sees(net: AutoencoderKL, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    mean, std = [1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 2.0, 4.0]
    config |= {"latents_mean": mean, "latents_std": std, "scaling_factor": 1.0}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    model = load(tmp_path / "m")
    z, scaled = (model.encode(tensor(8, 8), scaled=scaled) for scaled in (False, True))
    std, mean = (torch.tensor(values).view(1, 4, 1, 1) for values in (std, mean))
    torch.testing.assert_close(scaled * std / 1.0 + mean, z)  # pipeline_stable_diffusion_xl.py
    torch.testing.assert_close(model.decode(scaled, scaled=True), model.decode(z))


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (1, 1), (2, 50), (5, 3)])
def test_any_size_comes_back(model: Autoencoder, size: tuple[int, int]) -> None:
    images = tensor(*size)
    z = model.encode(images)
    assert z.shape == (1, 4, -(-size[0] // 4), -(-size[1] // 4))
    assert model.decode(z, size=size).shape == images.shape
    assert torch.equal(model.decode(z, size=size), model.reconstruct(images))


def test_padding_reflects_where_it_can() -> None:
    row = torch.arange(5.0).view(1, 1, 1, 5)
    assert pad_to_multiple(row.expand(1, 1, 5, 5), 4)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert pad_to_multiple(row, 4).shape == (1, 1, 4, 8)
    assert pad_to_multiple(row, 4)[0, 0, 3].tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert pad_to_multiple(row, 5)[0, 0, 4].tolist() == [0, 1, 2, 3, 4]


def test_a_tensor_that_seems_to_be_in_0_to_1_is_warned_about(model: Autoencoder) -> None:
    unit = (tensor(8, 8) + 1) / 2
    for call in (model.encode, model.encode_posterior, model.reconstruct):
        with pytest.warns(UserWarning, match=r"no negative value.*give 2 \* images - 1") as warned:
            call(unit)
        assert warned[0].filename == __file__ and len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in (tensor(8, 8), torch.zeros(1, 3, 8, 8), unit.numpy().transpose(0, 2, 3, 1)):
            model.encode(images)


@pytest.mark.slow
@pytest.mark.skipif(not has_winograd(), reason="torch has no NNPACK here")
def test_an_exact_model_can_be_compiled(
    net: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where NNPACK computes: its kernel is unknown to torch.compile."""
    monkeypatch.setattr(inference, "has_instructions", lambda *names: False)  # as without AMX
    monkeypatch.setattr(convolutions, "LIMITS", Limits(channels=8, positions=16, tiled={}))
    model = Autoencoder(net, name="first", optimize="exact")
    images = tensor(16, 16)
    assert any(type(m) is WinogradConv2d for m in model.optimization.net.modules())
    for call in (model.encode, lambda images: model.decode(model.encode(images))):
        compiled = torch.compile(call, backend="eager")
        torch.testing.assert_close(compiled(images), call(images), rtol=0, atol=1e-4)


def test_every_kind_gives_the_same_latents(model: Autoencoder, photo: Image.Image) -> None:
    pixels = np.array(photo)  # (30, 45, 3)
    exact = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    z = model.encode(exact)
    assert z.shape == (1, 4, 8, 12)
    for images in (photo, [photo], pixels, pixels[None], pixels / 255.0):
        torch.testing.assert_close(model.encode(images), z, rtol=0, atol=1e-5)


def test_reconstruct_gives_the_kind_it_was_given(model: Autoencoder, photo: Image.Image) -> None:
    pixels = np.array(photo)
    expected = np.array(model.reconstruct(photo))
    assert expected.shape == pixels.shape
    assert np.array_equal(model.reconstruct(pixels), expected)
    assert np.array_equal(model.reconstruct(pixels[None]), expected[None])
    for dtype, atol in ((np.float32, 1e-3), (np.float64, 1e-3)):
        recon = model.reconstruct((pixels / 255).astype(dtype))
        assert recon.dtype == dtype
        assert np.abs(recon * 255 - expected).max() <= 0.5 + atol
    half = model.reconstruct(tensor(9, 9).half())
    assert half.dtype == torch.float16
    assert model.reconstruct([photo])[0].size == photo.size


def test_a_list_may_hold_different_sizes(model: Autoencoder, photo: Image.Image) -> None:
    others = [photo, photo.rotate(90, expand=True), photo.crop((0, 0, 7, 5))]
    recons = model.reconstruct(others)
    assert [recon.size for recon in recons] == [(45, 30), (30, 45), (7, 5)]
    assert recons[1].tobytes() == model.reconstruct(others[1]).tobytes()
    with pytest.raises(UserError, match="one size"):
        model.encode(others)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_pil_mode_is_taken(model: Autoencoder, photo: Image.Image, mode: str) -> None:
    image = photo.convert("L").convert(mode) if mode in ("LA", "I;16") else photo.convert(mode)
    recon = model.reconstruct(image)
    assert (recon.mode, recon.size) == ("RGB", photo.size)


def test_output_types(model: Autoencoder) -> None:
    z = model.encode(tensor(8, 12))
    images, array = model.decode(z), model.decode(z, output_type="np")
    picture = model.decode(z, output_type="pil")[0]
    assert (array.shape, array.dtype) == ((1, 8, 12, 3), np.float32)
    np.testing.assert_allclose(array, images.permute(0, 2, 3, 1) / 2 + 0.5, atol=1e-6)
    assert picture.size == (12, 8)
    assert np.array_equal(np.array(picture), (array[0] * 255).round().astype(np.uint8))
    with pytest.raises(UserError, match="pt, np or pil"):
        model.decode(z, output_type="pill")  # pyright: ignore[reportArgumentType]


def test_latents_can_be_trained_on(model: Autoencoder) -> None:
    z = model.encode(tensor(8, 8))
    weight = torch.ones(4, 1, 1, requires_grad=True)
    (weight * z).sum().backward()
    assert weight.grad is not None
    assert not z.requires_grad
    assert not model.decode(z).is_inference()


def test_bfloat16_works_from_every_kind(folder: Path, photo: Image.Image) -> None:
    model = load(folder, dtype=torch.bfloat16)
    assert model.encode(photo).dtype == torch.bfloat16
    exact = np.array(load(folder).reconstruct(photo), dtype=float)
    assert np.abs(np.array(model.reconstruct(photo), dtype=float) - exact).mean() < 2


def test_overflow_is_an_error_and_not_a_black_picture(folder: Path) -> None:
    model = load(folder, dtype=torch.float16)
    with torch.no_grad():
        model.net.decoder.conv_in.weight.fill_(6e4)
    with pytest.raises(RuntimeError, match="overflows in"):
        model.reconstruct(tensor(8, 8))


@pytest.mark.parametrize("kind", ["stock", "vq", "fsq"])
def test_overflow_is_an_error_and_no_tokens(kind: str) -> None:
    quantizer: dict[str, Any] = {"type": "vq", "num_codes": 16, "code_channels": 4}
    if kind == "fsq":
        quantizer = {"type": "fsq", "levels": [8, 5, 5]}
    shape: dict[str, Any] = {"block_out_channels": (8, 8), "latent_channels": 4}
    net: Any = (
        VQModel(**VQ)
        if kind == "stock"
        else DiscreteAutoencoder(**shape, norm_num_groups=4, quantizer=quantizer)
    )
    model = Autoencoder(net, name=kind)
    assert model.encode_tokens(tensor(8, 8)).min() >= 0
    with torch.no_grad():
        net.encoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(UserError, match=f"'{kind}' overflows in float32"):
        model.encode_tokens(tensor(8, 8))


def test_wrong_images_are_refused(model: Autoencoder) -> None:
    wrong = [
        (tensor(8, 8)[0], r"\(B, C, H, W\), not \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "float in"),
        (torch.full((1, 3, 8, 8), 255.0), r"not in \[255, 255\]"),
        (torch.full((1, 3, 8, 8), float("nan")), "nan"),
        (torch.zeros(1, 1, 8, 8), "3-channel images, not 1"),
        (np.zeros((1, 3, 8, 8), np.uint8), r"\(H, W, 3\) or \(B, H, W, 3\)"),
        (np.full((8, 8, 3), 255.0), r"\[0, 1\], not in \[255, 255\]"),
        (np.zeros((8, 8, 3), np.int64), "uint8 or float"),
        (np.zeros((0, 8, 3), np.uint8), "not"),
        ([], "empty"),
        ("photo.jpg", "not str"),
        (["photo.jpg"], "not list"),
        (["photo.jpg", Image.new("RGB", (8, 8))], "not list|not str"),
    ]
    for images, message in wrong:
        for call in (model.encode, model.reconstruct):
            with pytest.raises(UserError, match=message):
                call(images)  # pyright: ignore[reportArgumentType]


def test_wrong_latents_and_sizes_are_refused(model: Autoencoder) -> None:
    with pytest.raises(UserError, match=r"\(B, 4, h, w\), not \(1, 3, 2, 2\)"):
        model.decode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(UserError, match="decode to 8 x 8 pixels, not to 9 x 8"):
        model.decode(torch.zeros(1, 4, 2, 2), size=(9, 8))


def test_wrong_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    config = folder / "config.json"
    text, weights = config.read_text(), folder / "diffusion_pytorch_model.safetensors"

    # wrong paths
    with pytest.raises(UserError, match=r"did you mean '.*first/export'"):
        load(folder.with_name("exprot"))
    with pytest.raises(UserError, match=r"did you mean '.*first/export'"):
        load(folder.parent)
    assert load(weights).info() == load(folder).info()
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)

    # wrong classes
    for name, message in (
        ("AutoencoderKI", "this version of diffusers does not know"),
        ("os.system", "this version of diffusers does not know"),
        ("UNet2DModel", "is no autoencoder"),
        ("AutoencoderKLWan", "cannot load the weights|does not encode and decode images"),
    ):
        config.write_text(text.replace("AutoencoderKL", name))
        with pytest.raises(UserError, match=message):
            load(folder)

    # wrong configs
    for broken in ("{", "[]", "{}"):
        config.write_text(broken)
        with pytest.raises(UserError, match="not the config"):
            load(folder)
    config.write_text(text.replace('"latent_channels": 4', '"latent_channels": 8'))
    with pytest.raises(UserError):
        load(folder)

    # wrong or missing weights
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot load the weights"):
        load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="cannot load the weights"):
        load(folder)


def test_info_tells_models_apart(folder: Path, model: Autoencoder) -> None:
    info = load(folder).info()
    assert info == model.info()
    assert json.loads(json.dumps(info)) == info
    assert info["num_parameters"] == sum(v.numel() for v in model.net.parameters())
    loaded = load(folder)
    with torch.no_grad():
        loaded.net.decoder.conv_out.bias[0] += 1e-3
    assert loaded.info()["weights_sha256"] != info["weights_sha256"]
    assert load(folder, dtype=torch.bfloat16).info()["dtype"] == "bfloat16"


def test_a_mistyped_path_is_told_where_it_goes_wrong(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "runs" / "first" / "export")
    monkeypatch.chdir(tmp_path)
    for mistyped in ("rums/first/export", "runs/frist/export", "rums/frist/exprot"):
        with pytest.raises(
            UserError, match=rf"no such model folder '{mistyped}'; did you mean 'runs/first/export'"
        ):
            load(mistyped)
    with pytest.raises(UserError, match=r"no such model folder.*did you mean 'first'"):
        load("runs/frist/nothing")
    with pytest.raises(UserError, match=r"'rums/x' is not a local folder.*'runs'"):
        load("rums/x")
    assert load("runs/first/export").path == "runs/first/export"


KL_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
    "norm_num_groups": 4,
}
DC: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
}
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}
VQ: dict[str, Any] = KL_BLOCKS | {"latent_channels": 4, "num_vq_embeddings": 16, "vq_embed_dim": 2}
CLASSES = {  # class, config, f, d
    "kl": (AutoencoderKL, KL_BLOCKS, 4, 4),
    "asymmetric": (
        AsymmetricAutoencoderKL,
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (8, 8),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (8, 16),
            "norm_num_groups": 4,
        },
        2,
        4,
    ),
    "tiny": (AutoencoderTiny, TINY, 4, 4),
    "dc": (AutoencoderDC, DC, 2, 4),
    "vq": (VQModel, VQ, 4, 2),
    "amused": (VQModel, VQ | {"lookup_from_codebook": True}, 4, 2),
    "flux2": (AutoencoderKLFlux2, KL_BLOCKS | {"latent_channels": 8}, 4, 8),
    "rae": (AutoencoderRAE, RAE, 4, 64),
}


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_every_class_of_diffusers_has_the_same_calls(name: str, tmp_path: Path) -> None:
    cls, config, f, channels = CLASSES[name]
    net: Any = cls(**config).eval()
    net.save_pretrained(tmp_path / "a" / name)
    model = load(tmp_path / "a" / name)
    assert (type(model.net), model.f, model.latent_channels) == (cls, f, channels)
    images = tensor(16, 16)
    z = model.encode(images)
    assert z.shape == (1, channels, 16 // f, 16 // f)
    given = (images + 1) / 2 if name in ("amused", "rae") else images
    expected = net.decode(_latent(net.encode(given))).sample
    expected = expected * 2 - 1 if name in ("amused", "rae") else expected
    recon = model.reconstruct(images)
    torch.testing.assert_close(recon, expected.clamp(-1, 1))
    scaled = model.encode(images, scaled=True)
    torch.testing.assert_close(model.decode(scaled, scaled=True), recon, atol=1e-4, rtol=0)
    assert model.info()["class"] == cls.__name__
    if name == "rae":
        assert model.fixed_size == 16
        with pytest.raises(UserError, match="takes 16 x 16 images only, not 16 x 20"):
            model.encode(tensor(16, 20))
    else:
        assert model.reconstruct(tensor(11, 14)).shape == (1, 3, 11, 14)


def _latent(output: Any) -> torch.Tensor:
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mode()
    return output.latents if hasattr(output, "latents") else output.latent


@torch.no_grad()
def test_tokens_are_the_nearest_codes_and_decode_as_the_latents_do() -> None:
    for lookup in (False, True):
        model = Autoencoder(VQModel(**VQ, lookup_from_codebook=lookup), name="vq")
        images = tensor(9, 14, count=2)
        z, indices = model.encode(images), model.encode_tokens(images)
        codebook = model.net.quantize.embedding.weight  # (K, D)
        distances = torch.cdist(z.flatten(2).transpose(1, 2), codebook[None])
        assert model.num_codes == 16
        assert torch.equal(indices.flatten(1), distances.argmin(-1))
        recon = model.decode_tokens(indices, size=(9, 14))
        torch.testing.assert_close(recon, model.reconstruct(images))
    with pytest.raises(UserError, match="no tokenizer"):
        Autoencoder(AutoencoderTiny(**TINY), name="tiny").encode_tokens(images)


@pytest.mark.parametrize("size", [(3, 40), (40, 3), (1, 1)])
def test_a_tokenizer_refuses_images_smaller_than_f(size: tuple[int, int]) -> None:
    model = Autoencoder(VQModel(**VQ), name="vq")
    assert model.encode_tokens(tensor(model.f, model.f)).shape == (1, 1, 1)
    said = f"images of {size[0]} x {size[1]} pixels are too small for 'vq': .* {model.f} pixels"
    for call in (model.encode, model.encode_tokens, model.encode_posterior, model.reconstruct):
        with pytest.raises(UserError, match=said):
            call(tensor(*size))


@torch.no_grad()
def test_posterior_is_that_of_the_network(model: Autoencoder, net: AutoencoderKL) -> None:
    images = tensor(16, 16)
    mean, logvar = model.encode_posterior(images)
    posterior = net.encode(images).latent_dist
    assert logvar is not None
    assert torch.equal(mean, posterior.mean) and torch.equal(logvar, posterior.logvar)
    assert Autoencoder(AutoencoderTiny(**TINY), name="t").encode_posterior(images)[1] is None


@torch.no_grad()
def test_flux2_latents_scale_as_its_pipeline_scales_them() -> None:
    net: Any = AutoencoderKLFlux2(**KL_BLOCKS, latent_channels=8).eval()
    net.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    net.bn.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    model = Autoencoder(net, name="flux2")
    images = tensor(16, 24)
    z, scaled = model.encode(images), model.encode(images, scaled=True)
    folded = z.view(1, 8, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 32, 2, 3)
    torch.testing.assert_close(scaled, net.bn(folded))
    torch.testing.assert_close(model.decode(scaled, scaled=True), model.reconstruct(images))
    assert model.reconstruct(tensor(13, 9)).shape == (1, 3, 13, 9)


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing/vae"])
def test_a_name_on_the_hub_is_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load_config(repository: str, *, subfolder: str | None = None) -> None:
        asked.append((repository, subfolder))
        raise OSError("offline")

    monkeypatch.setattr("latentvae.models.loading.AutoencoderKL.load_config", load_config)
    with pytest.raises(UserError, match=f"'{name}' is not a local folder, .*offline"):
        load(name)
    assert asked == [("nobody/nothing", "vae" if name.endswith("vae") else None)]


def test_a_name_on_the_hub_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's files are put where it would download them to."""
    real = AutoencoderKL.from_pretrained, AutoencoderKL.load_config
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda _, **k: real[0](folder, **k))
    monkeypatch.setattr(AutoencoderKL, "load_config", lambda _, **k: real[1](folder, **k))
    assert load("somebody/something").name == "something"


def test_exact_computes_the_same_and_says_so(folder: Path, photo: Image.Image) -> None:
    plain, exact = load(folder), load(folder, optimize="exact")
    assert (str(plain.optimization), str(exact.optimization)) == ("stock", "exact")
    assert plain.optimization.net is plain.net
    assert exact.info() == plain.info()  # the same weights under the same names
    z = plain.encode(photo, scaled=True)
    torch.testing.assert_close(exact.encode(photo, scaled=True), z, rtol=0, atol=1e-5)
    ours, theirs = (m.decode(z, scaled=True) for m in (exact, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for a, b in zip(exact.encode_posterior(photo), plain.encode_posterior(photo), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_wrong_optimisation_is_told_before_the_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got 'fats'.*did you mean 'fast'"):
        load(tmp_path / "nowhere", optimize="fats")  # type: ignore[arg-type]


def test_strips_and_an_optimisation_are_two_ways(folder: Path) -> None:
    with pytest.raises(UserError, match="both strips and optimize='exact'"):
        load(folder, optimize="exact", strips=True)


def test_in_strips(folder: Path, model: Autoencoder, photo: Image.Image) -> None:
    """Every call gives what it gives of the whole image."""
    ours = load(folder, strips=True)
    z = model.encode(photo, scaled=True)
    torch.testing.assert_close(ours.encode(photo, scaled=True), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.encode_posterior(photo), model.encode_posterior(photo))
    images = model.decode(z, size=(30, 45), scaled=True)
    torch.testing.assert_close(
        ours.decode(z, size=(30, 45), scaled=True), images, rtol=1e-4, atol=1e-5
    )
    batch = tensor(14, 18, 2)
    assert (ours.reconstruct(batch) - model.reconstruct(batch)).abs().max() < 1e-4


def test_the_price_of_strips_is_told_before_and_once(
    net: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latentvae.autoencoder.PIXELS_WORTH_PRICING", 32 * 16)
    monkeypatch.setattr("latentvae.autoencoder.PRICE_WORTH_TELLING", 0.0)
    ours = Autoencoder(net, name="first", strips=True)
    ours.encode(tensor(8, 16))
    assert capsys.readouterr().err == ""
    z = ours.encode(tensor(32, 16))
    told = capsys.readouterr().err
    assert told.startswith("first: encode 1 x 32 x 16 px in strips, about ")
    assert "GiB on disk" in told
    ours.encode(tensor(32, 16))
    assert capsys.readouterr().err == ""
    ours.decode(z)
    assert "decode 1 x 32 x 16 px" in capsys.readouterr().err


def test_no_strips_of_other_networks() -> None:
    with pytest.raises(UserError, match=r"'taesd' cannot be computed in strips: .*AutoencoderTiny"):
        Autoencoder(AutoencoderTiny(), name="taesd", strips=True)
