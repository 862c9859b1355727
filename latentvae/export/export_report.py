"""Report the results of an autoencoder's export, in the terminal and in the model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from latentvae.export.half_precision import HalfPrecision

Profile = Literal["sd", "sd3", "sdxl"]
PROFILES: tuple[Profile, ...] = get_args(Profile)


@dataclass(frozen=True)
class ExportReport:
    """The results of an autoencoder's export, which equals the trained network when loaded back.

    Args:
        path: the folder of the export.
        network: the class that loads the export.
        has_posterior: whether the network's encoder returns a distribution.
        latent_channels: number of latent channels d.
        profile: name of the pipelines for which the scale and the shift are written.
        num_images: number of images that scale and shift were measured on.
        old_scaling_factor, old_shift_factor: values in the network's config before the export.
        old_is_default: whether the old scaling factor is the default value of the class, as in a
            new network.
        measured_scaling_factor: 1 / std of the network's latents (1 / RMS for an AutoencoderDC).
            This value is measured even if the encoder was frozen.
        scaling_factor, shift_factor: values in the config of the export.
        half_precision: result of the float16 check.
        has_force_upcast: whether the class has the option `force_upcast`. The export turns the
            option on if float16 is unsafe.
        identity_post_quant_conv: whether an identity layer `post_quant_conv` was added, because
            some pipelines read the dtype of this layer.
        compared_sizes: (H, W) at which encoder and decoder were compared with the trained network.
    """

    path: Path
    network: str
    has_posterior: bool
    latent_channels: int
    profile: Profile
    num_images: int
    old_scaling_factor: float
    old_shift_factor: float | None
    old_is_default: bool
    measured_scaling_factor: float
    scaling_factor: float
    shift_factor: float
    half_precision: HalfPrecision
    has_force_upcast: bool
    identity_post_quant_conv: bool
    compared_sizes: tuple[tuple[int, int], ...]

    @property
    def force_upcast(self) -> bool:
        return self.has_force_upcast and not self.half_precision.safe

    @property
    def kind(self) -> str:
        latents = "A KL" if self.has_posterior else "An"
        return f"{latents} autoencoder for latent diffusion"

    @property
    def size(self) -> str:
        return f"d = {self.latent_channels} channels"

    def summary(self) -> str:
        """Return the results as a few lines of text for the terminal."""
        sizes = ", ".join(f"{h} x {w}" for h, w in self.compared_sizes)
        return "\n".join(
            [
                f"export {self.path} (profile {self.profile})",
                f"  scaling_factor {self.scaling_factor:.5f}, before "
                f"{self.old_scaling_factor:.5f}{self._default()}, measured "
                f"{self.measured_scaling_factor:.5f} on {self.num_images} images",
                f"  shift_factor {self.shift_factor:.5f}, before {self.old_shift_factor}",
                f"  float16 {self._verdict()} ({self.half_precision})",
                f"  loaded back by diffusers: equal to the trained network at {sizes}",
            ]
        )

    def _default(self) -> str:
        return " (diffusers' default)" if self.old_is_default else ""

    def _verdict(self) -> str:
        if self.half_precision.safe:
            return "safe"
        if self.has_force_upcast:
            return "not safe, so pipelines decode in float32"
        return "not safe: load the model in float32 or bfloat16"

    def facts(self) -> str:
        """Return the facts of `summary` as a section of the model card."""
        upcast = f"`force_upcast` {str(self.force_upcast).lower()}: " * self.has_force_upcast
        lines = [
            "## Export",
            "",
            f"- Profile `{self.profile}`: `scaling_factor` {self.scaling_factor:.6g} (before "
            f"{self.old_scaling_factor:.6g}{self._default()}, measured on posterior samples of "
            f"{self.num_images} images: {self.measured_scaling_factor:.6g}), `shift_factor` "
            f"{self.shift_factor:.6g}.",
            f"- {upcast}float16 is {self._verdict()}. Measured with float16 weights and "
            f"activations: {self.half_precision}.",
            "- Loaded back with diffusers and compared with the trained network: equal, bit for "
            "bit.",
        ]

        if self.identity_post_quant_conv:
            lines.append(
                "- An identity `post_quant_conv` was added, because SDXL pipelines need this layer "
                "to upcast."
            )
        return "\n".join(lines)
