"""Define the prior with its training loss, and a function that returns the bits of each token.

Symbols: `B` batch, `T` tokens of an image.
"""

import math
from collections.abc import Iterator

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.priors.byte_encoder import ByteTextEncoder
from latentvae.priors.transformer import Text, TokenTransformer, Words


class TrainedPrior(nn.Module):
    """The prior with its loss: `forward` returns the mean nats per token, a scalar.

    Accelerate replaces the method `forward` of a module that it prepares, to compute in mixed
    precision. Accelerate prepares `TrainedPrior`, and not the network inside. So validation, which
    calls the network itself, computes in float32.

    Args:
        net: the prior.
        encoder: a text encoder that learns with the prior and reads captions as `Words`, or None.
    """

    def __init__(self, net: TokenTransformer, encoder: ByteTextEncoder | None = None) -> None:
        super().__init__()
        self.net, self.encoder = net, encoder

    def blocks(self) -> Iterator[nn.Module]:
        """Yield all modules in the blocks of the prior and, if trained, of the text encoder."""
        for network in (self.net, self.encoder):
            if network is not None:
                yield from network.blocks.modules()

    def forward(self, indices: Tensor, classes: Tensor | None, text: Text | Words | None) -> Tensor:
        if isinstance(text, Words):
            assert self.encoder is not None
            text = self.encoder(text)
        logits = self.net(indices, classes, text).logits
        return F.cross_entropy(logits.float().flatten(0, 1), indices.flatten())


def token_bits(
    net: nn.Module, indices: Tensor, classes: Tensor | None, text: Text | None
) -> Tensor:
    """Return -log2 of the predicted probability of each token, in bits, (B, T), float32."""
    logits = net(indices, classes, text).logits.float()
    nats = F.cross_entropy(rearrange(logits, "b t k -> b k t"), indices, reduction="none")
    return nats / math.log(2)
