"""Measure the bits of an image's latent without entropy coding, and of files of coded tokens.

`d` latent channels, `h w` latent positions, `L` codes per position.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from latentvae.autoencoder import Autoencoder
from latentvae.coding.token_codec import (
    MAX_CODES,
    decode_levels,
    decode_tokens,
    encode_levels,
    encode_tokens,
)
from latentvae.evaluation.protocol import LATENT_BITS
from latentvae.evaluation.saved_progress import Arrays
from latentvae.models import calls
from latentvae.models.family import Codes
from latentvae.models.levels import join_levels


def raw_bits(model: Autoencoder, z: Tensor) -> float:
    """Return the number of bits of one image's latent (1, d, h, w) without entropy coding.

    A continuous latent needs 16 bits per element. A tokenizer needs log2(number of codes) bits per
    token.
    """
    if model.num_codes is None:
        return LATENT_BITS * z.numel()
    tokens = calls.num_levels(model.net) * z.shape[2] * z.shape[3]
    return math.log2(model.num_codes) * tokens


def encode_indices(indices: Tensor, codes: Codes) -> bytes:
    """Return the bytes of a file with one image's token indices (h, w) or (L, h, w)."""
    if codes.maps == 1:
        return encode_tokens(indices.cpu().numpy(), num_codes=codes.number)
    return encode_levels(_levels(indices, codes), num_codes=codes.number)


def decode_indices(content: bytes, codes: Codes) -> Tensor:
    """Return the token indices (int64) in a file that `encode_indices` wrote."""
    if codes.maps == 1:
        return torch.from_numpy(decode_tokens(content))
    return join_levels([torch.from_numpy(own)[None] for own in decode_levels(content)])[0]


class LevelBits:
    """Measures the bits per pixel of each level (map of tokens), with a separate file per level.

    Args:
        codes: the model's codes, with several maps of tokens per image.
    """

    def __init__(self, codes: Codes) -> None:
        self.codes, self._images = codes, 0
        self._sums = np.zeros(codes.maps)

    def update(self, indices: Tensor, *, pixels: int) -> None:
        """Add one image's indices (L, h, w), for h x w positions of the coarsest map."""
        number, levels = self.codes.number, _levels(indices, self.codes)
        files = [encode_tokens(level, num_codes=number) for level in levels]
        self._sums += np.array([8 * len(file) / pixels for file in files])
        self._images += 1

    def result(self) -> list[float]:
        """Return the mean bits per pixel of each level (map of tokens), coarsest level first."""
        return (self._sums / max(self._images, 1)).tolist()

    def state_dict(self) -> Arrays:
        return {"sums": self._sums.copy(), "images": np.array(self._images)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        self._sums, self._images = state["sums"].copy(), int(state["images"])


def level_bits_of(codes: Codes | None) -> LevelBits | None:
    """Return a `LevelBits` if each image has several maps of tokens, else None.

    The result is also None for more than MAX_CODES codes, which the coder does not support.
    """
    if codes is None or codes.maps == 1 or codes.number > MAX_CODES:
        return None
    return LevelBits(codes)


def _levels(indices: Tensor, codes: Codes) -> list[np.ndarray]:
    return [own[0].numpy() for own in codes.by_codebook(indices[None].cpu())]
