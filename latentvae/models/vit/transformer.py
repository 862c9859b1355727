"""Transformer blocks on a grid of tokens.

tokens (B, N, c) -> [+ attention(norm) -> + feed-forward(norm)] x number of blocks -> norm

A block follows ViT (arXiv:2010.11929), with three later changes. Position embeddings are rotary
(`vit.rotary`). Queries and keys are normalised, which keeps attention stable (arXiv:2302.05442).
The feed-forward layer is SwiGLU (arXiv:2002.05202).

`B` batch, `N` tokens (N = h w), `c` channels, `D` channels of an attention head.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.models.vit.rotary import grid, rotate, rotations


class LayerNorm(nn.LayerNorm):
    """A layer norm without bias, which is computed in float32 even under autocast."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, eps=self.eps).to(
            input.dtype
        )


class Attention(nn.Module):
    """Self-attention over all tokens, with rotary position embeddings.

    Args:
        channels: channels of a token, a multiple of `head_channels`.
        head_channels: channels of an attention head, a multiple of 4.
    """

    def __init__(self, channels: int, *, head_channels: int) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        # Three layers instead of one joined layer, because the optimiser Muon makes the update of
        # each matrix orthogonal.
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.query_norm = LayerNorm(head_channels)
        self.key_norm = LayerNorm(head_channels)
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        query, key, value = (
            rearrange(layer(x), "B N (heads D) -> B heads N D", heads=self.num_heads)
            for layer in (self.query, self.key, self.value)
        )
        query = rotate(self.query_norm(query), turns)
        key = rotate(self.key_norm(key), turns)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(rearrange(attended, "B heads N D -> B N (heads D)"))


class FeedForward(nn.Module):
    """SwiGLU, with about as many weights as a feed-forward layer of 4 * `channels` hidden units."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = -(-channels * 8 // 3 // 8) * 8  # rounded up to a multiple of 8
        self.gate = nn.Linear(channels, hidden, bias=False)
        self.up = nn.Linear(channels, hidden, bias=False)
        self.out = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a norm before it and a residual connection."""

    def __init__(self, channels: int, *, head_channels: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(channels)
        self.attention = Attention(channels, head_channels=head_channels)
        self.feed_forward_norm = LayerNorm(channels)
        self.feed_forward = FeedForward(channels)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """Transformer blocks and a final norm, applied to maps (B, c, h, w) of any height and width.

    Args:
        channels: number of channels c of the maps, a multiple of `head_channels`.
        num_blocks: number of blocks.
        head_channels: channels of an attention head, a multiple of 4.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any  # diffusers sets this attribute

    def __init__(self, channels: int, *, num_blocks: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.blocks = nn.ModuleList(
            Block(channels, head_channels=head_channels) for _ in range(num_blocks)
        )
        self.norm = LayerNorm(channels)
        self._initialise()

    def forward(self, maps: Tensor) -> Tensor:
        h, w = maps.shape[2:]
        turns = rotations(grid(h, w, device=maps.device), channels=self.head_channels)
        x = rearrange(maps, "B c h w -> B (h w) c")

        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, turns)
            else:
                x = block(x, turns)

        return rearrange(self.norm(x), "B (h w) c -> B c h w", h=h)

    def _initialise(self) -> None:
        """Initialise all linear layers so that the blocks' summed outputs have about variance 1."""
        for block in self.blocks:
            for name, layer in block.named_modules():
                if isinstance(layer, nn.Linear):
                    ends = name.endswith(".out")
                    gain = (2 * len(self.blocks)) ** -0.5 if ends else 1.0
                    nn.init.xavier_uniform_(layer.weight, gain)
