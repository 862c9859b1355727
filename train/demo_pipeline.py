"""Run an exported autoencoder inside diffusers' Stable Diffusion, whose other parts are tiny and
random.

    python train/demo_pipeline.py runs/demo/export runs/demo/pipeline.png

Two pictures side by side: a held-out photo after image-to-image at low strength (it went through
`vae.encode`, a little noise, a U-Net that has learned nothing, and `vae.decode`), and text-to-image
from the same parts, which is noise as this autoencoder sees it. The second is checked: it must
equal, bit for bit, what the autoencoder alone decodes from the pipeline's latents.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from PIL import Image

from latentvae.data import SamplePhotos

SIDE = 256  # pixels
logging.set_verbosity_error()  # the notes on absent safety checkers and text encoders


def random_pipeline(vae: AutoencoderKL) -> Any:
    """Stable Diffusion around ``vae``; no text encoder, so prompts are embeddings of width 32."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=vae.config["latent_channels"],
        out_channels=vae.config["latent_channels"],
        block_out_channels=(32, 64),  # type: ignore[arg-type]
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # type: ignore[arg-type]
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),  # type: ignore[arg-type]
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    absent: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    )
    scheduler: Any = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **absent
    )


def call(pipeline: Any, **options: Any) -> Any:
    """One picture (or latent), from a fixed seed."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=torch.zeros(1, 4, 32),
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images


def main(export: Path, out: Path) -> None:
    vae: Any = AutoencoderKL.from_pretrained(export, use_safetensors=True)
    text_to_image = random_pipeline(vae)
    size: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 4}
    picture = call(text_to_image, **size, output_type="np")
    latents = call(text_to_image, **size, output_type="latent")
    with torch.no_grad():
        alone = vae.decode(latents / vae.config.scaling_factor).sample
    alone = (alone / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    if not np.array_equal(picture, alone):
        raise SystemExit("the pipeline's picture is not what the autoencoder decodes")

    photo = SamplePhotos("validation").read(0)
    assert isinstance(photo, Image.Image)  # of 8 bits, as no other format was asked for
    square = photo.resize((SIDE, SIDE), box=(0, 0, min(photo.size), min(photo.size)))
    image_to_image = StableDiffusionImg2ImgPipeline(**text_to_image.components)
    (passed,) = call(image_to_image, image=square, strength=0.04, num_inference_steps=50)
    generated = Image.fromarray((picture[0] * 255).round().astype(np.uint8))
    sheet = Image.new("RGB", (3 * SIDE, SIDE))
    for i, image in enumerate((square, passed, generated)):
        sheet.paste(image, (i * SIDE, 0))
    sheet.save(out)
    print(
        f"StableDiffusionPipeline decodes with the export, bit for bit as it decodes alone: {out}"
    )
    print("  (a held-out photo, the same after image-to-image, text-to-image of a random U-Net)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
