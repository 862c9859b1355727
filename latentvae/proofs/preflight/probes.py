"""Make the forward and backward pass of a batch with only some loss terms, to get gradients.

Symbols: `B` batch, `C` channels, `H W` image size, `d` latent channels, `h w` latent size.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.data import Batch
from latentvae.losses.objective.adversarial_weight import AdversarialWeight
from latentvae.models import family_of
from latentvae.outputs import AutoencoderOutput
from latentvae.proofs.preflight.rehearsal import Rehearsal
from latentvae.tasks.autoencoder.config import TrainConfig


@dataclass
class Probe:
    """Output, logged values and gradients of one forward and backward pass.

    Attributes:
        images: (B, C, H, W), on the CPU.
        out: what the autoencoder, wrapped for the training, returned for the images.
        logged: values for the log.
        at_recon: gradient of the loss with respect to the reconstruction.
        latent: the encoder's last output: posterior moments (B, 2 d, h, w), or features.
        at_latent: gradient of the loss with respect to `latent`, or None if there was none.
        encoder, decoder, codes: norms of the gradients of the parameters in these modules.
    """

    images: Tensor
    out: AutoencoderOutput
    logged: dict[str, Tensor]
    at_recon: Tensor | None = None
    latent: Tensor | None = None
    at_latent: Tensor | None = None
    encoder: float = 0.0
    decoder: float = 0.0
    codes: float = 0.0


def probe(rehearsal: Rehearsal, *names: str) -> Probe:
    """Make a forward and backward pass of two images, without the discriminator.

    Args:
        rehearsal: the short trial run that the preflight makes.
        names: loss terms that keep their weight. All other loss terms have weight 0.
    """
    with _probed(rehearsal, _of_one_micro_step(rehearsal.task.config), names):
        found = _micro_step(rehearsal, rehearsal.images)
    return found


def gradients_of(rehearsal: Rehearsal, parts: list[Tensor], *names: str) -> Tensor:
    """Make the forward and backward passes of one update, and return all gradients in one tensor.

    The decoder gets the posterior's mode instead of a sample.

    Args:
        rehearsal: the short trial run that the preflight makes.
        parts: the images of each batch (micro-step).
        names: loss terms that keep their weight. All other loss terms have weight 0.
    """
    config = rehearsal.task.config.model_copy(deep=True)
    config.run.deterministic_posterior = True
    config.run.gradient_accumulation_steps = len(parts)
    with _probed(rehearsal, config, names):
        for images in parts:
            _micro_step(rehearsal, images)
        grads = [p.grad.flatten().cpu() for p in _trained(rehearsal) if p.grad is not None]
    return torch.cat(grads)


def _of_one_micro_step(config: TrainConfig) -> TrainConfig:
    copy = config.model_copy(deep=True)
    copy.discriminator.disc_scale = 0.0
    copy.run.gradient_accumulation_steps = 1
    return copy


def _trained(rehearsal: Rehearsal) -> list[nn.Parameter]:
    return [p for p in rehearsal.task.wrapper.parameters() if p.requires_grad]


@contextlib.contextmanager
def _probed(rehearsal: Rehearsal, config: TrainConfig, names: tuple[str, ...]) -> Iterator[None]:
    """In a `with` block, use the configuration ``config`` and a loss with only the terms ``names``.

    The loss has no adversarial term. All gradients are cleared before and after the `with` block.
    """
    task = rehearsal.task
    kept = task.config, task.objective
    task.config, task.objective = config, task.objective.only(*names)
    task.objective.adversarial = AdversarialWeight()
    task.wrapper.zero_grad()
    try:
        yield
    finally:
        task.config, task.objective = kept
        task.wrapper.zero_grad()
        task.end_update()


def _micro_step(rehearsal: Rehearsal, images: Tensor) -> Probe:
    """Make a forward and backward pass. Record the gradients at latent and reconstruction."""
    task, caught = rehearsal.task, {}

    def at_latent(module: nn.Module, inputs: Any, output: Tensor) -> None:
        caught["latent"] = output
        if output.requires_grad:
            output.register_hook(lambda grad: caught.__setitem__("at_latent", grad.detach()))

    def at_recon(module: nn.Module, inputs: Any, output: AutoencoderOutput) -> None:
        caught["out"] = output
        output.recon.register_hook(lambda grad: caught.__setitem__("at_recon", grad.detach()))

    # forward and backward
    family, net = family_of(task.net), task.net
    last = family.latent_head(net)
    handles = last.register_forward_hook(at_latent), task.prepared.register_forward_hook(at_recon)
    batch = Batch(images, torch.zeros(len(images), dtype=torch.int64), [])
    try:
        logged = rehearsal.updates.micro_step(batch)
    finally:
        for handle in handles:
            handle.remove()

    # norms by part
    encoder = [p for part in family.latent_side(net) for p in part.parameters()]
    codes = [p for quantizer in family.quantizers(net) for p in quantizer.parameters()]
    found = Probe(images=images, out=caught["out"], logged=logged)
    return replace(
        found,
        at_recon=caught.get("at_recon"),
        latent=caught["latent"].detach(),
        at_latent=caught.get("at_latent"),
        encoder=norm([p for p in encoder if all(p is not code for code in codes)]),
        decoder=norm(list(family.decoder(net).parameters())),
        codes=norm(codes),
    )


def norm(parameters: list[nn.Parameter]) -> float:
    """Return the norm of all gradients of these parameters."""
    norms = [torch.linalg.vector_norm(p.grad.float()) for p in parameters if p.grad is not None]
    return math.hypot(*torch.stack(norms).tolist()) if norms else 0.0
