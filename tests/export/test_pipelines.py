"""diffusers' pipelines take the export, and their pictures are those of stock decoding.

Each pipeline is put together from tiny random parts around one export. The latent or the tokens
that its scheduler ends with are kept, decoded by the trained network, and compared with the
pipeline's picture.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AmusedImg2ImgPipeline,
    AmusedInpaintPipeline,
    AmusedPipeline,
    AmusedScheduler,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    KandinskyV22Pipeline,
    LDMPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UVit2DModel,
    VQModel,
)
from torch import Tensor, nn

from latentvae.export import ExportReport, Profile, export_autoencoder
from latentvae.latents import latent_statistics
from latentvae.models import DiscreteAutoencoder
from tests.export import tokenizers
from tests.tiny import CODEBOOK, photos, tokenizer

SIDE = 64  # pixels: 8 latent pixels
TOKENS_SIDE = 32  # pixels: 8 x 8 tokens
K = CODEBOOK["num_codes"]
GENERATED = ("gradient", "sphere")


def trained_net(*, quant: bool = True) -> AutoencoderKL:
    torch.manual_seed(0)
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    with torch.no_grad():  # log-variance of about -10: as after training, samples are near the mode
        (net.quant_conv if quant else net.encoder.conv_out).bias[4:] = -10.0
        net.decoder.conv_out.weight.mul_(3.0)
    return net.eval()


def export(net: AutoencoderKL, out: Path, *, profile: Profile = "sd") -> ExportReport:
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return export_autoencoder(
        net,
        out,
        statistics=latent_statistics(net, [images]),
        sample_size=SIDE,
        probe=images,
        profile=profile,
    )


@pytest.fixture(scope="module")
def net() -> AutoencoderKL:
    return trained_net()


@pytest.fixture(scope="module")
def folder(net: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(net, tmp_path_factory.mktemp("runs") / "export").path


@pytest.fixture
def vae(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder)


class LastLatent(DDIMScheduler):
    """DDIM that keeps what it returned last, and what noise was added to."""

    kept: Tensor
    start: Tensor

    def step(self, *args: Any, **options: Any) -> Any:
        result = super().step(*args, **options)
        self.kept = result.prev_sample if hasattr(result, "prev_sample") else result[0]
        return result

    def add_noise(self, original_samples: Tensor, *args: Any, **options: Any) -> Tensor:
        self.start = original_samples
        return super().add_noise(original_samples, *args, **options)


def scheduler() -> LastLatent:
    return LastLatent(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def unet(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        **options,
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(kind: type, vae: AutoencoderKL) -> Any:
    parts = {"text_encoder": None, "tokenizer": None, "feature_extractor": None}
    parts |= {"safety_checker": None, "unet": unet(), "vae": vae, "scheduler": scheduler()}
    return quiet(kind(**parts, requires_safety_checker=False))


def common() -> dict[str, Any]:
    prompt = torch.randn(2, 1, 3, 8, generator=torch.Generator().manual_seed(3))
    return {
        "prompt_embeds": prompt[0],
        "negative_prompt_embeds": prompt[1],
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(4),
        "output_type": "np",
    }


def as_picture(images: Tensor) -> np.ndarray:
    """(B, H, W, 3) in [0, 1] of images in [-1, 1]."""
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()


@torch.no_grad()
def stock_picture(net: nn.Module, z: Tensor) -> np.ndarray:
    """Decode z (unscaled) and bring it to [0, 1]."""
    return as_picture(net.decode(z).sample)


def check_picture(picture: np.ndarray, expected: np.ndarray, *, side: int = SIDE) -> None:
    assert picture.shape == (1, side, side, 3)
    assert picture.std() > 0.01
    assert np.array_equal(picture, expected)


def photo() -> Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5)) * 2 - 1


@torch.no_grad()
def check_start(
    start: Tensor, net: AutoencoderKL, vae: AutoencoderKL, *, columns: slice = slice(None)
) -> None:
    """`start` is a sample of the photo's posterior times the scale: within 6 deviations."""
    posterior = net.encode(photo()).latent_dist
    score = (start / vae.config.scaling_factor - posterior.mean) / posterior.std
    assert score[..., columns].abs().max() < 6
    assert 0.5 < score[..., columns].std() < 1.5


def test_text_to_image(net: AutoencoderKL, vae: AutoencoderKL) -> None:
    pipe = stable_diffusion(StableDiffusionPipeline, vae)
    picture = pipe(height=SIDE, width=SIDE, **common()).images
    z = pipe.scheduler.kept / vae.config.scaling_factor
    check_picture(picture, stock_picture(net, z))
    latents = pipe(height=SIDE, width=SIDE, **(common() | {"output_type": "latent"})).images
    check_picture(picture, stock_picture(net, latents / vae.config.scaling_factor))


def test_image_to_image(net: AutoencoderKL, vae: AutoencoderKL) -> None:
    pipe = stable_diffusion(StableDiffusionImg2ImgPipeline, vae)
    picture = pipe(image=(photo() + 1) / 2, strength=0.9, **common()).images
    check_picture(picture, stock_picture(net, pipe.scheduler.kept / vae.config.scaling_factor))
    check_start(pipe.scheduler.start, net, vae)


