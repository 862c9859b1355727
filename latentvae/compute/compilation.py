"""Compile the blocks of a network for training, with `torch.compile`.

Each block is compiled separately, for three reasons:

- The adaptive weight of the adversarial loss needs only the gradient of the decoder's last
  convolution. A decoder compiled as a whole would compute the gradients of all layers.
- Compiled code draws other random numbers than eager code. If the whole network were compiled,
  samples of the posterior would differ from those without compilation.
- Separate blocks compile in a fraction of the time that the whole network would take
  (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def compile_blocks(net: Any, *, backend: str = "inductor") -> int:
    """Compile the blocks of the encoder and the decoder in place, and return their number.

    Each block is compiled when it is called for the first time. The names of the parameters and the
    state dict do not change, and a copy of the network is not compiled. Every image size is
    compiled separately, so a result does not depend on the sizes of earlier images.

    Args:
        net: the network.
        backend: backend of `torch.compile`.
    """
    blocks = list(_blocks(net))
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run compiled blocks eagerly inside the context, to avoid compiling for rare image sizes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _blocks(net: Any) -> Iterator[nn.Module]:
    for part in (net.encoder, net.decoder):
        if (transformer := getattr(part, "transformer", None)) is not None:
            yield from transformer.blocks
        for name in ("down_blocks", "mid_block", "up_blocks"):
            found = getattr(part, name, None)
            yield from found if isinstance(found, nn.ModuleList | nn.Sequential) else ()
            if name == "mid_block" and found is not None:
                yield found
