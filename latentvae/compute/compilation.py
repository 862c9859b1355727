"""`torch.compile` for the blocks of a network in training.

Block by block, because what surrounds the blocks is used one by one: the adaptive weight needs the
gradient of the decoder's last convolution alone, which a decoder compiled whole would give only
together with all others, and a posterior sampled inside would draw other numbers. It is also
compiled in a fraction of the time (https://docs.pytorch.org/tutorials/recipes/
regional_compilation.html).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def compile_blocks(net: Any, *, backend: str = "inductor") -> int:
    """Compile the blocks of the encoder and the decoder in place, when they are first called;
    returns how many there are. Names, state dicts and copies of the network do not change.

    Every size is compiled for itself, so that which sizes came before does not change a result.
    """
    blocks = list(_blocks(net))
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Call blocks as they are: for validation and export, whose sizes are met too rarely."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _blocks(net: Any) -> Iterator[nn.Module]:
    for part in (net.encoder, net.decoder):
        for name in ("down_blocks", "mid_block", "up_blocks"):
            found = getattr(part, name, None)
            yield from found if isinstance(found, nn.ModuleList | nn.Sequential) else ()
            if name == "mid_block" and found is not None:
                yield found
