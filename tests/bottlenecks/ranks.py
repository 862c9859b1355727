"""For test_vector.py: one training step of quantisers by one of several ranks, or by one process
with the joined batch, saved to a file."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from latentvae.bottlenecks.residual import ResidualQuantizer
from latentvae.bottlenecks.vector import VectorQuantizer
from latentvae.distributed import all_reduce_mean, all_reduce_sum, gather_objects


def quantisers() -> dict[str, VectorQuantizer | ResidualQuantizer]:
    size = {"num_codes": 32, "code_channels": 4, "restart_threshold": 0.999}
    return {
        "gradient": VectorQuantizer(**size, entropy_temperature=0.5),
        "ema": VectorQuantizer(**size, ema_decay=0.9, entropy_temperature=0.5),
        "residual": ResidualQuantizer(**size, num_levels=2, ema_decay=0.9, shared_codebook=False),
    }


def main(folder: Path, rank: int, world_size: int) -> None:
    if world_size > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    saved = {}
    for name, quantiser in quantisers().items():
        joined = torch.randn(4, 4, 4, 4)
        images = joined.chunk(world_size)[rank].requires_grad_()
        quantiser.initialise(torch.randn(64, 4), generator=torch.Generator().manual_seed(1))

        # forward and backward pass
        out = quantiser(images)
        sum(out.losses.values()).backward()
        # Of the mean loss over ranks, as DDP takes it.
        grads = [
            image_grad for rank_grads in gather_objects(images.grad) for image_grad in rank_grads
        ]
        saved[f"{name}/features.grad"] = torch.stack(grads) / world_size
        for key, parameter in quantiser.named_parameters():
            saved[f"{name}/{key}.grad"] = all_reduce_mean(parameter.grad)
        for key, loss in out.losses.items():
            saved[f"{name}/{key}"] = all_reduce_mean(loss)

        # update of the codebook
        vectors = images.detach().permute(0, 2, 3, 1).reshape(-1, 4)
        restarted = quantiser.update(
            {key: all_reduce_sum(value) for key, value in out.statistics.items()},
            features=torch.cat(gather_objects(vectors)),
            generator=torch.Generator().manual_seed(2),
        )
        saved[f"{name}/restarted"] = restarted
        saved |= {f"{name}/{key}": value for key, value in quantiser.state_dict().items()}
    save_file(saved, folder / f"{world_size}-{rank}.safetensors")
