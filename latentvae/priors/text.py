"""Encode prompts with a text encoder, for a generator that gets a text as its condition.

The encoder comes from the package `transformers`, or is a `ByteTextEncoder`, which was trained
together with a prior.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from latentvae.errors import UserError, first_line
from latentvae.priors.transformer import Text

MAX_TEXT_TOKENS = 120  # as in LlamaGen. Prompts with more tokens are cut.


def load_text_encoder(path: str) -> tuple[Any, Any]:
    """Return the tokenizer and the text encoder in a `transformers` folder or Hub repository.

    For T5, only the encoder is loaded, and for CLIP only the text encoder. The encoder is frozen.

    Raises:
        UserError: `transformers` is not installed, or the folder holds no text encoder.
    """
    try:
        from transformers import (
            AutoConfig,
            AutoModel,
            AutoModelForTextEncoding,
            AutoTokenizer,
            CLIPConfig,
            CLIPTextModel,
        )
    except ImportError as error:
        raise UserError(
            f"text_encoder '{path}' needs the package transformers (pip install transformers)."
        ) from error

    here = {"local_files_only": Path(path).exists()}
    try:
        config = AutoConfig.from_pretrained(path, use_safetensors=True, **here)
        encoders = AutoModelForTextEncoding._model_mapping
        kind: Any = AutoModelForTextEncoding if type(config) in encoders else AutoModel
        kind = CLIPTextModel if isinstance(config, CLIPConfig) else kind
        # Load in float32, as pipelines do, whatever the dtype in the files is.
        encoder = kind.from_pretrained(path, use_safetensors=True, **here).eval().float()
        tokenizer = AutoTokenizer.from_pretrained(path, use_safetensors=True, **here)
        encode_prompts(["a", "two words"], tokenizer, encoder)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = first_line(error)
        raise UserError(
            f"text_encoder '{path}' is not a text encoder that transformers can load: {reason}"
        ) from error
    return tokenizer, encoder.requires_grad_(False)


@torch.no_grad()
def encode_prompts(prompts: Sequence[str], tokenizer: Any, encoder: Any) -> Text:
    """Return the last hidden states of prompts, (B, S, C), float32, with their mask.

    C is the number of channels of the encoder's states, and S is the number of tokens of the
    longest prompt. With a tokenizer, S is at most `MAX_TEXT_TOKENS`. Without a tokenizer, the
    encoder itself splits texts into bytes (`ByteTextEncoder`).
    """
    if tokenizer is None:
        text = encoder(encoder.split(prompts))
        return Text(text.states.float(), text.mask)
    words = tokenizer(
        list(prompts),
        padding=True,
        truncation=True,
        max_length=longest_text(tokenizer),
        return_tensors="pt",
    ).to(encoder.device)
    states = encoder(input_ids=words.input_ids, attention_mask=words.attention_mask)
    return Text(states.last_hidden_state.float(), words.attention_mask.bool())


def longest_text(tokenizer: Any) -> int:
    """Return the largest number of tokens that a text can have. Longer texts are cut."""
    return min(MAX_TEXT_TOKENS, tokenizer.model_max_length)


def repeat_text(text: Text, count: int) -> Text:
    """Return the states of one text for `count` images."""
    return Text(text.states.expand(count, -1, -1), text.mask.expand(count, -1))


def join_texts(texts: Sequence[Text]) -> Text:
    """Return the texts of several batches as one batch. Shorter texts get padding."""
    slots = max(text.states.shape[1] for text in texts)
    states, masks = [], []
    for text in texts:
        missing = slots - text.states.shape[1]
        states.append(F.pad(text.states, (0, 0, 0, missing)))
        masks.append(F.pad(text.mask, (0, missing)))
    return Text(torch.cat(states), torch.cat(masks))


def check_exported_encoder(
    folder: Path, tokenizer: Any, encoder: Any, *, captions: Sequence[str]
) -> None:
    """Raise RuntimeError if an export has another text encoder or tokenizer than the training.

    The exported encoder is loaded on the CPU, because a large encoder may not fit on the GPU twice.

    Args:
        folder: the exported pipeline, with the folders `text_encoder` and `tokenizer`.
        tokenizer, encoder: those of the training.
        captions: texts that both tokenizers split.
    """
    ours = encoder.state_dict()
    theirs = type(encoder).from_pretrained(folder / "text_encoder", use_safetensors=True)
    theirs = theirs.state_dict()
    if ours.keys() != theirs.keys() or any(
        not torch.equal(value.cpu(), theirs[name].float()) for name, value in ours.items()
    ):
        raise RuntimeError("the export's text encoder differs from the one used in training")
    words = type(tokenizer).from_pretrained(folder / "tokenizer", use_safetensors=True)
    if words(list(captions)).input_ids != tokenizer(list(captions)).input_ids:
        raise RuntimeError("the export's tokenizer differs from the one used in training")


def describe_encoder(encoder: nn.Module) -> str:
    """Return class and size of a text encoder as text, for the overview that a training prints."""
    size = sum(p.numel() for p in encoder.parameters())
    return f"{type(encoder).__name__}, {size / 1e6:.1f} M parameters"