def test_inpaint(net: AutoencoderKL, vae: AutoencoderKL) -> None:
    pipe = stable_diffusion(StableDiffusionInpaintPipeline, vae)
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    size = {"height": SIDE, "width": SIDE}
    options = {"image": (photo() + 1) / 2, "mask_image": mask, "strength": 0.9, **size}
    latents = pipe(**options, **(common() | {"output_type": "latent"})).images
    picture = pipe(**options, **common()).images
    check_picture(picture, stock_picture(net, latents / vae.config.scaling_factor))
    check_start(latents, net, vae, columns=slice(4, 8))  # what the mask keeps


def sdxl(vae: AutoencoderKL) -> Any:
    parts = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    condition = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    }
    pipe = StableDiffusionXLPipeline(
        **parts, vae=vae, unet=unet(**condition), scheduler=scheduler(), add_watermarker=False
    )
    return quiet(pipe)


def sdxl_options(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    pooled = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(6))
    options = common() | {"height": SIDE, "width": SIDE}
    options |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    return {
        key: value.to(dtype) if isinstance(value, Tensor) else value
        for key, value in options.items()
    }


def test_sdxl(net: AutoencoderKL, vae: AutoencoderKL) -> None:
    pipe = sdxl(vae)
    picture = pipe(**sdxl_options()).images
    check_picture(picture, stock_picture(net, pipe.scheduler.kept / vae.config.scaling_factor))


def test_sdxl_with_statistics_per_channel(net: AutoencoderKL, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(export(net, tmp_path / "e", profile="sdxl").path)
    pipe = sdxl(vae)
    picture = pipe(**sdxl_options()).images
    mean, std = (
        torch.tensor(vae.config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std")
    )
    check_picture(picture, stock_picture(net, pipe.scheduler.kept * std / 1.0 + mean))


def test_sdxl_upcasts_an_export_that_float16_breaks(tmp_path: Path) -> None:
    """SDXL reads `post_quant_conv`'s dtype to upcast, and crashes where there is none."""
    net = trained_net(quant=False)
    with torch.no_grad():
        net.decoder.conv_in.weight.mul_(3e5)  # up to 5e4: the weights fit, the sums do not
    report = export(net, tmp_path / "export")
    assert report.force_upcast
    vae = AutoencoderKL.from_pretrained(report.path, torch_dtype=torch.float16)
    pipe = sdxl(vae)
    pipe.unet.half()
    picture = pipe(**sdxl_options(torch.float16)).images
    assert vae.decoder.conv_in.weight.isfinite().all()
    assert np.isfinite(picture).all()
    assert picture.std() > 0.01


def test_dit(net: AutoencoderKL, vae: AutoencoderKL) -> None:
    torch.manual_seed(2)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=SIDE // 8,
        patch_size=2,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    pipe = quiet(DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler()))
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(4)}
    picture = pipe(class_labels=[207], output_type="np", **options).images
    latents = pipe.scheduler.kept[:1]  # the second half is the unconditional one
    check_picture(picture, stock_picture(net, 1 / vae.config.scaling_factor * latents))


def tokenizer_and_export(
    name: str, folder: Path, **options: Any
) -> tuple[DiscreteAutoencoder, Any]:
    net = tokenizer(name)
    report = tokenizers.export(net, folder / "export", **options)
    return net, VQModel.from_pretrained(report.path)


@pytest.mark.parametrize("name", ["kl", *GENERATED])
@torch.no_grad()
def test_unconditional(name: str, net: AutoencoderKL, vae: AutoencoderKL, tmp_path: Path) -> None:
    """Noise of unit variance is what the scale makes of latents and of features; the decoder of
    tokens quantises."""
    trained, exported = (net, vae) if name == "kl" else tokenizer_and_export(name, tmp_path)

    # a pipeline with a random denoiser
    torch.manual_seed(2)
    denoiser = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = quiet(LDMPipeline(vqvae=exported, unet=denoiser, scheduler=scheduler()))

    # generate a picture
    generator = torch.Generator().manual_seed(4)
    picture = pipe(num_inference_steps=2, generator=generator, output_type="np").images
    latents = pipe.scheduler.kept / exported.config.scaling_factor

    # compare pictures of continuous latents
    if name == "kl":
        check_picture(picture, stock_picture(net, latents))
        return

    # compare pictures of tokens
    check_picture(picture, stock_picture(exported, latents), side=TOKENS_SIDE)
    indices = exported.quantize(latents)[2][2].view(1, 8, 8)
    assert len(indices.unique()) > 4
    decoded = as_picture(trained.decode_indices(indices).sample)
    np.testing.assert_allclose(picture, decoded, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLPipeline]
)
def test_pipelines_find_the_downsampling_factor(vae: AutoencoderKL, kind: Callable) -> None:
    pipe = sdxl(vae) if kind is StableDiffusionXLPipeline else stable_diffusion(kind, vae)
    assert pipe.vae_scale_factor == 8


