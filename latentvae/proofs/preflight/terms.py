"""Check that each loss term has its documented size and trains the right modules.

Symbols: `B` batch, `C` channels, `H W` image size, `d` latent channels, `h w` latent size, `K`
codes.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Laplace, SigmoidTransform, TransformedDistribution

from latentvae.proofs.checks import Check
from latentvae.proofs.preflight.probes import Probe, gradients_of, probe
from latentvae.proofs.preflight.rehearsal import Rehearsal

FLOAT32, BF16 = 1e-3, 3e-2  # largest relative errors that rounding explains in each precision
# Largest relative difference of gradients that counts as equal, because rounding may change one or
# two codes. If two gradients were added and not averaged, the difference would be 1.
SAME = 0.1


def tolerance(rehearsal: Rehearsal) -> float:
    """Return the largest relative error that rounding explains in the precision of the run."""
    return FLOAT32 if rehearsal.training.accelerator.mixed_precision == "no" else BF16


def checks(rehearsal: Rehearsal) -> Iterator[Check]:
    """Yield the checks of all loss terms that the run uses."""
    config = rehearsal.task.config
    if config.objective.perceptual_scale > 0:
        yield lpips_gradient(probe(rehearsal, "lpips"))
    if rehearsal.task.features is not None:
        yield feature_gradient(probe(rehearsal, "feature"))

    # reconstruction and latent
    pixels = probe(rehearsal, "rec")
    yield reconstruction(rehearsal, pixels)
    if config.objective.logit_laplace_scale > 0:
        yield logit_laplace(rehearsal, probe(rehearsal, "logit_laplace"))
    if not config.model.freeze_encoder:
        yield latent_gradient(pixels)
    if config.model.has_kl:
        divergence = probe(rehearsal, "kl")
        yield kl(rehearsal, divergence)
        if config.objective.kl_scale > 0 and not config.model.freeze_encoder:
            yield kl_gradient(divergence)

    # codes and micro-steps
    yield from _code_terms(rehearsal, pixels)
    if _is_additive(rehearsal):
        yield accumulation(rehearsal)


def lpips_gradient(found: Probe) -> Check:
    """Check that the gradient of LPIPS reaches the decoder.

    If LPIPS is computed under `no_grad`, LPIPS only adds a constant to the loss. The script
    train_autoencoderkl.py of diffusers computes LPIPS under `no_grad`.
    """
    return Check(
        name="lpips-gradient",
        passed=found.decoder > 0,
        value=found.decoder,
        expected="a gradient norm above 0 at the decoder, from LPIPS alone",
        advice="LPIPS trains nothing. Compute LPIPS with gradients to the reconstruction, without "
        "no_grad and detach.",
    )


def feature_gradient(found: Probe) -> Check:
    """Check that the gradient of the feature loss reaches the decoder."""
    return Check(
        name="feature-gradient",
        passed=found.decoder > 0,
        value=found.decoder,
        expected="a gradient norm above 0 at the decoder, from the feature loss alone",
        advice="The feature loss trains nothing. Compute the feature loss with gradients to the "
        "reconstruction, without no_grad and detach.",
    )


def latent_gradient(found: Probe) -> Check:
    """Check that the gradient of the pixel loss reaches the encoder through the latent.

    If the straight-through estimator or the reparametrisation is lost, the encoder learns only
    from loss terms of the latent, such as the KL.
    """
    return Check(
        name="latent-gradient",
        passed=found.encoder > 0,
        value=found.encoder,
        expected="a gradient norm above 0 at the encoder, from the pixel loss alone",
        advice="The encoder does not learn to reconstruct, because the gradient is lost at the "
        "latent. Check straight_through (or gradient) of the quantizer, or the sampling of the "
        "posterior.",
    )


def reconstruction(rehearsal: Rehearsal, found: Probe) -> Check:
    """Check that the pixel loss is a mean over all image elements, and not a sum.

    With a sum, gradient clipping would always be active, and loss weights would depend on the
    resolution.
    """
    objective = rehearsal.task.config.objective
    images = found.images.double()
    recon = found.out.recon.detach().cpu().double().requires_grad_()
    likelihood = getattr(rehearsal.task.net, "likelihood", None)
    if likelihood is not None:
        error = likelihood.nll(images, recon)
    else:
        error = (recon - images).abs() if objective.rec_loss == "l1" else (recon - images) ** 2

    # value and gradient
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


def logit_laplace(rehearsal: Rehearsal, found: Probe) -> Check:
    """Check the logit-Laplace loss against the density of `torch.distributions`.

    Pixels are mapped to [0.1, 0.9] (arXiv:2102.12092, appendix A.3).
    """
    recon = found.out.recon.detach().cpu().double().requires_grad_()
    x, inside = 0.5 + 0.4 * found.images.double(), 0.5 + 0.4 * recon.clamp(-1.0, 1.0)
    mu = torch.logit(inside) + (recon - recon.clamp(-1.0, 1.0)) * 0.4 / 0.09  # a tangent outside
    density = TransformedDistribution(Laplace(mu, torch.ones_like(mu)), SigmoidTransform())
    expected = -density.log_prob(x).mean()
    weight = rehearsal.task.objective.weights["logit_laplace"]
    variance = found.out.output_logvar.detach().exp().item()
    (slope,) = torch.autograd.grad(weight * expected / variance, recon)
    return _reduction(
        "logit-laplace",
        rehearsal,
        logged=found.logged["loss/logit_laplace"],
        expected=expected,
        gradient=found.at_recon,
        slope=slope,
        stated="the mean of the negative log-density over image elements",
    )


def kl(rehearsal: Rehearsal, found: Probe) -> Check:
    """Check that the KL is summed over latent elements and divided by the number of image elements.

    If the KL were divided by another number, the same `kl_scale` would have another effect.
    """
    assert found.latent is not None
    latent = found.latent.cpu().double().requires_grad_()
    expected = _closed_form_kl(rehearsal, latent)
    if getattr(rehearsal.task.config.model, "posterior_flow", 0):
        expected = expected + _difference_to_flow(rehearsal, found, latent)
    expected = expected.mean() / found.images[0].numel()
    weight = rehearsal.task.config.objective.kl_scale
    (slope,) = torch.autograd.grad(weight * expected, latent)
    return _reduction(
        "kl",
        rehearsal,
        logged=found.logged["loss/kl"],
        expected=expected,
        gradient=found.at_latent,
        slope=slope,
        stated="the KL in nats per image, divided by the number of image elements",
    )


def kl_gradient(found: Probe) -> Check:
    """Check that the KL's gradient reaches the encoder. A KL of detached moments has no effect."""
    return Check(
        name="kl-gradient",
        passed=found.encoder > 0,
        value=found.encoder,
        expected="a gradient norm above 0 at the encoder, from the KL alone",
        advice="The gradient of the KL does not reach the encoder. Do not detach the posterior's "
        "moments.",
    )


