"""One update, term by term, against the plain way of writing it: a sum of losses and one
`.backward()`."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from latentvae.engine.updates import clip_gradients
from latentvae.losses.adversarial import (
    GAN_LOSSES,
    Adversary,
    LeCam,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
)
from latentvae.losses.augment import diff_augment
from latentvae.losses.discriminators import PatchGAN, build_discriminator
from latentvae.losses.objective import Objective
from latentvae.losses.objective.adversarial_weight import AdversarialWeight
from latentvae.losses.objective.kl_forms import WarmUp
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models.conv.kl import build_autoencoder_kl
from latentvae.models.posterior import KLTrainingWrapper
from latentvae.tasks.autoencoder.backward import backward_discriminator, backward_model
from tests.forks import ranks


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLoss:
    return PerceptualLoss(load_lpips("alex"))


def parts(perceptual: nn.Module | None, *, factor: float = 0.3, adaptive: bool = True):
    torch.manual_seed(1)
    net = build_autoencoder_kl(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    wrapper = KLTrainingWrapper(net, output_logvar=-0.5, learn_logvar=True)
    discriminator = PatchGAN(channels=8, num_layers=2, norm_groups=4)
    objective = Objective(
        rec_loss="l1",
        perceptual=perceptual,
        perceptual_scale=0.8,
        kl_scale=1e-2,
        adversarial=AdversarialWeight(scale=factor, adaptive=adaptive, cap=1e4),
    )
    adversary = Adversary(discriminator=discriminator, prepared=discriminator, factor=factor)
    return wrapper, discriminator, objective, adversary


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adaptive", [True, False])
def test_gradients_equal_one_backward_of_the_written_out_loss(
    perceptual: PerceptualLoss, adaptive: bool
) -> None:
    wrapper, discriminator, objective, adversary = parts(perceptual, adaptive=adaptive)
    images = torch.rand(2, 3, 32, 32) * 2 - 1

    torch.manual_seed(7)
    logged = backward_model(
        images,
        wrapper(images),
        objective=objective,
        update=0,
        last_layer=wrapper.last_layer,
        adversary=adversary,
    )
    ours = gradients(wrapper)
    assert not gradients(discriminator)
    wrapper.zero_grad()

    torch.manual_seed(7)
    out = wrapper(images)
    error = (images - out.recon).abs().mean() + 0.8 * perceptual(images, out.recon).mean()
    nll = error / wrapper.output_logvar.exp() + wrapper.output_logvar
    adversarial = hinge_generator_loss(discriminator(out.recon))
    weight = torch.ones(())
    if adaptive:
        norms = [
            torch.autograd.grad(t, wrapper.last_layer, retain_graph=True)[0].norm()
            for t in (nll, adversarial)
        ]
        weight = norms[0] / (norms[1] + 1e-4)
    (nll + 1e-2 * out.kl.mean() / images[0].numel() + 0.3 * weight * adversarial).backward()
    theirs = gradients(wrapper)

    assert ours.keys() == theirs.keys() == dict(wrapper.named_parameters()).keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(logged["discriminator/adaptive_weight"], weight)
    torch.testing.assert_close(logged["loss/nll"], nll.detach())


def test_the_perceptual_term_alone_trains_the_decoder(perceptual: PerceptualLoss) -> None:
    wrapper, _, objective, _ = parts(perceptual)
    objective.pixel_loss = lambda recon, images, reduction: torch.zeros_like(images)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    backward_model(
        images,
        wrapper(images),
        objective=objective,
        update=0,
        last_layer=wrapper.last_layer,
        adversary=None,
    )
    for name, p in wrapper.net.decoder.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_the_discriminators_part_leaves_nothing_on_the_model_and_equals_two_forwards() -> None:
    wrapper, discriminator, _, adversary = parts(None)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = wrapper(images)
    logged = backward_discriminator(images, out.recon, adversary=adversary)
    ours = gradients(discriminator)
    assert not gradients(wrapper)
    discriminator.zero_grad()
    loss = hinge_discriminator_loss(discriminator(images), discriminator(out.recon.detach()))
    loss.backward()
    torch.testing.assert_close(logged["discriminator/loss"], loss.detach())
    for name, grad in gradients(discriminator).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


def test_accumulated_micro_steps_equal_the_joined_batch() -> None:
    wrapper, discriminator, objective, adversary = parts(None, adaptive=False)
    images = torch.rand(4, 3, 32, 32) * 2 - 1

    # two micro-steps
    for part in images.chunk(2):
        out = wrapper(part, sample=False)
        backward_model(
            part,
            out,
            objective=objective,
            update=0,
            last_layer=wrapper.last_layer,
            adversary=adversary,
            divide_by=2,
        )
        backward_discriminator(part, out.recon, adversary=adversary, divide_by=2)
    halves = gradients(wrapper) | gradients(discriminator)

    # the joined batch
    wrapper.zero_grad()
    discriminator.zero_grad()
    out = wrapper(images, sample=False)
    backward_model(
        images,
        out,
        objective=objective,
        update=0,
        last_layer=wrapper.last_layer,
        adversary=adversary,
    )
    backward_discriminator(images, out.recon, adversary=adversary)

    # compare
    for name, grad in (gradients(wrapper) | gradients(discriminator)).items():
        torch.testing.assert_close(halves[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_kls_factor_is_in_the_loss_and_not_in_the_log() -> None:
    wrapper, _, objective, _ = parts(None)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    grads = {}

    # fixed factors
    for factor in (1.0, 0.0, 0.25):
        wrapper.zero_grad()
        out = wrapper(images, sample=False)
        objective.kl_factor = lambda update, factor=factor: factor
        logged = backward_model(
            images,
            out,
            objective=objective,
            update=0,
            last_layer=wrapper.last_layer,
            adversary=None,
        )
        torch.testing.assert_close(logged["loss/kl"], out.kl.detach().mean() / images[0].numel())
        grads[factor] = gradients(wrapper)

    # the factor of `WarmUp`
    wrapper.zero_grad()
    objective.kl_factor = WarmUp()
    backward_model(
        images,
        wrapper(images, sample=False),
        objective=objective,
        update=0,
        last_layer=wrapper.last_layer,
        adversary=None,
    )

    # compare
    name = "net.encoder.conv_in.weight"
    torch.testing.assert_close(grads[1.0][name], gradients(wrapper)[name])
    assert not torch.allclose(grads[0.0][name], grads[1.0][name], rtol=1e-2)
    mixed = 0.75 * grads[0.0][name] + 0.25 * grads[1.0][name]
    torch.testing.assert_close(grads[0.25][name], mixed, rtol=1e-3, atol=1e-6)


def test_loss_and_augmentation_are_the_same_on_both_sides() -> None:
    """The written-out update, with the same random numbers."""
    wrapper, discriminator, objective, adversary = parts(None, adaptive=False)
    policy = ("color", "translation", "cutout")
    adversary = dataclasses.replace(adversary, loss=GAN_LOSSES["non_saturating"], augment=policy)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = wrapper(images, sample=False)
    torch.manual_seed(3)
    logged = backward_model(
        images,
        out,
        objective=objective,
        update=0,
        last_layer=wrapper.last_layer,
        adversary=adversary,
    )
    logged |= backward_discriminator(images, out.recon, adversary=adversary)
    ours = gradients(wrapper) | gradients(discriminator)
    wrapper.zero_grad()
    discriminator.zero_grad()

    out = wrapper(images, sample=False)
    torch.manual_seed(3)
    adversarial = non_saturating_generator_loss(discriminator(diff_augment(out.recon, policy)))
    (objective(images, out, update=0).total + 0.3 * adversarial).backward()
    discriminator.zero_grad()
    seen = diff_augment(torch.cat([images, out.recon.detach()]), policy)
    loss = non_saturating_discriminator_loss(discriminator(seen[:2]), discriminator(seen[2:]))
    loss.backward()
    torch.testing.assert_close(logged["discriminator/adversarial"], adversarial.detach())
    torch.testing.assert_close(logged["discriminator/loss"], loss.detach())
    for name, grad in (gradients(wrapper) | gradients(discriminator)).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def steadied(discriminator: nn.Module, prepared: nn.Module, *, r1_weight: float) -> Adversary:
    lecam = LeCam()
    lecam.load_state_dict({"anchors": torch.tensor([0.5, -0.25])})
    return Adversary(
        discriminator=discriminator,
        prepared=prepared,
        factor=1.0,
        loss=GAN_LOSSES["non_saturating"],
        r1_weight=r1_weight,
        lecam=lecam,
        lecam_weight=0.1,
    )


def test_penalties_join_the_discriminators_loss_with_their_weights() -> None:
    discriminator = build_discriminator("stylegan", image_size=(16, 16), channels=8)
    images, recon = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    logged = backward_discriminator(
        images, recon, adversary=steadied(discriminator, discriminator, r1_weight=1e4)
    )
    ours = gradients(discriminator)
    discriminator.zero_grad()
    x = images.clone().requires_grad_()
    real, fake = discriminator(x), discriminator(recon)
    (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    r1 = 0.5 * slope.square().sum() / 2
    lecam = (real + 0.25).relu().square().mean() + (0.5 - fake).relu().square().mean()
    loss = non_saturating_discriminator_loss(real, fake)
    assert 0.1 < 1e4 * r1 < 10.0
    (loss + 1e4 * r1 + 0.1 * lecam).backward()
    for name, value in (("loss", loss), ("r1", r1), ("lecam", lecam)):
        torch.testing.assert_close(logged[f"discriminator/{name}"], value.detach())
    for name, grad in gradients(discriminator).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5, msg=name)


# With the weight by which R1 is about as large as the loss.
DISCRIMINATORS_OF_RANKS = [
    ("patch", "group", 1e2),
    ("patch", "spectral", 1e4),
    ("stylegan", None, 1e4),
]


def discriminator_gradients(folder: Path, *, rank: int, ranks: int) -> None:
    """One update of each discriminator on this rank's share of four images, in micro-steps of one
    image over two ranks and of four over one; gradients and LeCam's averages to a file."""
    found = {}
    for kind, norm, r1_weight in DISCRIMINATORS_OF_RANKS:
        torch.manual_seed(5)
        discriminator = build_discriminator(kind, image_size=(24, 24), channels=8, norm=norm)
        images, recon = torch.randn(2, 4, 3, 24, 24).unbind()
        prepared = (
            DistributedDataParallel(discriminator, broadcast_buffers=False)
            if ranks > 1
            else discriminator
        )
        adversary = steadied(discriminator, prepared, r1_weight=r1_weight)
        shares = [[rank], [rank + 2]] if ranks > 1 else [[0, 1, 2, 3]]

        # gradients of all micro-steps
        logs = []
        for share in shares:
            if isinstance(prepared, DistributedDataParallel):
                prepared.require_backward_grad_sync = share is shares[-1]  # as `no_sync` does
            logs.append(
                backward_discriminator(
                    images[share], recon[share], adversary=adversary, divide_by=len(shares)
                )
            )

        # LeCam's averages
        assert adversary.lecam is not None and 0.1 < r1_weight * logs[0]["discriminator/r1"] < 10.0
        adversary.lecam.update(
            *(
                torch.stack([log[f"discriminator/logits_{side}"] for log in logs]).mean()
                for side in ("real", "fake")
            )
        )

        # results
        found |= {f"{kind}-{norm}/{name}": grad for name, grad in gradients(discriminator).items()}
        found[f"{kind}-{norm}/lecam"] = adversary.lecam.anchors
    save_file(found, folder / f"{ranks}-{rank}.safetensors")


