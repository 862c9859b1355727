"""Build small networks (students) that learn from a given autoencoder (the teacher).

    kind = student_of(teacher)
    net = kind.build(teacher, StudentShape())
    learn_only(net, "decoder")

Most teachers have an `AutoencoderTiny` as student, the network of TAESD
(https://github.com/madebyollin/taesd). An `AutoencoderTiny` reads latents that are already scaled
as in pipelines, so its own `scaling_factor` is 1. FLUX.2's pipeline takes only autoencoders of the
class `AutoencoderKLFlux2`. So the student for FLUX.2 is also an `AutoencoderKLFlux2`, but its
decoder is narrower than the teacher's ("small decoder").

`f` downsampling factor, `d` latent channels.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from diffusers import AutoencoderKLFlux2, AutoencoderTiny
from torch import Tensor, nn

from latentvae.errors import UserError
from latentvae.models import calls
from latentvae.models.network import Network
from latentvae.models.table import family_of

Part = Literal["decoder", "encoder", "both"]


@dataclass(frozen=True)
class StudentShape:
    """The size of a student network.

    Args:
        channels: number of channels in the layers of an AutoencoderTiny.
        blocks: number of residual blocks in each stage of an AutoencoderTiny. The stage of the full
            resolution always has one block.
        widths: `decoder_block_out_channels` of FLUX.2's small decoder, from the finest level to the
            coarsest. An empty tuple means about three quarters of the teacher's widths.
    """

    channels: int = 64
    blocks: int = 3
    widths: tuple[int, ...] = ()


class StudentKind(ABC):
    """A kind of student network: its class, and whether its encoder and decoder can be trained.

    Attributes:
        network: diffusers' class of the student.
        parts: the choices of parts to train: "decoder", "encoder" or "both".
    """

    network: ClassVar[type[Any]]
    parts: ClassVar[tuple[Part, ...]]

    @abstractmethod
    def build(self, teacher: Network, shape: StudentShape) -> Any:
        """Return a new student network whose latents have the same shape as the teacher's latents.

        Raises:
            UserError: no student can have latents of the teacher's shape, or the argument `shape`
                does not fit this kind of student.
        """

    def check_fits(self, net: Network, teacher: Network, *, name: str) -> None:
        """Raise UserError unless a pretrained network `name` can be a student of the teacher."""
        if type(net) is not self.network:
            raise UserError(
                f"'{name}' is a {type(net).__name__}, but the student of a "
                f"{type(teacher).__name__} is a {self.network.__name__}. Give another "
                "pretrained_model_name_or_path, or leave it out."
            )
        ours, theirs = (calls.measure_shape(one) for one in (net, teacher))
        if (ours.f, ours.channels) != (theirs.f, theirs.channels):
            raise UserError(
                f"'{name}' has f = {ours.f} and {ours.channels} latent channels, but the teacher "
                f"has f = {theirs.f} and {theirs.channels} latent channels. Give another "
                "pretrained_model_name_or_path."
            )
        channels = calls.image_channels(net), calls.image_channels(teacher)
        if channels[0] != channels[1]:
            raise UserError(
                f"'{name}' takes {channels[0]}-channel images, but the teacher takes "
                f"{channels[1]}-channel images. Give another pretrained_model_name_or_path."
            )


class TinyStudent(StudentKind):
    """Students of the class `AutoencoderTiny`. Any power of two can be the downsampling factor."""

    network = AutoencoderTiny
    parts = ("decoder", "encoder", "both")

    def build(self, teacher: Network, shape: StudentShape) -> Any:
        latent, channels = calls.measure_shape(teacher), calls.image_channels(teacher)
        stages = math.log2(latent.f)

        if stages % 1:
            raise UserError(
                "the downsampling factor f of an AutoencoderTiny is a power of two, but the "
                f"teacher's f is {latent.f}. Give a teacher whose f is a power of two."
            )
        if shape.widths:
            raise UserError(
                f"decoder_block_out_channels {shape.widths} is only for a teacher of FLUX.2 "
                "(AutoencoderKLFlux2). Give student_channels instead."
            )
        blocks = (1, *[shape.blocks] * int(stages))
        widths = (shape.channels,) * len(blocks)
        network: Any = AutoencoderTiny  # diffusers' types are too narrow
        return network(
            in_channels=channels,
            out_channels=channels,
            latent_channels=latent.channels,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=blocks,
            num_decoder_blocks=blocks[::-1],
        )


class SmallFlux2(StudentKind):
    """Students of the class `AutoencoderKLFlux2`: the teacher's encoder, and a narrower decoder."""

    network = AutoencoderKLFlux2
    parts = ("decoder",)

    def build(self, teacher: Network, shape: StudentShape) -> Any:
        config = {key: value for key, value in teacher.config.items() if key[0] != "_"}
        groups, whole = config["norm_num_groups"], config["block_out_channels"]
        widths = shape.widths or tuple(
            max(round(0.75 * width / groups), 1) * groups for width in whole
        )
        if len(widths) != len(whole) or any(width % groups for width in widths):
            raise UserError(
                f"decoder_block_out_channels must be {len(whole)} multiples of {groups}, such as "
                f"{' '.join(str(width // 2 or groups) for width in whole)} (got "
                f"{' '.join(map(str, widths))})."
            )
        network: Any = AutoencoderKLFlux2
        net = network(**config | {"decoder_block_out_channels": widths})
        weights = teacher.state_dict()
        own = {name: v for name, v in weights.items() if not name.startswith("decoder.")}
        net.load_state_dict({**net.state_dict(), **own})
        return net


