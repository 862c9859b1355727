"""The DiT starts at zero, drops labels once for all blocks, and is exported with 1,000 classes."""

from typing import Any

import torch

from latentvae.priors.dit import build_dit, for_pipeline, num_classes_of, sample_latents, velocity
from latentvae.priors.flow_matching import FlowSampling, noise_of
from latentvae.priors.transformer import NO_CLASS


def small(*, num_classes: int = 3, patch_size: int = 1) -> Any:
    torch.manual_seed(0)
    return build_dit(
        channels=2,
        side=4,
        num_classes=num_classes,
        width=32,
        depth=2,
        head_dim=16,
        patch_size=patch_size,
    )


def trained(**options: int) -> Any:
    """A network whose zero layers are not zero any more."""
    net = small(**options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def test_a_new_network_predicts_zero_and_every_weight_learns() -> None:
    net = small()
    x, sigma = torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 1.0])
    assert velocity(net, x, sigma, torch.tensor([0, 2, NO_CLASS])).abs().max() == 0

    net = trained()
    velocity(net, x, sigma, torch.tensor([0, 2, NO_CLASS])).square().sum().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_labels_are_not_dropped_inside_the_blocks() -> None:
    net = trained().train()
    x, sigma = torch.randn(64, 2, 4, 4), torch.full((64,), 0.5)
    classes = torch.zeros(64, dtype=torch.int64)
    torch.testing.assert_close(
        velocity(net, x, sigma, classes), velocity(net, x, sigma, classes), atol=0, rtol=0
    )
    other = velocity(net, x, sigma, torch.full((64,), NO_CLASS))
    assert (velocity(net, x, sigma, classes) - other).abs().max() > 1e-4


def test_the_exported_network_has_the_same_velocities() -> None:
    for classes in (0, 3):
        net = trained(num_classes=classes)
        wide: Any = for_pipeline(net)
        assert num_classes_of(wide) == 1000
        x, sigma = torch.randn(2, 2, 4, 4), torch.tensor([0.2, 0.7])
        for number in (*range(classes), NO_CLASS):
            labels = torch.full((2,), number)
            torch.testing.assert_close(
                velocity(wide, x, sigma, labels), velocity(net, x, sigma, labels)
            )
        # the first free label and the pipeline's own label mean "no class"
        without = velocity(net, x, sigma, torch.full((2,), NO_CLASS))
        for label in (classes, 1000):
            found = wide(x, timestep=sigma * 1000, class_labels=torch.full((2,), label)).sample
            torch.testing.assert_close(found, without)


def test_guidance_extrapolates_from_no_class_to_the_class() -> None:
    net, classes = trained(patch_size=2), torch.tensor([0, 1])
    once = {
        g: sample_latents(net, classes, options=FlowSampling(g, steps=1), shift=1.0)
        for g in (0.0, 1.0, 3.0)
    }
    torch.testing.assert_close(once[3.0], once[0.0] + 3 * (once[1.0] - once[0.0]))
    none = torch.full((2,), NO_CLASS)
    without = sample_latents(net, none, options=FlowSampling(steps=1), shift=1.0)
    torch.testing.assert_close(once[0.0], without)


def test_a_sample_depends_only_on_seed_and_number() -> None:
    net = trained()
    options = {"options": FlowSampling(steps=3), "shift": 2.0, "seed": 4}
    many = sample_latents(net, torch.tensor([0, 1, 2, 0]), **options)
    one = sample_latents(net, torch.tensor([2]), numbers=range(2, 3), **options)
    torch.testing.assert_close(one[0], many[2])
    start = noise_of((2, 4, 4), seed=4, numbers=[2])
    assert not torch.equal(one, start)
