"""Define pairs of quantisers with equal settings, from this package and vector-quantize-pytorch.

The two quantisers of a pair have the same methods. tokenizer_quality.py trains networks with these
pairs.

`B` batch, `D` code width, `h w` latent positions, `K` codes, `L` levels, `N` vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize

from latentvae.bottlenecks import Quantized, Quantizer

COMMITMENT, ENTROPY = 0.25, 0.1  # weights of losses
DECAY = 0.8  # default of vector-quantize-pytorch
# A code restarts if its use is below this share of the mean use. With these two limits, unused
# codes restart after 17 updates of K vectors in our package, and after 18 in the other.
DEAD = 0.02  # limit of vector-quantize-pytorch
RESTART = 0.06  # our limit
Name = Literal["vq", "ema", "l2", "fsq", "lfq", "residual", "simvq"]


@dataclass(frozen=True)
class Kind:
    """A kind of quantiser that both this package and vector-quantize-pytorch have.

    Attributes:
        ours: type and arguments of our quantiser, for `build_quantizer`.
        weights: weights of the losses of our quantiser, by the name of the loss.
        theirs: function that builds the quantiser of vector-quantize-pytorch. The function's
            argument is a number of vectors: a code restarts if, on average, fewer vectors per
            update choose this code.
        start_alike: function that copies the initial codes of our quantiser to that of
            vector-quantize-pytorch. The default function does nothing, because k-means sets the
            initial codes, or the codes are fixed.
    """

    ours: dict[str, Any]
    weights: dict[str, float]
    theirs: Callable[[float], nn.Module]
    start_alike: Callable[[Any, Any], None] = lambda ours, theirs: None


def _learned(K: int, D: int, *, ema: bool = True, l2: bool = False) -> Kind:
    ours = {"num_codes": K, "code_channels": D, "l2_normalize": l2, "restart_threshold": RESTART}
    return Kind(
        ours={"type": "vq", "ema_decay": DECAY if ema else None} | ours,
        weights={"commitment": COMMITMENT, "codebook": COMMITMENT},
        theirs=lambda dead: VectorQuantize(
            D, K, use_cosine_sim=l2, ema_update=ema, learnable_codebook=not ema, **_shared(dead)
        ),
    )


def _shared(dead: float) -> dict[str, Any]:
    return {
        "decay": DECAY,
        "kmeans_init": True,
        "threshold_ema_dead_code": dead,
        "commitment_weight": COMMITMENT,
        "rotation_trick": False,
    }


@torch.no_grad()
def _same_codes(ours: Any, theirs: Any) -> None:
    theirs.frozen_codebook.copy_(ours.frozen)
    theirs.code_transform.load_state_dict(ours.projection.state_dict())


KINDS: dict[Name, Kind] = {
    "vq": _learned(1024, 64, ema=False),
    "ema": _learned(1024, 64),
    "l2": _learned(1024, 8, l2=True),
    "fsq": Kind({"type": "fsq", "levels": (8, 5, 5, 5)}, {}, lambda _: FSQ([8, 5, 5, 5])),
    "lfq": Kind(
        {"type": "lfq", "num_bits": 10},
        {"commitment": COMMITMENT, "sample_entropy": ENTROPY, "batch_entropy": -ENTROPY},
        lambda _: LFQ(dim=10, entropy_loss_weight=ENTROPY, commitment_loss_weight=COMMITMENT),
    ),
    "residual": Kind(
        {
            "type": "residual",
            "num_levels": 2,
            "num_codes": 256,
            "code_channels": 64,
            "shared_codebook": False,
            "ema_decay": DECAY,
            "restart_threshold": RESTART,
        },
        {"commitment": COMMITMENT},
        lambda dead: ResidualVQ(dim=64, num_quantizers=2, codebook_size=256, **_shared(dead)),
    ),
    "simvq": Kind(
        {"type": "simvq", "num_codes": 1024, "code_channels": 64},
        {"commitment": COMMITMENT, "codebook": 1.0},
        lambda _: SimVQ(64, 1024, rotation_trick=False),  # its default loss weights equal ours
        _same_codes,
    ),
}


class Theirs(Quantizer):
    """Wraps a quantiser of vector-quantize-pytorch in the interface of our quantisers.

    In training mode, the forward pass of the wrapped quantiser also updates its codes.
    """

    def __init__(self, module: nn.Module, like: Quantizer) -> None:
        super().__init__()
        self.module = module
        self.num_codes, self.num_levels = like.num_codes, like.num_levels
        self.in_channels = self.code_channels = like.code_channels

    def forward(self, features: Tensor, *, temperature: float = 1.0) -> Quantized:
        z, indices, *loss = self.module(features.flatten(2).transpose(1, 2))  # (B, h w, D)
        if self.num_levels > 1:  # (B, h w, L)
            indices = indices.transpose(1, 2)
        return Quantized(
            z=z.transpose(1, 2).reshape(features.shape),
            indices=indices.unflatten(-1, features.shape[2:]).long(),
            losses={"theirs": loss[0].mean()} if loss else {},  # FSQ has no loss
            statistics={},
        )

    @torch.no_grad()
    def initialise(
        self,
        features: Tensor,
        *,
        generator: torch.Generator,
        batch_vectors: int | None = None,
    ) -> None:
        self.module(features[None])  # In training mode, the first forward pass runs k-means.
