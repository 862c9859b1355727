"""Checks of the loss: each term has the size that is stated and reaches what it should train.

`B` batch, `C` channels, `H W` image size, `d` latent channels, `h w` latent size, `K` codes.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from latentvae.proofs.checks import Check
from latentvae.proofs.preflight.probes import Probe, gradients_of, probe
from latentvae.proofs.preflight.rehearsal import Rehearsal

FLOAT32, BF16 = 1e-3, 3e-2  # relative errors that the precision explains
SAME = 0.1  # relative difference of gradients: a code or two may flip; a sum is 1 from the mean


def tolerance(rehearsal: Rehearsal) -> float:
    return FLOAT32 if rehearsal.training.accelerator.mixed_precision == "no" else BF16


def checks(rehearsal: Rehearsal) -> Iterator[Check]:
    config = rehearsal.task.config
    if config.objective.perceptual_scale > 0:
        yield lpips_gradient(probe(rehearsal, "lpips"))
    pixels = probe(rehearsal, "rec")
    yield reconstruction(rehearsal, pixels)
    if not config.model.freeze_encoder:
        yield latent_gradient(pixels)
    if config.model.has_kl:
        divergence = probe(rehearsal, "kl")
        yield kl(rehearsal, divergence)
        if config.objective.kl_scale > 0 and not config.model.freeze_encoder:
            yield kl_gradient(divergence)
    yield from _code_terms(rehearsal, pixels)
    if _is_additive(rehearsal):
        yield accumulation(rehearsal)


def lpips_gradient(found: Probe) -> Check:
    """LPIPS under `no_grad` adds a constant to the loss (diffusers' train_autoencoderkl.py)."""
    return Check(
        name="lpips-gradient",
        passed=found.decoder > 0,
        value=found.decoder,
        expected="of LPIPS alone, a norm above 0 at the decoder",
        advice="LPIPS trains nothing: compute it with gradients to the reconstruction, outside of "
        "no_grad and without detach",
    )


def latent_gradient(found: Probe) -> Check:
    """A straight-through estimator (or a reparametrisation) that is lost leaves the encoder to the
    latent's own terms."""
    return Check(
        name="latent-gradient",
        passed=found.encoder > 0,
        value=found.encoder,
        expected="of the pixel term alone, a norm above 0 at the encoder",
        advice="the encoder does not learn to reconstruct: the gradient is lost at the latent; "
        "check straight_through (or gradient) of the quantizer, or the sampling of the posterior",
    )


def reconstruction(rehearsal: Rehearsal, found: Probe) -> Check:
    """A sum over pixels makes clipping always active and weights depend on the resolution."""
    objective = rehearsal.task.config.objective
    images = found.images.double()
    recon = found.out.recon.detach().cpu().double().requires_grad_()
    likelihood = getattr(rehearsal.task.net, "likelihood", None)
    if likelihood is not None:
        error = likelihood.nll(images, recon)
    else:
        error = (recon - images).abs() if objective.rec_loss == "l1" else (recon - images) ** 2
    expected = error.mean()
    variance = found.out.output_logvar.detach().exp().item()
    (slope,) = torch.autograd.grad(expected / variance, recon)
    return _reduction(
        "reconstruction",
        rehearsal,
        logged=found.logged["loss/rec"],
        expected=expected,
        gradient=found.at_recon,
        slope=slope,
        stated="the mean over image elements",
    )


def kl(rehearsal: Rehearsal, found: Probe) -> Check:
    """A KL that is a mean over latent elements (or the batch) weighs something else than stated."""
    assert found.latent is not None
    latent = found.latent.cpu().double().requires_grad_()
    expected = _closed_form_kl(rehearsal, latent).mean() / found.images[0].numel()
    weight = rehearsal.task.config.objective.kl_scale
    (slope,) = torch.autograd.grad(weight * expected, latent)
    return _reduction(
        "kl",
        rehearsal,
        logged=found.logged["loss/kl"],
        expected=expected,
        gradient=found.at_latent,
        slope=slope,
        stated="nats per image over image elements",
    )


def kl_gradient(found: Probe) -> Check:
    """A KL of detached moments is logged, and holds nothing."""
    return Check(
        name="kl-gradient",
        passed=found.encoder > 0,
        value=found.encoder,
        expected="of the KL alone, a norm above 0 at the encoder",
        advice="the KL does not reach the encoder: its moments must not be detached",
    )


def _closed_form_kl(rehearsal: Rehearsal, latent: Tensor) -> Tensor:
    """(B,), nats, of moments (B, 2 d, h, w) or, of Gumbel-softmax, of logits (B, K, h, w)."""
    if rehearsal.task.config.model.posterior == "categorical":
        logs = latent.log_softmax(dim=1)
        return (logs.exp() * (logs + math.log(latent.shape[1]))).sum(dim=(1, 2, 3))
    mean, logvar = latent.chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)  # as diffusers clamps it
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def _reduction(
    name: str,
    rehearsal: Rehearsal,
    *,
    logged: Tensor,
    expected: Tensor,
    gradient: Tensor | None,
    slope: Tensor,
    stated: str,
) -> Check:
    """The logged value is the recomputed one, and so is the gradient's size (where there is one:
    whether it is there is another check)."""
    allowed = tolerance(rehearsal)
    value = logged.item() / expected.item() if expected.item() else 1.0
    found = {"value": value}
    if gradient is not None and gradient.any() and slope.any():
        found["gradient"] = (gradient.cpu().double().norm() / slope.norm()).item()
    return Check(
        name=name,
        passed=all(abs(ratio - 1) <= allowed for ratio in found.values()),
        value=", ".join(f"{key} {ratio:.4g}" for key, ratio in found.items()),
        expected=f"1 times {stated}, recomputed",
        advice="the term is reduced otherwise than its weight assumes, so that the weight means "
        "something else at another resolution or batch",
    )


