"""A small text encoder over bytes, which learns together with the prior that generates tokens.

    UTF-8 bytes -> embedding -> blocks with bidirectional attention -> norm -> states

`ByteTextEncoder` needs no vocabulary and no download. The encoder learns only from the training
captions, so use it for captions with few different words and patterns. For more varied captions,
use a pretrained, frozen text encoder.

`B` batch, `S` bytes of the longest text, `C` channels.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from latentvae.models.vit.rotary import rotations
from latentvae.priors.transformer import Block, Text, Words, initialise

NUM_BYTES = 256


class ByteTextEncoder(ModelMixin, ConfigMixin):
    """A transformer over the UTF-8 bytes of texts. The default shape has 1.4 M parameters.

        encoder = ByteTextEncoder()
        text = encoder(encoder.split(["a cat", "two dogs"]))  # states (2, 8, 192), mask (2, 8)

    Args:
        channels: channels C of the states, a multiple of 4 * num_heads.
        depth: number of blocks.
        num_heads: number of attention heads.
        max_bytes: largest number of bytes of a text. Longer texts are cut.
        dropout: dropout probability in each residual branch.
    """

    _no_split_modules: ClassVar = ["Block"]
    turns: Tensor

    @register_to_config
    def __init__(
        self,
        channels: int = 192,
        depth: int = 3,
        num_heads: int = 6,
        max_bytes: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.bytes = nn.Embedding(NUM_BYTES, channels)
        self.blocks = nn.ModuleList(Block(channels, num_heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(channels, eps=1e-5)

        # row and column of a byte are both equal to its place in the text
        places = torch.arange(max_bytes, dtype=torch.float32)[:, None].expand(-1, 2)
        turns = rotations(places, channels=channels // num_heads)
        self.register_buffer("turns", turns, persistent=False)
        self.apply(initialise)
        # With small embeddings, the states of all texts became equal at high learning rates.
        nn.init.normal_(self.bytes.weight)

    def split(self, texts: Sequence[str]) -> Words:
        """Return the bytes of texts, on the network's device.

        Shorter texts are padded with 0 to the length of the longest text. If a text comes from a
        file name with bytes that are not UTF-8, these bytes are returned unchanged.
        """
        longest = self.config["max_bytes"]
        coded = [text.encode(errors="surrogateescape")[:longest] for text in texts]
        width = max(1, *map(len, coded))
        rows = [list(data) + [0] * (width - len(data)) for data in coded]
        mask = [[i < len(data) for i in range(width)] for data in coded]
        device = self.turns.device
        return Words(torch.tensor(rows, device=device), torch.tensor(mask, device=device))

    def forward(self, words: Words) -> Text:
        """Return the states (B, S, C) of texts, with their mask.

        Padding does not change the states of the texts' own bytes.
        """
        slots = words.ids.shape[1]
        # A slot always sees itself, so that no row of the mask is empty.
        itself = torch.eye(slots, dtype=torch.bool, device=words.mask.device)
        seen = words.mask[:, None, None] | itself
        hidden = self.bytes(words.ids)
        for block in self.blocks:
            hidden = block(hidden, self.turns[:, :slots], seen)
        return Text(self.norm(hidden), words.mask)
