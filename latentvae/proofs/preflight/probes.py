"""One micro-step of which only some terms count: who then has a gradient, and how large.

`B` batch, `C` channels, `H W` image size.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.config.autoencoder import TrainConfig
from latentvae.data import Batch
from latentvae.losses.objective import Objective
from latentvae.models.family import latent_side
from latentvae.outputs import AutoencoderOutput
from latentvae.proofs.preflight.rehearsal import Rehearsal
from latentvae.tasks.autoencoder.updates import Made


@dataclass
class Probe:
    """What a micro-step left behind.

    Attributes:
        images: (B, C, H, W), on the CPU.
        out: what the wrapper gave for them.
        logged: what the micro-step logs.
        at_recon: the loss's gradient at the reconstruction.
        latent: what the encoder gave last, moments (B, 2 d, h, w) or features, and `at_latent`, the
            gradient there; None where there was none.
        encoder, decoder, codes: norms of the gradients of these parts' parameters.
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


class OnlyTerms(nn.Module):
    """An objective of which only the terms named in ``names`` have a gradient; the others count
    0."""

    def __init__(self, objective: Objective, names: frozenset[str]) -> None:
        super().__init__()
        self.objective = objective
        self.names = names
        self.picture, self.nll = objective.picture, objective.nll
        self.latent_terms = objective.latent_terms

    def reconstruction_terms(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self._only(self.objective.reconstruction_terms(*args, **kwargs))

    def latent_loss(self, terms: dict[str, Tensor]) -> Tensor | None:
        return self.objective.latent_loss(self._only(terms))

    def _only(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: term if name in self.names else term * 0 for name, term in terms.items()}


def probe(rehearsal: Rehearsal, *names: str) -> Probe:
    """A micro-step of two images without the critic, of which only the terms ``names`` count."""
    with _probed(rehearsal, plain(rehearsal.run.config), names):
        found = _micro_step(rehearsal, rehearsal.images)
    return found


def gradients_of(rehearsal: Rehearsal, parts: list[Tensor], *names: str) -> Tensor:
    """All gradients of an update whose micro-steps are ``parts``, at the posterior's mode."""
    config = plain(rehearsal.run.config)
    config.run.deterministic_posterior = True
    config.run.gradient_accumulation_steps = len(parts)
    with _probed(rehearsal, config, names):
        for images in parts:
            _micro_step(rehearsal, images)
        grads = [p.grad.flatten().cpu() for p in _trained(rehearsal) if p.grad is not None]
    return torch.cat(grads)


def plain(config: TrainConfig) -> TrainConfig:
    """One micro-step, and nothing that holds the KL somewhere: its weight alone counts."""
    copy = config.model_copy(deep=True)
    copy.run.gradient_accumulation_steps = 1
    copy.objective.kl_warmup_steps = 0
    copy.objective.free_bits = copy.objective.kl_capacity = 0.0
    copy.objective.kl_target = copy.objective.rec_target = 0.0
    return copy


def _trained(rehearsal: Rehearsal) -> list[nn.Parameter]:
    return [p for p in rehearsal.run.wrapper.parameters() if p.requires_grad]


@contextlib.contextmanager
def _probed(rehearsal: Rehearsal, config: TrainConfig, names: tuple[str, ...]) -> Iterator[None]:
    """Another configuration and objective for a while; no gradient before or after."""
    run, updates = rehearsal.run, rehearsal.updates
    kept = run.config, run.objective
    only: Any = OnlyTerms(run.objective, frozenset(names))
    run.config, run.objective = config, only
    run.wrapper.zero_grad()
    try:
        yield
    finally:
        run.config, run.objective = kept
        run.wrapper.zero_grad()
        updates.codebook.clear()


def _micro_step(rehearsal: Rehearsal, images: Tensor) -> Probe:
    """One, with the gradients at the latent and at the reconstruction caught on their way."""
    run, caught = rehearsal.run, {}

    def at_latent(module: nn.Module, inputs: Any, output: Tensor) -> None:
        caught["latent"] = output
        if output.requires_grad:
            output.register_hook(lambda grad: caught.__setitem__("at_latent", grad.detach()))

    def at_recon(module: nn.Module, inputs: Any, output: AutoencoderOutput) -> None:
        caught["out"] = output
        output.recon.register_hook(lambda grad: caught.__setitem__("at_recon", grad.detach()))

    last = getattr(run.net, "quant_conv", None) or run.net.encoder
    handles = last.register_forward_hook(at_latent), run.prepared.register_forward_hook(at_recon)
    batch = Batch(images, torch.zeros(len(images), dtype=torch.int64), [])
    try:
        logged = rehearsal.updates.micro_step(batch, None, Made())
    finally:
        for handle in handles:
            handle.remove()
    encoder = [p for part in latent_side(run.net) for p in part.parameters()]
    codes = list(run.net.quantize.parameters()) if hasattr(run.net, "quantize") else []
    found = Probe(images=images, out=caught["out"], logged=logged)
    return replace(
        found,
        at_recon=caught.get("at_recon"),
        latent=caught["latent"].detach(),
        at_latent=caught.get("at_latent"),
        encoder=norm([p for p in encoder if all(p is not code for code in codes)]),
        decoder=norm(list(run.net.decoder.parameters())),
        codes=norm(codes),
    )


def norm(parameters: list[nn.Parameter]) -> float:
    """Of all their gradients."""
    norms = [torch.linalg.vector_norm(p.grad.float()) for p in parameters if p.grad is not None]
    return math.hypot(*torch.stack(norms).tolist()) if norms else 0.0
