"""A diffusers pipeline that turns classes into pictures: flow matching model and autoencoder.

noise, class -> DiT, step by step -> normalised latent -> latent -> autoencoder's decoder -> picture

Most exports are folders of diffusers' own `DiTPipeline`, which samples where only diffusers is
installed. `DiTPipeline` only divides latents by the autoencoder's `scaling_factor`. If that is not
the normalisation of the latents, the folder names `FlowPipeline`, which reads both kinds.

`B` batch, `T` sampling steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from latentvae.autoencoder import Autoencoder
from latentvae.errors import UserError, nearest
from latentvae.models.normalization import LatentNormalization
from latentvae.pictures import OutputType, convert
from latentvae.priors.dit import for_pipeline, sample_latents
from latentvae.priors.flow_matching import FlowSampling
from latentvae.priors.pipeline import spread_over
from latentvae.priors.transformer import NO_CLASS

MAX_DIFFERENCE = 1e-6  # relative, between a pipeline's scale and the scale of the latents


class FlowPipeline(DiffusionPipeline):
    """Pictures from a flow matching model on latents, and the autoencoder that decodes them.

        pipe = FlowPipeline.from_pretrained("runs/flow/export")
        pictures = pipe(["church", "church"], guidance_scale=2.0, seed=0).images

    Args:
        transformer: the DiT.
        vae: the autoencoder.
        scheduler: the sampler of diffusers. Here, only its `flow_shift` is read.
        id2label: names of the classes by number, separated by commas if a class has several.
        latents_mean, latents_scale: normalised latents are (z - mean) * scale, with a value for
            each channel or one for all. None takes the autoencoder's own normalisation.
        fold: number of positions on a side that become channels.
    """

    config: Any  # diffusers sets it

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: Any,
        scheduler: DPMSolverMultistepScheduler,
        id2label: Mapping[str, str] | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_scale: Sequence[float] | None = None,
        fold: int = 1,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(
            id2label=id2label, latents_mean=latents_mean, latents_scale=latents_scale, fold=fold
        )

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, empty for a model without classes."""
        labels = self.config.id2label or {}
        return [labels[number] for number in sorted(labels, key=int)]

    @property
    def shift(self) -> float:
        """Shift of the noise levels."""
        return self.scheduler.config.flow_shift

    @torch.no_grad()
    def __call__(
        self,
        classes: str | int | Sequence[str | int] | None = None,
        *,
        num_images: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 25,
        solver: str = "euler",
        seed: int = 0,
        output_type: OutputType = "pil",
    ) -> ImagePipelineOutput:
        """Return pictures, one for each class.

        Args:
            classes: names or numbers of classes. None takes all classes in turn.
            num_images: number of pictures. One class is then used for all of them.
            guidance_scale, num_inference_steps, solver: see `FlowSampling`.
            seed: seed of the noise. The same seed gives the same pictures.
            output_type: `"pil"`, `"np"` (B, H, W, C) in [0, 1], or `"pt"` (B, C, H, W) in [-1, 1].

        Raises:
            UserError: the model has no such class, or an option is out of range.
        """
        labels = [] if classes is None else [classes] if isinstance(classes, str | int) else classes
        count = max(len(labels), 1) if num_images is None else num_images
        if count < 1:
            raise UserError(f"num_images must be at least 1 (got {count}).")

        numbers = spread_over([self.class_number(label) for label in labels], count, "classes")
        options: Any = FlowSampling(guidance_scale, num_inference_steps, solver)  # type: ignore
        chosen = torch.tensor(numbers) if numbers else self.all_classes(count)
        images: Any = convert(
            self.decode(self.sample(chosen, options=options, seed=seed)), output_type
        )
        return ImagePipelineOutput(images=images)

    def all_classes(self, count: int) -> Tensor:
        """Return the class of each of `count` images: all classes in turn, or `NO_CLASS`."""
        if names := self.class_names:
            return torch.arange(count) % len(names)
        return torch.full((count,), NO_CLASS)

    def class_number(self, label: str | int) -> int:
        """Return the number of a class, given by its name or number.

        Raises:
            UserError: the model has no classes, or no such class.
        """
        names = self.class_names
        if not names:
            raise UserError(f"this model has no classes, so it cannot take the class '{label}'.")
        if label in names:
            return names.index(str(label))

        # As in diffusers, each part of a name with commas means the class too.
        split = [[part.strip() for part in name.split(",")] for name in names]
        parts = [number for number, found in enumerate(split) if label in found]
        if len(parts) == 1:
            return parts[0]
        if isinstance(label, int) or label.isdecimal():
            if 0 <= int(label) < len(names):
                return int(label)
        raise UserError(
            f"there is no class '{label}'. The classes are {', '.join(names)}"
            f"{nearest(str(label), names)}"
        )

    def sample(
        self,
        classes: Tensor,
        *,
        options: FlowSampling | None = None,
        seed: int = 0,
        numbers: range | None = None,
    ) -> Tensor:
        """Draw normalised latents, see `sample_latents`.

        Raises:
            UserError: the options ask for guidance, but an image has no class.
        """
        options = options or FlowSampling()
        if options.guidance != 1 and int(classes.max()) == NO_CLASS:
            raise UserError("guidance needs a class. Give one, or leave guidance out.")
        return sample_latents(
            self.transformer,
            classes,
            options=options,
            shift=self.shift,
            seed=seed,
            numbers=numbers,
        )

    @torch.no_grad()
    def decode(self, normalised: Tensor) -> Tensor:
        """Decode normalised latents to images (B, C, H, W) in [-1, 1]."""
        autoencoder = Autoencoder(self.vae, name="vae")
        mean, scale = self.config.latents_mean, self.config.latents_scale
        norm = autoencoder.normalization
        if mean is not None:
            norm = LatentNormalization(
                1.0, 0.0, torch.tensor(mean), torch.tensor(scale), self.config.fold
            )
        images: Any = autoencoder.decode(norm.invert(normalised))
        return images.clamp(-1.0, 1.0)


