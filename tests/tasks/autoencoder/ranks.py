"""What test_ranks.py compares: the gradients of one update, what a codebook learned in it and the
KL's weight, as each rank holds them, saved to a file."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentvae.distributed import rank
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.task import AutoencoderTask
from tests.tasks.autoencoder.small import small_config


class Done(Exception):
    pass


def gradients_after_update(number: int, out: Path) -> Any:
    """Replaces what follows the optimiser's step in update ``number`` (from 1)."""
    original = AutoencoderTask.after_update

    def saving(self: AutoencoderTask, update: int, **options: Any) -> Any:
        logged = original(self, update, **options)
        if update + 1 < number:
            return logged
        grads = {
            f"{name}/{key}": p.grad.clone()
            for name, learner in self.learners.items()
            for key, p in learner.module.named_parameters()
            if p.grad is not None
        }
        quantizer = getattr(self.net, "quantize", None)
        if quantizer is not None:
            grads |= {f"buffer/{key}": value for key, value in quantizer.named_buffers()}
        target = self.objective.kl_target
        log_factor = 0.0 if target is None else target.log_factor
        grads["progress/kl_log_factor"] = torch.tensor(log_factor, dtype=torch.float64)
        save_file(grads, out.with_name(f"{out.stem}-{rank()}.safetensors"))
        raise Done

    return saving


QUANTIZERS: dict[str, dict[str, Any]] = {
    "average": {
        "type": "vq",
        "num_codes": 8,
        "code_channels": 4,
        "codebook_decay": 0.5,
        "kmeans_iterations": 2,
    },
    "entropy": {
        "type": "vq",
        "num_codes": 8,
        "code_channels": 4,
        "l2_normalize": True,
        "entropy_weight": 1.0,
        "entropy_temperature": 0.5,
    },
    "lfq": {"type": "lfq", "num_bits": 4, "entropy_weight": 1.0, "entropy_temperature": 0.5},
}


def model(quantizer: str | None) -> dict[str, Any] | None:
    if quantizer is None:
        return None
    if quantizer == "levels":
        shape = {"block_out_channels": [8, 8], "layers_per_block": 1, "residual_channels": 4}
        return {"architecture": "vqvae2", "quantizer": QUANTIZERS["average"], **shape}
    shape = {"block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    return {"architecture": "vq", "quantizer": QUANTIZERS[quantizer], **shape}


HELD = {"kl_target": 0.1, "kl_target_rate": 1.0, "kl_scale": 1.0}
# A flow needs samples. With this variance, they are the mean to rounding.
FLOW = {"posterior_flow": 4, "posterior_flow_channels": 8, "posterior_logvar": -30.0}
MORE: dict[str, dict[str, Any]] = {"held": HELD, "flow": FLOW | {"kl_scale": 1.0}}


def save_gradients(
    out: Path, batch_size: int, *, weight: str = "fixed", quantizer: str | None = None
) -> None:
    """Train to the second update, in `OUT-RANK.safetensors`.

    Args:
        weight: of the adversarial term fixed or "adaptive"; of the KL fixed or "held". Or "flow":
            fixed weights, and a flow.
    """
    config = small_config(
        out.with_suffix(""),
        model(quantizer),
        train_batch_size=batch_size,
        deterministic_posterior=quantizer is None and weight != "flow",
        disc_adaptive_weight=weight == "adaptive",
        disc_start=0,
        disc_ramp_steps=1,
        validation_steps=100,
        # AdamW's first step is the rate whatever the gradient, rounding included; at 1e-6 that is
        # enough to put one pixel on the other side of a leaky ReLU. Most weights stand still then:
        # what is compared is gradients, codebooks and the KL's weight.
        # Moving averages still move the codes by rounding, so the seed is one without such a pixel.
        seed=5,
        learning_rate=1e-9,
        disc_learning_rate=1e-9,
        **MORE.get(weight, {}),
    )

    # train to the second update
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Done):
        patch.setattr(AutoencoderTask, "after_update", gradients_after_update(2, out))
        train(config)
