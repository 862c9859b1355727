"""A diffusers pipeline that makes pictures from classes or prompts, by a prior and a tokenizer.

condition -> TokenTransformer -> tokens -> tokenizer's decoder -> pictures
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from latentvae.class_names import class_number, number_names
from latentvae.errors import UserError
from latentvae.models import calls
from latentvae.pictures import OutputType, convert
from latentvae.priors.sampling import Sampling, sample_tokens
from latentvae.priors.text import encode_prompts
from latentvae.priors.transformer import NO_CLASS, Text, TokenTransformer


class TokenPipeline(DiffusionPipeline):
    """A pipeline of a prior, which draws tokens, and the tokenizer that decodes these tokens.

        pipe = TokenPipeline.from_pretrained("runs/prior/export")
        pictures = pipe(["church", "church"], guidance_scale=2.0, seed=0).images

    Args:
        transformer: the prior.
        vqvae: the image tokenizer, of any class that latentvae can load.
        text_encoder: encoder of prompts, for a prior with text.
        tokenizer: the text tokenizer, which splits prompts for `text_encoder`. A `ByteTextEncoder`
            needs no tokenizer.
    """

    _optional_components: ClassVar = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: TokenTransformer,
        vqvae: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vqvae=vqvae, text_encoder=text_encoder, tokenizer=tokenizer
        )

    @torch.no_grad()
    def __call__(
        self,
        classes: str | int | Sequence[str | int] | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        num_images: int | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        output_type: OutputType = "pil",
    ) -> ImagePipelineOutput:
        """Return pictures, one for each class or prompt.

        Args:
            classes: names or numbers of classes, for a prior with classes. None takes all classes
                in turn: picture 0 has class 0, picture 1 has class 1, and so on.
            prompt: texts, for a prior with text.
            num_images: number of pictures. A single class or prompt is used for all pictures. None
                means the number of given classes or prompts, or 1 if none are given.
            guidance_scale, temperature, top_k, top_p: how tokens are drawn, see `Sampling`.
            seed: seed of the random numbers. The same seed gives the same pictures.
            output_type: `"pil"`, `"np"` (B, H, W, C) in [0, 1], or `"pt"` (B, C, H, W) in [-1, 1].

        Raises:
            UserError: the class does not exist, an option is wrong, or the prior does not accept
                classes or prompts.
        """
        labels = [] if classes is None else [classes] if isinstance(classes, str | int) else classes
        prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else prompt
        count = max(len(labels), len(prompts), 1) if num_images is None else num_images
        if count < 1:
            raise UserError(f"num_images must be at least 1 (got {count}).")
        numbers = spread_over([self.class_number(label) for label in labels], count, "classes")
        text = self.encode(spread_over(list(prompts), count, "prompts")) if prompts else None

        options = Sampling(guidance_scale, temperature, top_k, top_p)
        chosen = torch.tensor(numbers) if numbers else self.all_classes(count)
        if options.guidance != 1 and text is None and int(chosen.max()) == NO_CLASS:
            raise UserError(
                "guidance needs a class or a prompt. Give a class or a prompt, or leave guidance "
                "out."
            )
        tokens = sample_tokens(self.transformer, chosen, text=text, options=options, seed=seed)
        images: Any = convert(self.decode(tokens), output_type)
        return ImagePipelineOutput(images=images)

    def all_classes(self, count: int) -> Tensor:
        """Return a class for each of `count` images: all classes in turn.

        For a prior without classes, all values are `NO_CLASS`.
        """
        if classes := self.transformer.config["num_classes"]:
            return torch.arange(count) % classes
        return torch.full((count,), NO_CLASS)

    def class_number(self, label: str | int) -> int:
        """Return the number of a class, given by its name or number.

        Raises:
            UserError: the prior has no classes, or no such class.
        """
        config = self.transformer.config
        count = config["num_classes"]
        if not count:
            raise UserError(f"this prior has no classes, so it cannot take the class '{label}'.")
        return class_number(label, list(config["class_names"] or number_names(count)))

    def encode(self, prompts: Sequence[str]) -> Text:
        """Return the text encoder's states (B, S, C) of prompts, with their mask (see `Text`).

        Raises:
            UserError: the prior has no text encoder.
        """
        if self.text_encoder is None:
            raise UserError(
                f"this prior has no text encoder, so it cannot take the prompt '{prompts[0]}'. "
                "Give a class, or train a prior with captions."
            )
        return encode_prompts(prompts, self.tokenizer, self.text_encoder)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Decode T tokens for each image, (B, T), to images (B, C, H, W) in [-1, 1]."""
        shape = self.transformer.config["item_shape"]
        images = calls.decode_indices(self.vqvae, tokens.reshape(len(tokens), *shape))
        return images.float().clamp(-1.0, 1.0)


def spread_over(values: list[Any], count: int, name: str) -> list[Any]:
    """Repeat a single value `count` times. Return `count` values, or an empty list, as they are.

    Raises:
        UserError: the number of values is neither 0 nor 1 nor `count`.
    """
    if len(values) == 1:
        return values * count
    if values and len(values) != count:
        raise UserError(
            f"there are {len(values)} {name} for {count} images. Give 1 or {count} {name}."
        )
    return values
