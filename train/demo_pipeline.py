"""Run an exported autoencoder inside diffusers' Stable Diffusion pipelines.

    python train/demo_pipeline.py runs/demo/export runs/demo/pipeline.png

An export with 16 latent channels runs in the pipelines of Stable Diffusion 3, and any other export
runs in the pipelines of Stable Diffusion 1. All networks except the autoencoder are tiny and
have random weights. The script writes three pictures side by side.

1. A held-out photo.
2. The photo after image-to-image at low strength. The steps are `vae.encode`, a little noise, two
    steps of an untrained network and `vae.decode`.
3. A text-to-image picture from the same networks. The picture shows decoded noise, because of
    the random weights. The script also decodes the pipeline's latents with the autoencoder alone.
    The result must equal the pipeline's picture, bit by bit.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from PIL import Image

from latentvae.data import SamplePhotos

SIDE = 256  # pixels
WIDTH = 32  # number of channels of the prompts' embeddings
SD3_CHANNELS = 16
logging.set_verbosity_error()  # no warnings about missing safety checkers and text encoders


def random_pipelines(vae: AutoencoderKL) -> tuple[Any, Any, dict[str, Any]]:
    """Return pipelines with ``vae`` and with a tiny diffusion network of random weights.

    Returns:
        First, the text-to-image pipeline. Second, the image-to-image pipeline. Third, embeddings
        that stand for the prompt, because the pipelines have no text encoder.
    """
    torch.manual_seed(0)
    prompt = {"prompt_embeds": torch.zeros(1, 4, WIDTH)}
    if vae.config["latent_channels"] != SD3_CHANNELS:
        first = _stable_diffusion_1(vae)
        return first, StableDiffusionImg2ImgPipeline(**first.components), prompt
    first = _stable_diffusion_3(vae)
    second = StableDiffusion3Img2ImgPipeline(**first.components)
    return first, second, prompt | {"pooled_prompt_embeds": torch.zeros(1, WIDTH)}


def _stable_diffusion_1(vae: AutoencoderKL) -> Any:
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=vae.config["latent_channels"],
        out_channels=vae.config["latent_channels"],
        block_out_channels=(32, 64),  # type: ignore[arg-type]
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # type: ignore[arg-type]
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),  # type: ignore[arg-type]
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    )
    absent: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    )
    scheduler: Any = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **absent
    )


def _stable_diffusion_3(vae: AutoencoderKL) -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=SIDE // 16,
    )
    encoders = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    absent: dict[str, Any] = dict.fromkeys(encoders)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, vae, **absent)


def call(pipeline: Any, **options: Any) -> Any:
    """Run a pipeline with a fixed seed, and return its pictures or latents."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        guidance_scale=1.0, generator=torch.Generator().manual_seed(0), **options
    ).images


def main(export: Path, out: Path) -> None:
    # text-to-image, through the pipeline and without it
    vae: Any = AutoencoderKL.from_pretrained(export, use_safetensors=True)
    text_to_image, image_to_image, prompt = random_pipelines(vae)
    size: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 4}
    picture = call(text_to_image, **prompt, **size, output_type="np")
    latents = call(text_to_image, **prompt, **size, output_type="latent")
    with torch.no_grad():
        z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        alone = vae.decode(z).sample
    alone = (alone / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    if not np.array_equal(picture, alone):
        raise SystemExit(
            "the pipeline's picture differs from the one that the autoencoder alone decodes"
        )

    # image-to-image
    photo = SamplePhotos("validation").read(0)
    assert isinstance(photo, Image.Image)  # 8 bits, because no other format was requested
    square = photo.resize((SIDE, SIDE), box=(0, 0, min(photo.size), min(photo.size)))
    options = {"image": square, "strength": 0.04, "num_inference_steps": 50}
    (passed,) = call(image_to_image, **prompt, **options)

    # all pictures side by side
    generated = Image.fromarray((picture[0] * 255).round().astype(np.uint8))
    sheet = Image.new("RGB", (3 * SIDE, SIDE))
    for i, image in enumerate((square, passed, generated)):
        sheet.paste(image, (i * SIDE, 0))
    sheet.save(out)
    print(
        f"{type(text_to_image).__name__} and the export alone decode the same picture, bit by bit. "
        f"Pictures: {out}"
    )
    print("  (a held-out photo, the photo after image-to-image, text-to-image of a random network)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
