"""Run an exported autoencoder inside diffusers' Stable Diffusion pipelines.

    python train/demo_pipeline.py runs/demo/export runs/demo/pipeline.png

The other networks of the pipelines are tiny and have random weights. The script writes three
pictures side by side.

1. A held-out photo.
2. The photo after image-to-image at low strength. The steps are `vae.encode`, a little noise, an
    untrained U-Net and `vae.decode`.
3. A text-to-image picture from the same networks. The picture shows decoded noise, because of
    the random weights. The autoencoder alone also decodes the pipeline's latents. Both decoded
    pictures must be equal, bit by bit.
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
logging.set_verbosity_error()  # no warnings about missing safety checkers and text encoders


def random_pipeline(vae: AutoencoderKL) -> Any:
    """Return a Stable Diffusion pipeline of ``vae`` and a tiny U-Net with random weights.

    The pipeline has no text encoder. Prompts are embeddings of width 32.
    """
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
    """Run a pipeline with a fixed seed, and return its pictures or latents."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=torch.zeros(1, 4, 32),
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images


def main(export: Path, out: Path) -> None:
    # text-to-image, through the pipeline and without it
    vae: Any = AutoencoderKL.from_pretrained(export, use_safetensors=True)
    text_to_image = random_pipeline(vae)
    size: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 4}
    picture = call(text_to_image, **size, output_type="np")
    latents = call(text_to_image, **size, output_type="latent")
    with torch.no_grad():
        alone = vae.decode(latents / vae.config.scaling_factor).sample
    alone = (alone / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    if not np.array_equal(picture, alone):
        raise SystemExit(
            "the pipeline's picture differs from the one that the autoencoder alone decodes"
        )

    # image-to-image
    photo = SamplePhotos("validation").read(0)
    assert isinstance(photo, Image.Image)  # 8 bits, because no other format was requested
    square = photo.resize((SIDE, SIDE), box=(0, 0, min(photo.size), min(photo.size)))
    image_to_image = StableDiffusionImg2ImgPipeline(**text_to_image.components)
    (passed,) = call(image_to_image, image=square, strength=0.04, num_inference_steps=50)

    # all pictures side by side
    generated = Image.fromarray((picture[0] * 255).round().astype(np.uint8))
    sheet = Image.new("RGB", (3 * SIDE, SIDE))
    for i, image in enumerate((square, passed, generated)):
        sheet.paste(image, (i * SIDE, 0))
    sheet.save(out)
    print(
        "StableDiffusionPipeline and the export alone decode the same picture, bit by bit. "
        f"Pictures: {out}"
    )
    print("  (a held-out photo, the photo after image-to-image, text-to-image of a random U-Net)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
