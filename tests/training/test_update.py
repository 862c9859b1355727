"""One update, term by term, against the plain way of writing it: a sum of losses and one
`.backward()`."""

import pytest
import torch
from torch import Tensor, nn

from latentvae.losses.adversarial import hinge_critic_loss, hinge_generator_loss
from latentvae.losses.discriminators import PatchGAN
from latentvae.losses.objective import Objective
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models import KLTrainingWrapper, build_autoencoder_kl
from latentvae.training.update import Adversary, backward_critic, backward_model


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLoss:
    return PerceptualLoss(load_lpips("alex"))


def parts(perceptual: nn.Module | None, *, factor: float = 0.3, adaptive: bool = True):
    torch.manual_seed(1)
    net = build_autoencoder_kl(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    wrapper = KLTrainingWrapper(net, output_logvar=-0.5, learn_logvar=True)
    critic = PatchGAN(channels=8, num_layers=2, norm_groups=4)
    objective = Objective(rec_loss="l1", perceptual=perceptual, perceptual_scale=0.8, kl_scale=1e-2)
    adversary = Adversary(critic=critic, prepared=critic, factor=factor, adaptive=adaptive, cap=1e4)
    return wrapper, critic, objective, adversary


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adaptive", [True, False])
def test_gradients_equal_one_backward_of_the_written_out_loss(
    perceptual: PerceptualLoss, adaptive: bool
) -> None:
    wrapper, critic, objective, adversary = parts(perceptual, adaptive=adaptive)
    images = torch.rand(2, 3, 32, 32) * 2 - 1

    torch.manual_seed(7)
    logged = backward_model(
        images,
        wrapper(images),
        objective=objective,
        last_layer=wrapper.last_layer,
        adversary=adversary,
    )
    ours = gradients(wrapper)
    assert not gradients(critic)
    wrapper.zero_grad()

    torch.manual_seed(7)
    out = wrapper(images)
    error = (images - out.recon).abs().mean() + 0.8 * perceptual(images, out.recon).mean()
    nll = error / wrapper.output_logvar.exp() + wrapper.output_logvar
    adversarial = hinge_generator_loss(critic(out.recon))
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
    torch.testing.assert_close(logged["critic/adaptive_weight"], weight)
    torch.testing.assert_close(logged["loss/nll"], nll.detach())


def test_the_perceptual_term_alone_trains_the_decoder(perceptual: PerceptualLoss) -> None:
    wrapper, _, objective, _ = parts(perceptual)
    objective.pixel_loss = lambda recon, images, reduction: torch.zeros_like(images)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    backward_model(
        images, wrapper(images), objective=objective, last_layer=wrapper.last_layer, adversary=None
    )
    for name, p in wrapper.net.decoder.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_the_critics_part_leaves_nothing_on_the_model_and_equals_two_forwards() -> None:
    wrapper, critic, _, adversary = parts(None)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = wrapper(images)
    logged = backward_critic(images, out.recon, adversary=adversary)
    ours = gradients(critic)
    assert not gradients(wrapper)
    critic.zero_grad()
    loss = hinge_critic_loss(critic(images), critic(out.recon.detach()))
    loss.backward()
    torch.testing.assert_close(logged["critic/loss"], loss.detach())
    for name, grad in gradients(critic).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


def test_accumulated_micro_steps_equal_the_joined_batch() -> None:
    wrapper, critic, objective, adversary = parts(None, adaptive=False)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    for part in images.chunk(2):
        out = wrapper(part, sample=False)
        backward_model(
            part,
            out,
            objective=objective,
            last_layer=wrapper.last_layer,
            adversary=adversary,
            divide_by=2,
        )
        backward_critic(part, out.recon, adversary=adversary, divide_by=2)
    halves = gradients(wrapper) | gradients(critic)
    wrapper.zero_grad()
    critic.zero_grad()
    out = wrapper(images, sample=False)
    backward_model(
        images, out, objective=objective, last_layer=wrapper.last_layer, adversary=adversary
    )
    backward_critic(images, out.recon, adversary=adversary)
    for name, grad in (gradients(wrapper) | gradients(critic)).items():
        torch.testing.assert_close(halves[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_decoder_runs_once_forward_and_once_back() -> None:
    wrapper, _, objective, adversary = parts(None)
    calls = {"forward": 0, "backward": 0}
    middle = wrapper.net.decoder.mid_block
    middle.register_forward_hook(lambda *_: calls.update(forward=calls["forward"] + 1))
    middle.register_full_backward_hook(lambda *_: calls.update(backward=calls["backward"] + 1))
    images = torch.rand(1, 3, 32, 32)
    out = wrapper(images)
    backward_model(
        images, out, objective=objective, last_layer=wrapper.last_layer, adversary=adversary
    )
    backward_critic(images, out.recon, adversary=adversary)
    assert calls == {"forward": 1, "backward": 1}
