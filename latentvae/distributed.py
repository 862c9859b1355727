"""Communicate between processes (ranks). No other module of latentvae communicates.

All functions also work in one process without Accelerate.
"""

import os
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over ranks, as a new tensor without gradient."""
    tensor = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Return the element-wise maximum over ranks, as a new tensor without gradient."""
    tensor = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean over ranks, as a new tensor without gradient."""
    return all_reduce_sum(tensor) / world_size()


def gather_cat(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, joined along the first axis in rank order.

    Args:
        tensor: a tensor of the same shape on all ranks.

    Returns:
        A tensor without gradient.
    """
    tensor = tensor.detach().contiguous()
    if not is_distributed():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, joined along the first axis in rank order, with gradients.

    In the backward pass, each rank's tensor gets the sum of the gradients that all ranks compute
    for it. So if every rank computes the same loss from the gathered tensor, DDP's mean over ranks
    gives the same gradient as one process with all images. All ranks must call `backward`.

    Args:
        tensor: a tensor of the same shape on all ranks.
    """
    return cast(Tensor, _Gather.apply(tensor)) if is_distributed() else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return gather_cat(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        start = rank() * ctx.rows
        return all_reduce_sum(gradients[0])[start : start + ctx.rows]


def send_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor on all ranks with the tensor of rank 0, in the given order."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def gather_objects(value: Any) -> list[Any]:
    """Return a list of all ranks' values, in rank order. Values must be small and picklable."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_main(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def launched_rank() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, from the launcher's environment.

    This function also works without an initialised process group.
    """
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launched_device() -> str:
    """Return the name of this rank's GPU, such as `"cuda:0"`, or `"cpu"` if there is no GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
