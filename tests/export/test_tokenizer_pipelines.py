"""diffusers' pipelines of discrete tokens take the export: pictures are those of its stock calls,
and those that the trained network decodes from the same tokens.

As in test_pipelines.py, generators are tiny and random, and what they end with is kept.
"""

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
    KandinskyV22Pipeline,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UVit2DModel,
    VQModel,
)
from torch import Tensor

from latentvae.models import DiscreteAutoencoder
from tests.export.test_pipelines import LastLatent, quiet, scheduler
from tests.export.tokenizers import CODEBOOK, export, photos, tokenizer

SIDE = 32  # pixels: 8 x 8 tokens
K = CODEBOOK["num_codes"]
GENERATED = ("gradient", "sphere")


def written(name: str, folder: Path, **options: Any) -> tuple[DiscreteAutoencoder, Any]:
    net = tokenizer(name)
    return net, VQModel.from_pretrained(export(net, folder / "export", **options).path)


def as_picture(images: Tensor) -> np.ndarray:
    """(B, H, W, 3) in [0, 1] of images in [-1, 1]."""
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def check(picture: np.ndarray, expected: np.ndarray) -> None:
    assert picture.shape == (1, SIDE, SIDE, 3)
    assert picture.std() > 0.01
    assert np.array_equal(picture, expected)


@pytest.mark.parametrize("name", GENERATED)
@torch.no_grad()
def test_unconditional(name: str, tmp_path: Path) -> None:
    """Noise of unit variance is what the scale makes of features; the decoder quantises."""
    net, vqvae = written(name, tmp_path)
    torch.manual_seed(2)
    denoiser = UNet2DModel(
        sample_size=SIDE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = quiet(LDMPipeline(vqvae=vqvae, unet=denoiser, scheduler=scheduler()))
    generator = torch.Generator().manual_seed(4)
    picture = pipe(num_inference_steps=2, generator=generator, output_type="np").images
    assert isinstance(pipe.scheduler, LastLatent)
    features = pipe.scheduler.kept / vqvae.config.scaling_factor
    check(picture, as_picture(vqvae.decode(features).sample))
    indices = vqvae.quantize(features)[2][2].view(1, SIDE // 4, SIDE // 4)
    assert len(indices.unique()) > 4
    trained = as_picture(net.decode_indices(indices).sample)
    np.testing.assert_allclose(picture, trained, atol=1e-5)


@pytest.mark.parametrize("name", GENERATED)
@torch.no_grad()
def test_a_pipeline_that_decodes_without_the_codebook(name: str, tmp_path: Path) -> None:
    """Kandinsky 2.2 gives its latents to the decoder as they are, unscaled."""
    net, movq = written(name, tmp_path)
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
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
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3))
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "np"}
    options["generator"] = torch.Generator().manual_seed(4)
    picture = pipe(image_embeds=embeds[0], negative_image_embeds=embeds[1], **options).images
    z = pipe.scheduler.kept
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
        sample_size=SIDE // 4,
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
    assert indices.shape == (1, SIDE // 4, SIDE // 4) and len(indices.unique()) > 4
    return indices, picture


@torch.no_grad()
def check_tokens(
    indices: Tensor, picture: np.ndarray, net: DiscreteAutoencoder, vqvae: Any
) -> None:
    """The picture is that of the tokens: by the stock call exactly, by the trained network to
    rounding, for pixels are in [0, 1]."""
    shape = (*indices.shape, vqvae.config.latent_channels)
    stock = vqvae.decode(indices, force_not_quantize=True, shape=shape).sample
    check(picture, stock.clip(0, 1).permute(0, 2, 3, 1).numpy())
    trained = as_picture(net.decode_indices(indices).sample)
    np.testing.assert_allclose(picture, trained, atol=1e-5)


@pytest.mark.parametrize("name", GENERATED)
def test_amused(name: str, tmp_path: Path) -> None:
    net, vqvae = written(name, tmp_path, lookup_from_codebook=True)
    pipe = amused(AmusedPipeline, vqvae)
    assert pipe.vae_scale_factor == 4
    check_tokens(*tokens_and_picture(pipe), net, vqvae)


def test_amused_keeps_what_is_not_generated(tmp_path: Path) -> None:
    """Image to image starts from the export's own tokens of the picture; inpainting keeps those
    outside of the mask."""
    net, vqvae = written("sphere", tmp_path, lookup_from_codebook=True)
    picture = (photos(1, SIDE) + 1) / 2
    with torch.no_grad():
        own = vqvae.quantize(vqvae.encode(picture).latents)[2][2].view(1, SIDE // 4, SIDE // 4)
    img2img = amused(AmusedImg2ImgPipeline, vqvae)
    indices, result = tokens_and_picture(img2img, image=picture, strength=0.34)
    check_tokens(indices, result, net, vqvae)
    assert 0.2 < (indices == own).float().mean() < 1
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    inpaint = amused(AmusedInpaintPipeline, vqvae)
    indices, result = tokens_and_picture(inpaint, image=picture, mask_image=mask, strength=1.0)
    check_tokens(indices, result, net, vqvae)
    assert torch.equal(indices[..., SIDE // 8 :], own[..., SIDE // 8 :])
    assert not torch.equal(indices, own)