def discriminator_of_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    discriminator_gradients(folder, rank=rank, ranks=2)
    dist.destroy_process_group()


def test_penalised_discriminators_of_two_ranks_are_one_with_the_joined_batch(
    tmp_path: Path,
) -> None:
    """R1 through the bare network and the loss through DDP, in one backward pass."""
    ranks(lambda: discriminator_of_rank(tmp_path), output=tmp_path / "output.txt")
    discriminator_gradients(tmp_path, rank=0, ranks=1)
    joined, first, second = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1")
    )
    assert joined.keys() == first.keys() == second.keys()
    for name, grad in joined.items():
        assert torch.equal(first[name], second[name]), name
        scale = grad.abs().max().clamp(min=1e-4)
        torch.testing.assert_close(first[name] / scale, grad / scale, rtol=1e-3, atol=1e-4)


def test_the_decoder_runs_once_forward_and_once_back() -> None:
    wrapper, _, objective, adversary = parts(None)
    calls = {"forward": 0, "backward": 0}
    middle = wrapper.net.decoder.mid_block
    middle.register_forward_hook(lambda *_: calls.update(forward=calls["forward"] + 1))
    middle.register_full_backward_hook(lambda *_: calls.update(backward=calls["backward"] + 1))
    images = torch.rand(1, 3, 32, 32)
    out = wrapper(images)
    backward_model(
        images,
        out,
        objective=objective,
        update=0,
        last_layer=wrapper.last_layer,
        adversary=adversary,
    )
    backward_discriminator(images, out.recon, adversary=adversary)
    assert calls == {"forward": 1, "backward": 1}


def test_a_model_that_stands_still_has_its_norm_on_its_own_device() -> None:
    """torch gives a zero on the CPU, which does not stack with the discriminator's norm on a
    GPU."""
    parameter = torch.nn.Parameter(torch.zeros(2, device="meta"))
    assert clip_gradients([parameter], 1.0).device.type == "meta"