@pytest.mark.parametrize("name", GENERATED)
@torch.no_grad()
def test_kandinsky_decodes_without_the_codebook(name: str, tmp_path: Path) -> None:
    """Kandinsky 2.2 gives its latents to the decoder as they are, unscaled."""
    net, movq = tokenizer_and_export(name, tmp_path)

    # a pipeline with a random U-Net
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=TOKENS_SIDE // 4,
        in_channels=4,
        out_channels=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=8,
        attention_head_dim=4,
        addition_embed_type="image",
        class_embed_type=None,
    )
    pipe = quiet(KandinskyV22Pipeline(unet=unet, scheduler=scheduler(), movq=movq))

    # generate a picture
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3))
    options = {
        "height": TOKENS_SIDE,
        "width": TOKENS_SIDE,
        "num_inference_steps": 2,
        "output_type": "np",
    }
    options["generator"] = torch.Generator().manual_seed(4)
    picture = pipe(image_embeds=embeds[0], negative_image_embeds=embeds[1], **options).images
    z = pipe.scheduler.kept

    # compare with the export and the trained network
    size = picture.shape[1]  # rounded to its square of f, as its own network has it
    assert picture.std() > 0.01
    assert np.array_equal(picture, as_picture(movq.decode(z, force_not_quantize=True).sample))
    assert np.array_equal(picture, as_picture(net.decode(z, force_not_quantize=True).sample))
    assert size == z.shape[2] * 4


def amused(kind: type, vqvae: Any) -> Any:
    torch.manual_seed(2)
    transformer = UVit2DModel(
        hidden_size=8,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=8,
        vocab_size=K + 1,
        codebook_size=K,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        sample_size=TOKENS_SIDE // 4,
    )
    parts = {"tokenizer": None, "text_encoder": None, "scheduler": AmusedScheduler(K)}
    return quiet(kind(vqvae=vqvae, transformer=transformer, **parts))


def prompt(output_type: str) -> dict[str, Any]:
    """Equal noise for equal calls."""
    noise = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3))
    hidden = torch.randn(2, 1, 3, 8, generator=torch.Generator().manual_seed(5))
    return {
        "prompt_embeds": noise[0],
        "negative_prompt_embeds": noise[1],
        "encoder_hidden_states": hidden[0],
        "negative_encoder_hidden_states": hidden[1],
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(4),
        "output_type": output_type,
    }


def tokens_and_picture(pipe: Any, **options: Any) -> tuple[Tensor, np.ndarray]:
    indices = pipe(**options, **prompt("latent"))[0]
    picture = pipe(**options, **prompt("np"))[0]
    assert indices.shape == (1, TOKENS_SIDE // 4, TOKENS_SIDE // 4) and len(indices.unique()) > 4
    return indices, picture


@torch.no_grad()
def check_tokens(
    indices: Tensor, picture: np.ndarray, net: DiscreteAutoencoder, vqvae: Any
) -> None:
    """The picture is that of the tokens: by the stock call exactly, by the trained network to
    rounding, for pixels are in [0, 1]."""
    shape = (*indices.shape, vqvae.config.latent_channels)
    stock = vqvae.decode(indices, force_not_quantize=True, shape=shape).sample
    check_picture(picture, stock.clip(0, 1).permute(0, 2, 3, 1).numpy(), side=TOKENS_SIDE)
    trained = as_picture(net.decode_indices(indices).sample)
    np.testing.assert_allclose(picture, trained, atol=1e-5)


@pytest.mark.parametrize("name", GENERATED)
def test_amused(name: str, tmp_path: Path) -> None:
    net, vqvae = tokenizer_and_export(name, tmp_path, lookup_from_codebook=True)
    pipe = amused(AmusedPipeline, vqvae)
    assert pipe.vae_scale_factor == 4
    check_tokens(*tokens_and_picture(pipe), net, vqvae)


def test_amused_keeps_what_is_not_generated(tmp_path: Path) -> None:
    """Image to image starts from the export's own tokens of the picture; inpainting keeps those
    outside of the mask."""
    net, vqvae = tokenizer_and_export("sphere", tmp_path, lookup_from_codebook=True)
    picture = (photos(1, TOKENS_SIDE) + 1) / 2
    with torch.no_grad():
        own = vqvae.quantize(vqvae.encode(picture).latents)[2][2].view(
            1, TOKENS_SIDE // 4, TOKENS_SIDE // 4
        )
    img2img = amused(AmusedImg2ImgPipeline, vqvae)
    indices, result = tokens_and_picture(img2img, image=picture, strength=0.34)
    check_tokens(indices, result, net, vqvae)
    assert 0.2 < (indices == own).float().mean() < 1
    mask = torch.zeros(1, 1, TOKENS_SIDE, TOKENS_SIDE)
    mask[..., : TOKENS_SIDE // 2] = 1
    inpaint = amused(AmusedInpaintPipeline, vqvae)
    indices, result = tokens_and_picture(inpaint, image=picture, mask_image=mask, strength=1.0)
    check_tokens(indices, result, net, vqvae)
    assert torch.equal(indices[..., TOKENS_SIDE // 8 :], own[..., TOKENS_SIDE // 8 :])
    assert not torch.equal(indices, own)
