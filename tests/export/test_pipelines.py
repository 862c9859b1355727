"""diffusers' pipelines take the export, and their pictures are those of stock decoding.

Each pipeline is put together from tiny random parts around one export. The latent that its
scheduler ends with is kept, divided by the export's scale, decoded by the trained network, and
compared with the pipeline's picture.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from latentvae.export import ExportReport, Profile, export_autoencoder
from latentvae.latents import latent_statistics

SIDE = 64  # pixels: 8 latent pixels


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


@torch.no_grad()
def stock_picture(net: nn.Module, z: Tensor) -> np.ndarray:
    """Decode z (unscaled) and bring it to [0, 1], (B, H, W, 3)."""
    images = net.decode(z).sample
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()


def check_picture(picture: np.ndarray, expected: np.ndarray) -> None:
    assert picture.shape == (1, SIDE, SIDE, 3)
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


def test_unconditional(net: AutoencoderKL, vae: AutoencoderKL) -> None:
    torch.manual_seed(2)
    denoiser = UNet2DModel(
        sample_size=SIDE // 8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = quiet(LDMPipeline(vqvae=vae, unet=denoiser, scheduler=scheduler()))
    generator = torch.Generator().manual_seed(4)
    picture = pipe(num_inference_steps=2, generator=generator, output_type="np").images
    check_picture(picture, stock_picture(net, pipe.scheduler.kept / vae.config.scaling_factor))


@pytest.mark.parametrize(
    "kind", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLPipeline]
)
def test_pipelines_find_the_downsampling_factor(vae: AutoencoderKL, kind: Callable) -> None:
    pipe = sdxl(vae) if kind is StableDiffusionXLPipeline else stable_diffusion(kind, vae)
    assert pipe.vae_scale_factor == 8
