"""A student takes its teacher's place in diffusers' Stable Diffusion pipelines."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from latentvae.models import calls
from latentvae.models.students import StudentShape, TinyStudent, to_student
from tests.export.test_pipelines import (
    SIDE,
    as_picture,
    check_picture,
    common,
    photo,
    stable_diffusion,
    trained_net,
)


@torch.no_grad()
def test_the_student_decodes_the_latents_of_the_teachers_pipeline(tmp_path: Path) -> None:
    teacher = trained_net()  # its scaling factor is 0.18215
    TinyStudent().build(teacher, StudentShape(channels=16, blocks=1)).save_pretrained(tmp_path)
    vae = AutoencoderTiny.from_pretrained(tmp_path)
    pipe = stable_diffusion(StableDiffusionPipeline, vae)
    picture = pipe(height=SIDE, width=SIDE, **common()).images
    latents = pipe.scheduler.kept

    # the teacher's pipeline ends with the same latents, which it decodes as `z`
    pipe.vae = teacher
    pipe(height=SIDE, width=SIDE, **common())
    assert torch.equal(pipe.scheduler.kept, latents)
    z = latents / teacher.config["scaling_factor"]
    ours = calls.decode(vae, to_student(vae, teacher, z))
    np.testing.assert_allclose(picture, as_picture(ours), atol=1e-5)
    check_picture(picture, as_picture(vae.decode(latents).sample))


@torch.no_grad()
def test_the_students_encoder_starts_image_to_image(tmp_path: Path) -> None:
    student = TinyStudent().build(trained_net(), StudentShape(channels=16, blocks=1)).eval()
    pipe = stable_diffusion(StableDiffusionImg2ImgPipeline, student)
    picture = pipe(image=(photo() + 1) / 2, strength=0.9, **common()).images
    torch.testing.assert_close(pipe.scheduler.start, student.encode(photo()).latents)
    assert picture.shape == (1, SIDE, SIDE, 3)