def stock_decodes(vae: Any, normalization: LatentNormalization) -> bool:
    """Return whether diffusers' `DiTPipeline` decodes latents of this normalisation.

    `DiTPipeline` divides latents by `scaling_factor`, and does nothing else. It loads only classes
    of diffusers.
    """
    if not type(vae).__module__.startswith("diffusers."):
        return False
    scaling = vae.config.get("scaling_factor")
    if scaling is None or normalization.fold != 1 or bool((normalization.mean != 0).any()):
        return False
    return bool(((normalization.scale / scaling - 1).abs() <= MAX_DIFFERENCE).all())


def flow_scheduler(shift: float) -> DPMSolverMultistepScheduler:
    """Return diffusers' solver for the noise levels and velocities of `flow_matching`.

    Its first order is the Euler method. Its second order, the default, needs fewer steps.
    """
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        final_sigmas_type="zero",
    )


def build_pipeline(
    net: DiTTransformer2DModel,
    vae: Any,
    *,
    shift: float,
    labels: Sequence[str],
    normalization: LatentNormalization,
) -> DiffusionPipeline:
    """Return the pipeline to export: `DiTPipeline` if it can decode the latents.

    Args:
        net: the trained DiT.
        vae: the autoencoder's network.
        shift: shift of the noise levels.
        labels: names of the classes, empty for a model without classes.
        normalization: normalisation of the latents.
    """
    parts: Any = {
        "transformer": for_pipeline(net),
        "vae": vae,
        "scheduler": flow_scheduler(shift),
    }

    id2label: Any = {str(number): name for number, name in enumerate(labels)} or None
    if stock_decodes(vae, normalization):
        pipeline = DiTPipeline(**parts, id2label=id2label)
        pipeline.register_to_config(id2label=id2label)
        return pipeline
    return FlowPipeline(
        **parts,
        id2label=id2label,
        latents_mean=normalization.mean.tolist(),
        latents_scale=normalization.scale.tolist(),
        fold=normalization.fold,
    )
