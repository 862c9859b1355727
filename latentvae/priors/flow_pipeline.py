"""A diffusers pipeline that turns classes or prompts into pictures, by flow matching.

noise, class -> DiT, step by step -> normalised latent -> latent -> autoencoder's decoder -> picture
noise, prompt -> PixArt network, step by step -> ...

Most exports of flow matching models are folders of diffusers' own `DiTPipeline`, or for text of
`PixArtSigmaPipeline`. An export with a pipeline of diffusers works where only diffusers is
installed. But diffusers' pipelines only divide latents by the autoencoder's `scaling_factor`, and
only read text with T5. In all other cases, such as latents with another normalisation or another
text encoder than T5, the export uses `FlowPipeline`.

`B` batch, `d` latent channels, `h w` latent positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtTransformer2DModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from latentvae.autoencoder import Autoencoder
from latentvae.class_names import class_number
from latentvae.errors import UserError
from latentvae.models.normalization import LatentNormalization
from latentvae.pictures import OutputType, convert
from latentvae.priors.dit import Condition, for_pipeline, sample_latents
from latentvae.priors.flow_matching import FlowSampling
from latentvae.priors.pipeline import spread_over
from latentvae.priors.pixart import encode_captions
from latentvae.priors.transformer import NO_CLASS, Text

MAX_DIFFERENCE = 1e-6  # allowed relative difference of a pipeline's scale to that of the latents
PIXART_STEP = 8  # `PixArtSigmaPipeline` draws pictures whose sides are multiples of this


class FlowPipeline(DiffusionPipeline):
    """A pipeline of a flow matching model, which draws latents, and an autoencoder's decoder.

        pipe = FlowPipeline.from_pretrained("runs/flow/export")
        pictures = pipe(["church", "church"], guidance_scale=2.0, seed=0).images
        pictures = pipe(prompt=["a church"], seed=0).images  # for a model with text

    Args:
        transformer: the DiT, or for text the PixArt network.
        vae: the autoencoder.
        scheduler: the sampler of diffusers, of which `FlowPipeline` reads only `flow_shift`.
        id2label: dict from class numbers to class names. If a class has several names, commas
            separate these names.
        latents_mean, latents_scale: normalised latents are (z - mean) * scale, with one value for
            each channel or one value for all channels. With None, the autoencoder's own
            normalisation is used.
        fold: side of the squares of latent positions that are folded into channels (pixel
            unshuffle). 1 means no folding.
        text_encoder: encoder of prompts, for a model with text.
        tokenizer: the text tokenizer, which splits prompts for `text_encoder`.
    """

    _optional_components: ClassVar = ["text_encoder", "tokenizer"]
    config: Any  # diffusers sets it

    def __init__(
        self,
        transformer: DiTTransformer2DModel | PixArtTransformer2DModel,
        vae: Any,
        scheduler: DPMSolverMultistepScheduler,
        id2label: Mapping[str, str] | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_scale: Sequence[float] | None = None,
        fold: int = 1,
        text_encoder: Any = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
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
        """Shift of the noise levels.

        With a shift above 1, sampling makes more steps at high noise levels than with a shift of 1.
        """
        return self.scheduler.config.flow_shift

    @torch.no_grad()
    def __call__(
        self,
        classes: str | int | Sequence[str | int] | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        num_images: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 25,
        solver: str = "euler",
        seed: int = 0,
        output_type: OutputType = "pil",
    ) -> ImagePipelineOutput:
        """Return pictures, one for each class or prompt.

        Args:
            classes: names or numbers of classes, for a model with classes. None takes all classes
                in turn: picture 0 has class 0, picture 1 has class 1, and so on.
            prompt: texts, for a model with text.
            num_images: number of pictures. A single class or prompt is used for all pictures. None
                means the number of given classes or prompts, or 1 if none are given.
            guidance_scale, num_inference_steps, solver: see `FlowSampling`.
            seed: seed of the noise. The same seed gives the same pictures.
            output_type: `"pil"`, `"np"` (B, H, W, C) in [0, 1], or `"pt"` (B, C, H, W) in [-1, 1].

        Raises:
            UserError: the class does not exist, an option is wrong, the model does not accept
                classes or prompts, or a model with text gets no prompt.
        """
        labels = [] if classes is None else [classes] if isinstance(classes, str | int) else classes
        prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else prompt
        count = max(len(labels), len(prompts), 1) if num_images is None else num_images
        if count < 1:
            raise UserError(f"num_images must be at least 1 (got {count}).")

        condition = self.condition(labels, prompts, count)
        options: Any = FlowSampling(guidance_scale, num_inference_steps, solver)  # type: ignore
        latents = self.sample(condition, options=options, seed=seed)
        images: Any = convert(self.decode(latents), output_type)
        return ImagePipelineOutput(images=images)

    @property
    def reads_text(self) -> bool:
        """Whether the model generates pictures from text prompts."""
        return self.text_encoder is not None

    def condition(
        self, labels: Sequence[str | int], prompts: Sequence[str], count: int
    ) -> Condition:
        """Return the conditions of `count` images.

        Args:
            labels: one class, or a class for each image, or an empty list for all classes in turn.
            prompts: one prompt, or a prompt for each image.
            count: number of images.

        Raises:
            UserError: the class does not exist, the model does not accept classes or prompts, a
                model with text gets no prompt, or the number of labels or prompts is neither 0 nor
                1 nor `count`.
        """
        numbers = spread_over([self.class_number(label) for label in labels], count, "classes")
        if prompts:
            return self.encode(spread_over(list(prompts), count, "prompts"))
        if self.reads_text:
            raise UserError("this model draws pictures of a text, so it needs a prompt. Give one.")
        return torch.tensor(numbers) if numbers else self.all_classes(count)

    def encode(self, prompts: Sequence[str]) -> Text:
        """Return the text encoder's states (B, S, C) of prompts, with their mask (see `Text`).

        Raises:
            UserError: the model has no text encoder.
        """
        if not self.reads_text:
            instead = "Give a class, or train" if self.class_names else "Train"
            raise UserError(
                f"this model has no text encoder, so it cannot take the prompt '{prompts[0]}'. "
                f"{instead} a model with --text_encoder."
            )
        return encode_captions(prompts, self.tokenizer, self.text_encoder)

    def all_classes(self, count: int) -> Tensor:
        """Return a class for each of `count` images: all classes in turn.

        For a model without classes, all values are `NO_CLASS`.
        """
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
            raise UserError(
                f"this model has no classes, so it cannot take the class '{label}'."
                + " Give a prompt." * self.reads_text
            )
        return class_number(label, names)

    def sample(
        self,
        condition: Condition,
        *,
        options: FlowSampling | None = None,
        seed: int = 0,
        numbers: range | None = None,
    ) -> Tensor:
        """Draw normalised latents (B, d, h, w), see `sample_latents`.

        Raises:
            UserError: the options ask for guidance, but no image has a class or text.
        """
        options = options or FlowSampling()
        self.check_guidance(condition, options)
        empty = None
        if isinstance(condition, Text) and options.guidance != 1:
            empty = self.encode([""])

        return sample_latents(
            self.transformer,
            condition,
            unconditional=empty,
            options=options,
            shift=self.shift,
            seed=seed,
            numbers=numbers,
        )

    def check_guidance(self, condition: Condition, options: FlowSampling) -> None:
        """Raise UserError if the options ask for guidance, but no image has a class or text."""
        if options.guidance == 1 or isinstance(condition, Text):
            return
        if int(condition.max()) == NO_CLASS:
            raise UserError("guidance needs a class. Give a class, or leave guidance out.")

    @torch.no_grad()
    def decode(self, normalised: Tensor) -> Tensor:
        """Decode normalised latents (B, d, h, w) to images (B, C, H, W) in [-1, 1]."""
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
    """Return whether diffusers' own pipelines can decode latents with this normalisation.

    `DiTPipeline` and `PixArtSigmaPipeline` divide latents by `scaling_factor`, without any other
    normalisation. Both pipelines load only diffusers' own classes of autoencoders.
    """
    if not type(vae).__module__.startswith("diffusers."):
        return False
    scaling = vae.config.get("scaling_factor")
    if scaling is None or normalization.fold != 1 or bool((normalization.mean != 0).any()):
        return False
    return bool(((normalization.scale / scaling - 1).abs() <= MAX_DIFFERENCE).all())


def stock_reads(encoder: Any, vae: Any, *, side: int) -> bool:
    """Return whether diffusers' `PixArtSigmaPipeline` can use a text encoder and an autoencoder.

    `PixArtSigmaPipeline` takes only T5, and computes the size of a picture from the autoencoder's
    `block_out_channels`. The sides of a picture must be multiples of 8 pixels.

    Args:
        encoder: the text encoder.
        vae: the autoencoder's network.
        side: height and width of the latents, in positions.
    """
    blocks = vae.config.get("block_out_channels")
    if encoder.config.model_type != "t5" or blocks is None:
        return False
    return side * 2 ** (len(blocks) - 1) % PIXART_STEP == 0


def flow_scheduler(shift: float) -> DPMSolverMultistepScheduler:
    """Return diffusers' solver for the noise levels and velocities of `flow_matching`.

    With `solver_order` 1 in its config, the solver is the Euler method. With `solver_order` 2, the
    default, the solver needs fewer steps than the Euler method.
    """
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        final_sigmas_type="zero",
    )


def build_pipeline(
    net: Any,
    vae: Any,
    *,
    shift: float,
    labels: Sequence[str],
    normalization: LatentNormalization,
    text: tuple[Any, Any] | None = None,
) -> DiffusionPipeline:
    """Return the pipeline to export: diffusers' own if possible, or else `FlowPipeline`.

    diffusers' own pipeline must be able to decode the latents (`stock_decodes`) and, for a model
    with text, to read the text (`stock_reads`).

    Args:
        net: the trained DiT, or for text the trained PixArt network.
        vae: the autoencoder's network.
        shift: shift of the noise levels.
        labels: names of the classes, empty for a model without classes.
        normalization: normalisation of the latents.
        text: tokenizer and encoder of prompts, for a model with text.
    """
    parts: Any = {
        "transformer": for_pipeline(net) if text is None else net,
        "vae": vae,
        "scheduler": flow_scheduler(shift),
    }

    # diffusers' own pipelines
    id2label: Any = {str(number): name for number, name in enumerate(labels)} or None
    stock = stock_decodes(vae, normalization)
    if text is not None:
        words, encoder = text
        parts |= {"tokenizer": words, "text_encoder": encoder}
        if stock and stock_reads(encoder, vae, side=net.config.sample_size):
            from diffusers import PixArtSigmaPipeline  # this import needs the package transformers

            return PixArtSigmaPipeline(**parts)
    elif stock:
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
