"""Students have the teacher's latents, learn in the asked part, and cost far less."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from latentvae.config.presets import load_preset
from latentvae.models import build_autoencoder_kl, calls, family_of
from latentvae.models.students import (
    SmallFlux2,
    StudentShape,
    TinyStudent,
    inner_matrices,
    learn_only,
    silence,
    student_of,
    to_student,
    to_teacher,
)
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.distill.cost import count_macs
from tests.tiny import TINY, images

SHAPE = StudentShape(channels=8, blocks=1)


def scaled_kl(**values: Any) -> AutoencoderKL:
    net = TINY["kl"]()
    net.register_to_config(**values)
    return net


@pytest.mark.parametrize("name", ["kl", "dc", "vit_kl", "tiny", "asymmetric"])
@torch.no_grad()
def test_f_and_channels_follow_the_teacher(name: str) -> None:
    teacher = TINY[name]()
    net = student_of(teacher).build(teacher, SHAPE).eval()
    z = calls.encode(teacher, images(64, 32))
    assert calls.encode(net, images(64, 32)).shape == z.shape
    assert calls.decode(net, z).shape == (1, 3, 64, 32)


def test_grey_and_rgba_teachers_have_students_of_their_channels() -> None:
    for channels in (1, 4):
        teacher = TINY["kl"](image_channels=channels)
        net = TinyStudent().build(teacher, SHAPE)
        assert calls.image_channels(net) == channels
        assert net.decode(torch.zeros(1, 4, 4, 4)).sample.shape[1] == channels


@pytest.mark.parametrize(
    "values",
    [
        {"scaling_factor": 0.18215, "shift_factor": None},
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        {"scaling_factor": 0.5, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1, 2, 3, 4]},
    ],
)
def test_the_student_reads_latents_as_pipelines_hold_them(values: dict[str, Any]) -> None:
    teacher = scaled_kl(**values)
    student = TinyStudent().build(teacher, SHAPE)
    z = torch.randn(2, 4, 3, 3)
    ours = to_student(student, teacher, z)

    # as stock pipelines normalise: SDXL by mean and std, the others by shift and scale
    if "latents_mean" in values:
        mean, std = (
            torch.tensor(values[k]).view(1, 4, 1, 1) for k in ("latents_mean", "latents_std")
        )
        expected = (z - mean) * values["scaling_factor"] / std
    else:
        expected = (z - (values["shift_factor"] or 0.0)) * values["scaling_factor"]
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(to_teacher(student, teacher, ours), z)


def test_flux2_folds_and_unfolds_and_gives_the_same_latents() -> None:
    teacher = TINY["flux2"]()
    student = SmallFlux2().build(teacher, StudentShape(widths=(4, 4)))
    z = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(to_student(student, teacher, z), z)


@pytest.mark.parametrize("part", ["decoder", "encoder", "both"])
def test_only_the_asked_part_has_gradients(part: Any) -> None:
    net = TinyStudent().build(TINY["kl"](), SHAPE)
    learn_only(net, part)
    learns = {n.split(".")[0] for n, p in net.named_parameters() if p.requires_grad}
    frozen = {n.split(".")[0] for n, p in net.named_parameters() if not p.requires_grad}
    assert learns == ({"encoder", "decoder"} if part == "both" else {part})
    assert not learns & frozen
    assert all(weight.requires_grad and weight.ndim == 4 for weight in inner_matrices(net))


@torch.no_grad()
def test_a_silent_part_returns_0() -> None:
    net = TinyStudent().build(TINY["kl"](), SHAPE)
    assert net.encode(images(8, 8)).latents.any()
    silence(net, "encoder")
    assert not net.encode(images(8, 8)).latents.any()


def test_the_small_decoder_of_flux2_is_three_quarters_wide_by_default() -> None:
    """FLUX.2's published small decoder has 96, 192, 384 and 384 channels of 128, 256 and 512."""
    small = SmallFlux2().build(_narrow_flux2(), StudentShape())
    assert small.config["decoder_block_out_channels"] == (24, 48)


def _narrow_flux2() -> AutoencoderKLFlux2:
    network: Any = AutoencoderKLFlux2
    return network(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        layers_per_block=1,
    )


def test_taesds_decoder_needs_ten_times_fewer_macs_than_stable_diffusions() -> None:
    with torch.device("meta"):
        teacher = build_autoencoder_kl(**load_preset("kl_f8", TrainConfig).model.shape())
        student = TinyStudent().build(teacher, StudentShape())
    theirs, ours = (count_macs(net, "decoder", size=512) for net in (teacher, student))
    assert theirs > 10 * ours


def test_macs_of_a_convolution_are_counted_by_hand() -> None:
    """A 3 x 3 convolution costs 9 x in x out for each of its pixels. f is 2."""
    teacher = TINY["kl"]()
    net = TinyStudent().build(teacher, StudentShape(channels=8, blocks=1))  # f = 2
    side = 64
    half, full = (side // 2) ** 2, side**2
    expected = 9 * (4 * 8 * half + 3 * 8 * 8 * half + 8 * 8 * full + 3 * 8 * 8 * full)
    expected += 9 * 8 * 3 * full
    assert count_macs(net, "decoder", size=side) == expected
    assert family_of(net).latent_shape(net).f == 2


@torch.no_grad()
def test_an_untrained_decoder_returns_black_images() -> None:
    teacher = TINY["kl"]()
    net: Any = TinyStudent().build(teacher, SHAPE).eval()
    silence(net, "decoder")
    assert (calls.decode(net, torch.randn(1, 4, 4, 4)) == -1).all()