def _code_terms(rehearsal: Rehearsal, pixels: Probe) -> Iterator[Check]:
    """Beta on the wrong term moves the codes where it should move the features."""
    if rehearsal.task.config.model.freeze_encoder:
        return
    weighted = {n for n in pixels.out.latent_losses if rehearsal.task.objective.weights[n]}
    if "commitment" in weighted:
        yield commitment(probe(rehearsal, "commitment"))
    if "codebook" in weighted:
        yield codebook(probe(rehearsal, "codebook"))


def commitment(found: Probe) -> Check:
    """Beta on the wrong term: the codes move where the features should."""
    return Check(
        name="commitment",
        passed=found.encoder > 0 and found.codes == 0,
        value=f"{found.encoder:.3g} at the encoder, {found.codes:.3g} at the codes",
        expected="of the commitment alone, a norm above 0 at the encoder and 0 at the codes",
        advice="commitment_weight weighs the wrong term: detach the codes in it, not the features",
    )


def codebook(found: Probe) -> Check:
    """A codebook that no gradient reaches stays random."""
    return Check(
        name="codebook",
        passed=found.encoder == 0 and found.codes > 0,
        value=f"{found.encoder:.3g} at the encoder, {found.codes:.3g} at the codes",
        expected="of the codebook's loss alone, a norm above 0 at the codes and 0 at the encoder",
        advice="codebook_weight weighs the wrong term: detach the features in it, not the codes",
    )


def _is_additive(rehearsal: Rehearsal) -> bool:
    """Whether the loss of a batch is the mean of its images' and draws no random numbers."""
    config = rehearsal.task.config
    random_backgrounds = config.data.image_channels == 4
    return not config.model.draws_noise and not random_backgrounds


def accumulation(rehearsal: Rehearsal) -> Check:
    """Gradients that are added over micro-steps and not divided make the rate another one."""
    # Without LPIPS, whose maxima over pixels go another way by a rounding; and the entropy of a
    # batch is no mean over its images.
    terms = rehearsal.task.objective.weights.keys() - {"lpips", "batch_entropy"}
    images = rehearsal.images
    joined = gradients_of(rehearsal, [images], *terms)
    halves = gradients_of(rehearsal, [images[:1], images[1:]], *terms)
    error = ((halves - joined).norm() / joined.norm()).item()
    return Check(
        name="accumulation",
        passed=error <= SAME,
        value=error,
        expected="two micro-steps of one image have the gradient of both at once: a relative "
        "difference near 0",
        advice="divide each micro-step's loss by gradient_accumulation_steps, and keep no state "
        "between micro-steps",
    )
