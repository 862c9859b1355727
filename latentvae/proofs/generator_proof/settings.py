"""Define the settings of `latentvae prove`, which are the same for all generators."""

from dataclasses import asdict, dataclass
from typing import Any

from latentvae.errors import UserError


@dataclass(frozen=True)
class ProofSettings:
    """Settings of a proof, which trains small generators to compare latents or tokens.

    The results of two proofs are comparable only if their settings are equal.

    Args:
        updates: length of each training, in updates of `batch_size` images.
        seeds: seeds of the generators. With two or more seeds, the results have a standard
            deviation over the seeds.
        shifts: shifts of the noise levels to try, for latents. The trainings that try the shifts
            use a seed that is not in `seeds`.
        samples: number of pictures that each generator draws without guidance, with classes as
            frequent as in the training images. If there are classes, the same number of pictures is
            drawn again with guidance, with all classes equally frequent.
        guidance: weight of classifier-free guidance for the samples of the measure
            `class_accuracy`. All other measures take samples without guidance.
        width, depth: size of the generator. The width is a multiple of 32.
        batch_size: images in an update, and in a batch of samples.
        learning_rate: peak learning rate. The learning rate falls to 0 along a cosine.
        sampling_steps: number of Euler steps, for latents.
        noise: strength of the noise in the control `noise`, a copy of the codes with noise. For
            latents, the noise in a channel has `noise` times the standard deviation of the channel.
            For tokens, `noise` is the share of tokens that are replaced by random tokens.
        max_images: largest number of training images, and of held-out images. If a folder has more
            images, the images that are used are evenly spread over the folder.
        held_out: share of the images that no generator learns from.

    Raises:
        UserError: a value is not allowed.
    """

    updates: int = 400
    seeds: tuple[int, ...] = (0, 1, 2)
    shifts: tuple[float, ...] = (1.0, 2.0, 4.0)
    samples: int = 500
    guidance: float = 3.0
    width: int = 192
    depth: int = 4
    batch_size: int = 64
    learning_rate: float = 1e-3
    sampling_steps: int = 25
    noise: float = 0.5
    max_images: int = 10_000
    held_out: float = 0.1

    def __post_init__(self) -> None:
        for name in ("updates", "samples", "width", "depth", "batch_size", "sampling_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1 (got {getattr(self, name)}).")
        if self.width % 32:
            near = max(round(self.width / 32), 1) * 32
            raise UserError(
                f"width must be a multiple of 32 (got {self.width}). The nearest is {near}."
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds must be different numbers of at least 0 (got {self.seeds}).")
        if not self.shifts or min(self.shifts) <= 0:
            raise UserError(f"shifts must be above 0 (got {self.shifts}).")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out must be between 0 and 1 (got {self.held_out:g}).")
        if self.guidance < 0 or self.noise < 0 or self.learning_rate <= 0:
            raise UserError(
                "guidance and noise must be at least 0, and learning_rate above 0 (got "
                f"{self.guidance:g}, {self.noise:g} and {self.learning_rate:g})."
            )
        if self.max_images < 20:
            raise UserError(f"max_images must be at least 20 (got {self.max_images}).")

    def protocol(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self) | {"seeds": list(self.seeds), "shifts": list(self.shifts)}
