"""A decoder-only transformer over the tokens of images, as in LlamaGen (arXiv:2406.06525).

    condition, token 0, ..., token T - 2 -> blocks -> logits of token 0, 1, ..., T - 1

Tokens of several levels (token maps) form one sequence, coarsest level first, each level row by
row. The transformer's input is a sequence of slots. Slot t reads token t - 1 and predicts token t.
Slot 0 reads the class. The slots of a text come before slot 0 and have no position. The position of
any other slot is the position of the token that it predicts. The network uses this position twice:
as a 2-D rotary embedding in attention (arXiv:2104.09864), and as a learned embedding that is added
to the input.

`B` batch, `T` tokens of an image, `S` slots of a text, `K` codes, `L` levels, `W` width, `D`
channels of an attention head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.models.vit.rotary import grid, rotate, rotations

NO_CLASS = -1  # the class of an image without a class, and of an image whose condition is dropped


@dataclass
class TokenLogits(BaseOutput):
    """Output of `TokenTransformer`.

    Attributes:
        logits: (B, T, K), in the dtype of the weights or of autocast. Entry t depends only on the
            condition and on tokens 0 to t - 1.
    """

    logits: Tensor = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Text:
    """The output states of a text encoder for B texts.

    Attributes:
        states: (B, S, C), C channels of the text encoder.
        mask: (B, S), bool: True for tokens of the text, False for padding. A row without True means
            "no text".
    """

    states: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def to(self, device: torch.device) -> "Text":
        """Return the states and mask moved to a device."""
        return Text(self.states.to(device), self.mask.to(device))


@dataclass(frozen=True)
class Words:
    """Texts as numbers (such as bytes), the input of a text encoder that learns with the prior.

    Attributes:
        ids: (B, S), int64.
        mask: (B, S), bool, as for `Text`.
    """

    ids: Tensor
    mask: Tensor


class TokenTransformer(ModelMixin, ConfigMixin):
    """A transformer that predicts each token of an image from the tokens before it.

        net = TokenTransformer(num_codes=1024, levels=[(8, 8)], num_classes=10)
        logits = net(indices, classes).logits  # indices (B, 64), classes (B,) -> (B, 64, 1024)

    Args:
        num_codes: K, the number of codes of each level.
        levels: (height, width) in tokens of each level (map of tokens), coarsest level first. For a
            residual tokenizer with L levels, the same size is given L times.
        item_shape: shape in which the tokenizer takes the tokens of an image, such as (8, 8). The
            transformer itself does not use `item_shape`. None means the size of the level if there
            is only one level, otherwise (T,).
        num_classes: number of classes of the condition, 0 for none.
        text_channels: channels C of the text encoder's states, 0 for a model without text.
        width: channels of the transformer, a multiple of 4 * num_heads.
        depth: number of blocks.
        num_heads: number of attention heads.
        dropout: dropout probability in each residual branch and in the inputs.
        class_names: names of the classes 0, 1, 2 and so on, if they have names.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _gradient_checkpointing_func: Any  # diffusers sets it

    @register_to_config
    def __init__(
        self,
        num_codes: int = 1024,
        levels: Sequence[tuple[int, int]] = ((8, 8),),
        item_shape: Sequence[int] | None = None,
        num_classes: int = 0,
        text_channels: int = 0,
        width: int = 256,
        depth: int = 6,
        num_heads: int = 8,
        dropout: float = 0.1,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.level_sizes = [height * width for height, width in levels]
        tokens = sum(self.level_sizes)
        if item_shape is None:
            shape = levels[0] if len(levels) == 1 else (tokens,)
            self.register_to_config(item_shape=tuple(shape))

        # inputs
        self.condition = nn.Embedding(num_classes + 1, width)  # the last row means "no class"
        self.text = nn.Linear(text_channels, width) if text_channels else None
        self.tokens = nn.Embedding(num_codes * len(levels), width)  # each level has its own rows
        self.places = nn.Embedding(tokens, width)
        self.drop = nn.Dropout(dropout)

        # blocks
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.outputs = nn.ModuleList(nn.Linear(width, num_codes, bias=False) for _ in levels)

        # constants
        levels_of = torch.arange(len(levels)).repeat_interleave(torch.tensor(self.level_sizes))
        self.register_buffer("offsets", levels_of * num_codes, persistent=False)
        turns = rotations(places_of(levels), channels=width // num_heads)
        self.register_buffer("turns", turns, persistent=False)
        self.apply(initialise)
        for weight in self.outputs.parameters():
            nn.init.zeros_(weight)  # with zeros, training starts at a loss of log K

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens of an image."""
        return len(self.offsets)

    def level_of(self, place: int) -> int:
        """Return the number of the level (map of tokens) that token number `place` belongs to."""
        return int(self.offsets[place]) // self.config["num_codes"]

    def forward(
        self,
        indices: Tensor,
        classes: Tensor | None = None,
        text: Text | None = None,
        return_dict: bool = True,
    ) -> TokenLogits | tuple[Tensor]:
        """Return the logits of every token, given the condition and the tokens before it.

        Args:
            indices: (B, T), int64 in 0..K - 1.
            classes: (B,), int64. `NO_CLASS` and None mean "no class".
            text: states of a text encoder, for a model with `text_channels`.
        """
        hidden, mask = self._inputs(indices[:, :-1], classes, text)
        turns = self._turns(hidden.shape[1])
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(block, hidden, turns, mask)
            else:
                hidden = block(hidden, turns, mask)

        # each level has its own output layer
        by_level = self.norm(hidden[:, -self.num_tokens :]).split(self.level_sizes, dim=1)
        logits = torch.cat(
            [output(x) for output, x in zip(self.outputs, by_level, strict=True)], dim=1
        )
        return TokenLogits(logits=logits) if return_dict else (logits,)

    def _inputs(
        self, indices: Tensor, classes: Tensor | None, text: Text | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the inputs (B, S + 1 + t, W) for text, class and t tokens, and a mask or None."""
        start = self.embed_condition(len(indices), classes)
        before = self.tokens(indices + self.offsets[: indices.shape[1]])
        hidden = torch.cat([start, before], dim=1)
        hidden = self.drop(hidden + self.places.weight[: hidden.shape[1]])
        if text is None:
            return hidden, None
        words, mask = self.embed_text(text, after=hidden.shape[1])
        return torch.cat([words, hidden], dim=1), mask

    def embed_condition(self, batch: int, classes: Tensor | None) -> Tensor:
        """Return the embedding of the classes, (B, 1, W)."""
        none = self.condition.num_embeddings - 1
        if classes is None:
            classes = torch.full((batch,), none, device=self.condition.weight.device)
        return self.condition(torch.where(classes == NO_CLASS, none, classes))[:, None]

    def embed_text(self, text: Text, *, after: int) -> tuple[Tensor, Tensor]:
        """Return the inputs for a text (B, S, W), and a mask for these and `after` more inputs.

        The mask (B, 1, S + after, S + after) is causal and hides padding. Each input attends to
        itself, so that no row of the mask is empty.
        """
        if self.text is None:
            raise ValueError("this transformer has no text_channels, so it takes no text")
        slots = text.states.shape[1] + after
        causal = torch.ones(slots, slots, dtype=torch.bool, device=text.mask.device).tril()
        seen = F.pad(text.mask, (0, after), value=True)[:, None, None]
        itself = torch.eye(slots, dtype=torch.bool, device=text.mask.device)
        return self.text(text.states.to(self.text.weight.dtype)), (causal & seen) | itself

    def _turns(self, slots: int) -> Tensor:
        """Return the rotations of the rotary embedding, (2, slots, D / 2), for all inputs."""
        return with_text(self.turns, slots - self.num_tokens)


def with_text(turns: Tensor, slots: int) -> Tensor:
    """Prepend rotations by angle 0, for `slots` inputs of a text, to the tokens' rotations."""
    cos, sin = turns
    return torch.stack([F.pad(cos, (0, 0, slots, 0), value=1.0), F.pad(sin, (0, 0, slots, 0))])


class Block(nn.Module):
    """A block of attention and SwiGLU, each after RMSNorm, as in Llama (arXiv:2302.13971)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 64) * 64  # two thirds of 4 W, up to a multiple of 64
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, turns: Tensor, mask: Tensor | None = None, cache: "Cache | None" = None
    ) -> Tensor:
        """Return the hidden states (B, T, W) after this block.

        Args:
            x: (B, T, W).
            turns: rotations of the rotary embedding for the T entries of `x`, (2, T, D / 2). D is
                the number of channels of a head.
            mask: (B, 1, T, keys), True where an entry attends to a key. None means causal
                attention. With a cache and T = 1, None means attention to all entries in the cache.
            cache: keys and values of earlier entries, to which those of `x` are appended.
        """
        # attention
        pattern = "b t (three h d) -> three b h t d"
        q, k, v = rearrange(self.qkv(self.norm1(x)), pattern, three=3, h=self.heads)
        q, k = rotate(q, turns), rotate(k, turns)
        causal = mask is None and q.shape[2] > 1
        if cache is not None:
            k, v = cache.extend(k, v)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.drop(self.out(rearrange(seen, "b h t d -> b t (h d)")))

        # SwiGLU
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.drop(self.down(F.silu(gate) * up))


class Cache:
    """Keys and values of the inputs that a block has seen, for sampling token by token.

    Args:
        slots: total number of inputs: class, tokens and text.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._kept: Tensor | None = None  # (2, B, heads, slots, D)
        self._length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, heads, t, D) of t new inputs.

        Return the keys and values of all inputs so far.
        """
        if self._kept is None:
            batch, heads, _, channels = keys.shape
            self._kept = keys.new_zeros(2, batch, heads, self.slots, channels)
        start, self._length = self._length, self._length + keys.shape[2]
        self._kept[:, :, :, start : self._length] = torch.stack([keys, values])
        kept_keys, kept_values = self._kept[:, :, :, : self._length]
        return kept_keys, kept_values


def places_of(levels: Sequence[tuple[int, int]]) -> Tensor:
    """Return the position (row, column) of each token, (T, 2), in the grid of the finest level.

    Positions of all levels refer to the grid of the finest level, so that they are comparable. With
    levels of 8 x 8 and 16 x 16 tokens, the first token of the 8 x 8 level has the position
    (0.5, 0.5).
    """
    rows, columns = max(height for height, _ in levels), max(width for _, width in levels)
    places = []
    for height, width in levels:
        scale = torch.tensor([rows / height, columns / width])
        places.append((grid(height, width) + 0.5) * scale - 0.5)
    return torch.cat(places)


def initialise(module: nn.Module) -> None:
    """Draw random weights for a linear layer or an embedding, for `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