def _closed_form_kl(rehearsal: Rehearsal, latent: Tensor) -> Tensor:
    """Compute the KL of each image, (B,), in nats by its closed formula.

    Args:
        rehearsal: the short trial run that the preflight makes.
        latent: moments (B, 2 d, h, w) or, for Gumbel-softmax, logits (B, K, h, w).
    """
    if rehearsal.task.config.model.posterior == "categorical":
        logs = latent.log_softmax(dim=1)
        return (logs.exp() * (logs + math.log(latent.shape[1]))).sum(dim=(1, 2, 3))
    mean, logvar = _moments(rehearsal, latent)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def _moments(rehearsal: Rehearsal, latent: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of the posterior, each (B, d, h, w)."""
    mean, logvar = latent.chunk(2, dim=1)
    fixed = getattr(rehearsal.task.config.model, "posterior_logvar", None)
    if fixed is not None:
        return mean, torch.full_like(mean, fixed)
    return mean, logvar.clamp(-30.0, 20.0)  # limits as in diffusers


def _difference_to_flow(rehearsal: Rehearsal, found: Probe, latent: Tensor) -> Tensor:
    """Return what the posterior's normalising flow adds to the KL of each image, (B,), in nats.

    The result is computed at the latent that the forward pass of `found` drew. This drawn latent is
    written as `mean + standard deviation * noise`, so that the result has a gradient.
    """
    wrapper: Any = rehearsal.task.wrapper
    mean, logvar = _moments(rehearsal, latent)
    deviation, z = (logvar / 2).exp(), found.out.latents[0].z.detach().cpu().double()
    noise = ((z - mean) / deviation).detach()
    flow: Any = copy.deepcopy(wrapper.bottleneck.flow).cpu()
    drawn = mean + deviation * noise
    mapped, log_determinant = flow(drawn)
    return 0.5 * (mapped.square() - drawn.square()).sum(dim=(1, 2, 3)) - log_determinant


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
    """Compare a loss term's logged value and the size of its gradient with recomputed values.

    Another check reports a missing gradient.
    """
    # ratios
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
        advice="The loss term is not summed or averaged as its weight assumes. So the same weight "
        "has another effect at another resolution or batch size.",
    )


def _code_terms(rehearsal: Rehearsal, pixels: Probe) -> Iterator[Check]:
    """Yield the checks of commitment and codebook losses whose weight is not 0.

    With a frozen encoder, yield no check.
    """
    if rehearsal.task.config.model.freeze_encoder:
        return
    weighted = {n for n in pixels.out.latent_losses if rehearsal.task.objective.weights[n]}
    if "commitment" in weighted:
        yield commitment(probe(rehearsal, "commitment"))
    if "codebook" in weighted:
        yield codebook(probe(rehearsal, "codebook"))


def commitment(found: Probe) -> Check:
    """Check that the commitment loss moves the features and not the codes.

    If commitment_weight multiplied the wrong term, the commitment loss would move the codes.
    """
    return Check(
        name="commitment",
        passed=found.encoder > 0 and found.codes == 0,
        value=f"gradient norm {found.encoder:.3g} at the encoder, {found.codes:.3g} at the codes",
        expected="a norm above 0 at the encoder and 0 at the codes, from the commitment loss alone",
        advice="commitment_weight multiplies the wrong loss term. In the commitment loss, detach "
        "the codes, not the features.",
    )


def codebook(found: Probe) -> Check:
    """Check that the codebook loss moves the codes and not the features.

    Codes without a gradient stay random.
    """
    return Check(
        name="codebook",
        passed=found.encoder == 0 and found.codes > 0,
        value=f"gradient norm {found.encoder:.3g} at the encoder, {found.codes:.3g} at the codes",
        expected="a norm above 0 at the codes and 0 at the encoder, from the codebook loss alone",
        advice="codebook_weight multiplies the wrong loss term. In the codebook loss, detach the "
        "features, not the codes.",
    )


def _is_additive(rehearsal: Rehearsal) -> bool:
    """Return whether the loss is a mean over the images of a batch, without random numbers."""
    config = rehearsal.task.config
    random_backgrounds = config.data.image_channels == 4
    return not config.model.draws_noise and not random_backgrounds


def accumulation(rehearsal: Rehearsal) -> Check:
    """Check that gradients are divided by the number of batches (micro-steps) of an update.

    Without the division, gradients would grow with the number of batches, and would be clipped more
    often.
    """
    # Leave out LPIPS, because rounding changes which pixel its max-pooling chooses. Leave out the
    # entropy of a batch, because it is not a mean over the images.
    terms = rehearsal.task.objective.weights.keys() - {"lpips", "batch_entropy"}
    images = rehearsal.images
    joined = gradients_of(rehearsal, [images], *terms)
    halves = gradients_of(rehearsal, [images[:1], images[1:]], *terms)
    error = ((halves - joined).norm() / joined.norm()).item()
    return Check(
        name="accumulation",
        passed=error <= SAME,
        value=error,
        expected="a relative difference near 0 between the gradients of two micro-steps with one "
        "image each and of one micro-step with both images",
        advice="Divide each micro-step's loss by gradient_accumulation_steps, and keep no state "
        "between micro-steps.",
    )