_OF_CLASS: dict[str, StudentKind] = {"AutoencoderKLFlux2": SmallFlux2()}
_TINY = TinyStudent()


def student_of(teacher: Network) -> StudentKind:
    """Return the kind of student network that learns from a teacher.

    Raises:
        UserError: the teacher is a tokenizer.
    """
    if calls.num_codes(teacher) is not None:
        raise UserError(
            f"the teacher is a tokenizer ({type(teacher).__name__}), but small decoders read "
            "continuous latents. Give an autoencoder without codes."
        )
    return _OF_CLASS.get(type(teacher).__name__, _TINY)


def learn_only(net: Network, part: Part) -> None:
    """Freeze every weight of a student outside the given part (encoder, decoder or both)."""
    sides = {id(p) for module in family_of(net).latent_side(net) for p in module.parameters()}
    for parameter in net.parameters():
        of_encoder = id(parameter) in sides
        parameter.requires_grad_(part == "both" or of_encoder == (part == "encoder"))


def silence(net: Network, part: Part) -> None:
    """Set the last layer of `part` (encoder or decoder) to 0, so that its output is constant.

    The zeros mark an encoder or decoder that is not trained.
    """
    *_, last = convolutions(net, part)
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)


def convolutions(net: Network, part: Part) -> list[nn.Conv2d]:
    """Return the convolutions of `encoder` or `decoder`, from the first to the last."""
    module: nn.Module = getattr(net, part)
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def inner_matrices(net: Network) -> Iterator[nn.Parameter]:
    """Yield the weights that the optimiser Muon may train.

    The first and the last layer of the encoder and of the decoder are left out.
    """
    module: Any = net
    for part in (module.encoder, module.decoder):
        layers = [m for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for layer in layers[1:-1]:
            if layer.weight.requires_grad:
                yield cast("nn.Parameter", layer.weight)


def to_student(student: Network, teacher: Network, z: Tensor) -> Tensor:
    """Convert the teacher's latents (B, d, h, w) to the scale that the student's decoder reads.

    A pipeline normalises latents with the values in the config of its autoencoder. After this
    conversion, normalisation with the student's config gives the teacher's normalised latents. So
    the student can replace the teacher in a pipeline.
    """
    normalised = family_of(teacher).normalization(teacher).apply(z)
    return family_of(student).normalization(student).invert(normalised)


def to_teacher(student: Network, teacher: Network, z: Tensor) -> Tensor:
    """Convert latents of the student's encoder to the scale that the teacher's decoder reads."""
    normalised = family_of(student).normalization(student).apply(z)
    return family_of(teacher).normalization(teacher).invert(normalised)


def stock_copy(net: Network) -> Any:
    """Return a copy of a network: float32, on the CPU, in eval mode."""
    return copy.deepcopy(net).cpu().float().eval()
