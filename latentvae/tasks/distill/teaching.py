"""Load the teacher and build the student of a run, and define the module that training calls.

`B` batch, `C` image channels, `H W` pixels, `d h w` latents.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.autoencoder import Autoencoder, load
from latentvae.errors import UserError
from latentvae.losses.distillation import Taught
from latentvae.models import Network, calls, load_network
from latentvae.models.students import (
    Part,
    StudentKind,
    StudentShape,
    learn_only,
    silence,
    student_of,
    to_student,
    to_teacher,
)
from latentvae.tasks.distill.config import DistillConfig, StudentConfig


def open_teacher(config: DistillConfig) -> tuple[Autoencoder, StudentKind]:
    """Load the teacher, and check that it fits the images and the options of the student.

    Raises:
        UserError: the teacher is missing, is a tokenizer, or an option does not fit it.
    """
    # the teacher
    name, data = config.student.teacher, config.data
    if name is None:
        raise UserError(
            "teacher is missing. Give the autoencoder to distil, such as --teacher runs/vae/export."
        )
    teacher = load(name)
    kind = student_of(teacher.net)
    if (part := config.student.student) not in kind.parts:
        raise UserError(
            f"student {part} does not work with '{name}': the student of a "
            f"{type(teacher.net).__name__} keeps the teacher's encoder. Give --student "
            f"{kind.parts[0]}."
        )

    # the images
    if teacher.image_channels != data.image_channels:
        raise UserError(
            f"'{name}' takes {teacher.image_channels}-channel images, but image_channels is "
            f"{data.image_channels}. Give --image_channels {teacher.image_channels}."
        )
    multiple = teacher.f * teacher.normalization.fold
    for side in data.size:
        if side % multiple:
            near = max(round(side / multiple), 1) * multiple
            raise UserError(
                f"resolution {side} is not a multiple of {multiple}, as the teacher needs. The "
                f"nearest multiple is {near}."
            )
    if teacher.fixed_size is not None and set(data.size) != {teacher.fixed_size}:
        size = teacher.fixed_size
        raise UserError(f"'{name}' takes {size} x {size} images only. Give --resolution {size}.")
    return teacher, kind


def build_student(options: StudentConfig, teacher: Network, kind: StudentKind) -> Any:
    """Return the student in train mode. Only the part that learns has gradients.

    The student's encoder, its decoder or both learn. An encoder without trained weights (see
    `untrained_part`) always returns 0. A decoder without trained weights always returns -1 (black).

    Raises:
        UserError: the pretrained network or the student's shape does not fit the teacher.
    """
    name, part = options.pretrained_model_name_or_path, options.student
    if name is not None:
        loaded = load_network(name)
        kind.check_fits(loaded, teacher, name=name)
        # The loaded weights are a memory map of the file, whose alignment can change rounding.
        net: Any = copy.deepcopy(loaded)
    else:
        shape = StudentShape(
            options.student_channels, options.student_blocks, options.decoder_block_out_channels
        )
        net = kind.build(teacher, shape)
        if (other := untrained_part(options, kind)) is not None:
            silence(net, other)
    learn_only(net, part)
    return net.train()


UNTRAINED: dict[Part, str] = {"encoder": "returns 0", "decoder": "returns black images"}


def untrained_part(options: StudentConfig, kind: StudentKind) -> Part | None:
    """Return the part of the student (encoder or decoder) without trained weights, or None."""
    if options.pretrained_model_name_or_path is not None or "encoder" not in kind.parts:
        return None
    others: dict[Part, Part] = {"decoder": "encoder", "encoder": "decoder"}
    return others.get(options.student)


class TrainedStudent(nn.Module):
    """The module that training calls.

    It applies the student's decoder to latents if the decoder learns. It applies the student's
    encoder to images if the encoder learns.

    Accelerate replaces the method `forward` of a module that it prepares, to compute in mixed
    precision. Accelerate prepares this module, and not the network inside. So validation, which
    calls the network itself, computes in float32.

    Args:
        net: the student.
        part: the part of the student that learns.
    """

    def __init__(self, net: Any, part: Part) -> None:
        super().__init__()
        self.net, self.part = net, part

    def forward(self, images: Tensor, z: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the reconstruction (B, C, H, W) and the latents (B, d, h, w).

        If the decoder does not learn, the reconstruction is None. If the encoder does not learn,
        the latents are None.

        Args:
            images: (B, C, H, W) in [-1, 1].
            z: latents in the student's scale, (B, d, h, w).
        """
        recon = None if self.part == "encoder" else calls.decode(self.net, z)
        latents = None if self.part == "decoder" else calls.encode(self.net, images)
        return recon, latents


class Pair:
    """The teacher and the student network. Both encode and decode without gradients.

    Args:
        teacher: frozen, in eval mode.
        student: the network that learns.
        part: the part of the student that learns.
    """

    def __init__(self, teacher: Network, student: Network, part: Part) -> None:
        self.teacher, self.student = teacher, student
        self.part: Part = part

    @torch.no_grad()
    def teach(
        self, images: Tensor, *, decode: bool, autocast_dtype: torch.dtype | None = None
    ) -> Taught:
        """Return the teacher's latents of images, and with `decode` the teacher's reconstructions.

        Args:
            images: (B, C, H, W) in [-1, 1].
            decode: whether the reconstructions are needed.
            autocast_dtype: dtype of the teacher's computation. Default: float32.
        """
        with torch.autocast(
            images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
        ):
            z = calls.encode(self.teacher, images)
            recon = calls.decode(self.teacher, z) if decode else None
        if recon is not None:
            recon = recon.float().clamp(-1.0, 1.0)
        return Taught(images, recon, to_student(self.student, self.teacher, z.float()))

    @torch.no_grad()
    def reconstruct(self, taught: Taught) -> Tensor:
        """Reconstruct images with the student's parts that learn and the teacher's other parts.

        - If the decoder learns, the student decodes the teacher's latents.
        - If the encoder learns, the teacher decodes the student's latents.
        - If both parts learn, the student encodes and decodes.
        """
        if self.part == "decoder":
            recon = calls.decode(self.student, taught.z)
        else:
            z = calls.encode(self.student, taught.images)
            if self.part == "both":
                recon = calls.decode(self.student, z)
            else:
                recon = calls.decode(self.teacher, to_teacher(self.student, self.teacher, z))
        return recon.clamp(-1.0, 1.0)
