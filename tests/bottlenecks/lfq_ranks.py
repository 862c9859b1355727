"""For test_lfq.py: the losses of one rank and their gradient, saved to a file."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from latentvae.bottlenecks.lfq import LookupFreeQuantizer


def joined_batch() -> torch.Tensor:
    """The second half is unlike the first, so that each rank alone finds another entropy."""
    shift = torch.tensor([-0.3, 0.3]).repeat_interleave(2).view(4, 1, 1, 1)
    return torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(0)) * 0.3 + shift


def losses_and_gradient(features: torch.Tensor) -> dict[str, torch.Tensor]:
    features = features.clone().requires_grad_()
    losses = LookupFreeQuantizer(num_bits=6, entropy_temperature=0.8, group_bits=4)(features).losses
    (grad,) = torch.autograd.grad(sum(losses.values()), features)
    return {"grad": grad.contiguous(), **{name: loss.detach() for name, loss in losses.items()}}


def main(folder: Path, rank: int) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    save_file(losses_and_gradient(joined_batch().chunk(2)[rank]), folder / f"{rank}.safetensors")
    dist.destroy_process_group()
