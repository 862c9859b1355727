"""What an export did: kept beside it, and told to the user."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from latentvae.export.half_precision import HalfPrecision

Profile = Literal["sd", "sd3", "sdxl"]
PROFILES: tuple[Profile, ...] = get_args(Profile)


@dataclass(frozen=True)
class ExportReport:
    """One written, loaded back and compared export.

    Args:
        path: the folder.
        network: the class that loads it.
        latent_channels: d.
        profile: whose reading of scale and shift it is written for.
        num_images: images that scale and shift were measured on.
        old_scaling_factor, old_shift_factor: what the network's config said before.
        measured_scaling_factor: 1 / std of its latents now (also with a frozen encoder).
        scaling_factor, shift_factor: what was written.
        half_precision: the float16 check; `force_upcast` is written as its opposite.
        identity_post_quant_conv: whether one was added, for pipelines that read its dtype.
        compared_sizes: (H, W) at which encoder and decoder were compared with the trained network.
    """

    path: Path
    network: str
    latent_channels: int
    profile: Profile
    num_images: int
    old_scaling_factor: float
    old_shift_factor: float | None
    measured_scaling_factor: float
    scaling_factor: float
    shift_factor: float
    half_precision: HalfPrecision
    identity_post_quant_conv: bool
    compared_sizes: tuple[tuple[int, int], ...]

    @property
    def force_upcast(self) -> bool:
        return not self.half_precision.safe

    @property
    def kind(self) -> str:
        latents = "An" if self.network == "AutoencoderDC" else "A KL"
        return f"{latents} autoencoder for latent diffusion"

    @property
    def size(self) -> str:
        return f"d = {self.latent_channels} channels"

    def summary(self) -> str:
        """A few lines for the screen."""
        half, sizes = self.half_precision, ", ".join(f"{h} x {w}" for h, w in self.compared_sizes)
        verdict = "safe" if half.safe else "not safe: pipelines will decode in float32"
        return "\n".join(
            [
                f"export {self.path} (profile {self.profile})",
                f"  scaling_factor {self.scaling_factor:.5f}, before "
                f"{self.old_scaling_factor:.5f}, measured {self.measured_scaling_factor:.5f} "
                f"on {self.num_images} images",
                f"  shift_factor {self.shift_factor:.5f}, before {self.old_shift_factor}",
                f"  float16 {verdict} ({half})",
                f"  loaded back by diffusers: equal to the trained network at {sizes}",
            ]
        )

    def facts(self) -> str:
        """The same for the model card."""
        half = self.half_precision
        upcast = "false" if half.safe else "true: pipelines decode in float32"
        lines = [
            "## Export",
            "",
            f"- Profile `{self.profile}`: `scaling_factor` {self.scaling_factor:.6g} (before "
            f"{self.old_scaling_factor:.6g}; measured on posterior samples of {self.num_images} "
            f"images: {self.measured_scaling_factor:.6g}), `shift_factor` {self.shift_factor:.6g}.",
            f"- `force_upcast` {upcast}. Measured with float16 weights and activations: {half}.",
            "- Loaded back with diffusers and compared with the trained network: equal, bit for "
            "bit.",
        ]
        if self.identity_post_quant_conv:
            lines.append(
                "- An identity `post_quant_conv` was added: SDXL pipelines need one to upcast."
            )
        return "\n".join(lines)
