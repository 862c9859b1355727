"""Run by the launcher in test_ranks.py: the gradients of one update, as each rank holds them, saved
to a file.

ranks.py OUT.safetensors BATCH_SIZE ADAPTIVE
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from latentvae.distributed import rank
from latentvae.training import loop
from tests.training.small import small_config


class Done(Exception):
    pass


def gradients_after_update(number: int, out: Path) -> Any:
    """Replaces the optimiser's step in update ``number`` (from 1)."""
    original = loop._Loop._step

    def saving(self: loop._Loop, adversary: Any) -> None:
        original(self, adversary)
        if self.progress.update + 1 < number:
            return
        modules = {"model": self.run.wrapper, "critic": self.run.critic}
        grads = {
            f"{name}/{key}": p.grad.clone()
            for name, module in modules.items()
            if module is not None
            for key, p in module.named_parameters()
            if p.grad is not None
        }
        save_file(grads, out.with_name(f"{out.stem}-{rank()}.safetensors"))
        raise Done

    return saving


def main(out: Path, batch_size: int, adaptive: bool) -> None:
    torch.set_num_threads(1)
    loop._Loop._step = gradients_after_update(2, out)  # type: ignore[method-assign]
    config = small_config(
        out.with_suffix(""),
        train_batch_size=batch_size,
        deterministic_posterior=True,
        disc_adaptive_weight=adaptive,
        disc_start=0,
        disc_ramp_steps=1,
        validation_steps=100,
        learning_rate=1e-6,  # whatever AdamW makes of rounding, the second update starts alike
        disc_learning_rate=1e-6,
    )
    try:
        loop.train(config)
    except Done:
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "adaptive")
