"""The objective's contract, over every preset, weight and policy: the total is the sum of weight
times value, a doubled weight adds its term once more, and the training step's single pass through
the decoder has the gradient of the total.

Everything runs in float64, where these hold to rounding.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentvae.config.presets import preset_names
from latentvae.losses.adversarial import Adversary
from latentvae.losses.objective import Loss, Objective
from latentvae.losses.objective.build_objective import build_objective
from latentvae.models import FAMILIES
from latentvae.outputs import AutoencoderOutput
from latentvae.tasks.autoencoder.backward import backward_model
from latentvae.tasks.autoencoder.build_parts import build_net
from latentvae.tasks.autoencoder.config import TrainConfig, load_preset
from tests.contract.tiny_presets import tiny_preset

UPDATE = 3  # inside of every ramp and warm-up
OUTPUT_LOGVAR = -0.4
TOLERANCE = {"rtol": 1e-13, "atol": 1e-14}
ENTROPY = {"entropy_weight": 0.1, "batch_entropy_gamma": 0.7, "entropy_temperature": 0.5}
WARM_UP = {"kl_warmup_steps": 10}

# What no preset has: entropy terms of a learned codebook, and every policy of the KL.
VARIANTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "vq with entropy": ("vq_small", {"quantizer": ENTROPY}),
    "learned log-variance": ("kl_small", {"objective": {"learn_logvar": True}}),
    "feature loss": ("kl_small", {"objective": {"feature_loss": "dinov2", "feature_scale": 0.3}}),
    "warm-up": ("kl_small", {"objective": {"kl_scale": 0.01} | WARM_UP}),
    "free bits": ("kl_small", {"objective": {"kl_scale": 0.01, "free_bits": 0.2} | WARM_UP}),
    "capacity": (
        "kl_small",
        {"objective": {"kl_scale": 0.01, "kl_capacity": 3.0, "kl_capacity_steps": 9}},
    ),
    "target in bits": ("kl_small", {"objective": {"kl_scale": 0.01, "kl_target": 1.0}}),
    "target of the error": ("kl_small", {"objective": {"kl_scale": 0.01, "rec_target": 0.1}}),
}
CASES = [*preset_names(TrainConfig), *VARIANTS]


class Distance(nn.Module):
    """Stands in for LPIPS: a distance per image of a fixed random projection."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(4, 3, 3, 3))

    def forward(self, images: Tensor, recon: Tensor) -> Tensor:
        first, second = (nn.functional.conv2d(x, self.kernel) for x in (images, recon))
        return (first - second).square().flatten(1).mean(1)


@dataclass
class Case:
    """A tiny training step.

    Attributes:
        adversary: None where the preset has no discriminator.
    """

    config: TrainConfig
    wrapper: nn.Module
    images: Tensor
    perceptual: nn.Module
    adversary: Adversary | None

    def objective(self, config: TrainConfig | None = None, *, adaptive: bool = False) -> Objective:
        """The objective of ``config`` (by default the case's own)."""
        config = config or self.config
        objective = build_objective(
            config.objective,
            config.discriminator,
            perceptual=self.perceptual,
            latent_weights=config.model.bottleneck.weights(),
            has_kl=config.model.has_kl,
            features=self.perceptual if config.objective.feature_loss else None,
            likelihood=getattr(self.wrapper.net, "likelihood", None),
        )
        objective.adversarial = replace(objective.adversarial, adaptive=adaptive, cap=0.7)
        if objective.kl_target is not None:
            objective.kl_target.log_factor = 0.7  # as if it had moved
        return objective

    def forward(self) -> AutoencoderOutput:
        """Reconstructions with the same noise at each call."""
        torch.manual_seed(3)
        return self.wrapper(self.images, sample=True, temperature=0.8)

    def loss(self, objective: Objective, out: AutoencoderOutput) -> Loss:
        return objective(
            self.images,
            out,
            update=UPDATE,
            adversary=self.adversary_of(objective),
            last_layer=self.wrapper.last_layer,
        )

    def adversary_of(self, objective: Objective) -> Adversary | None:
        """The adversary with the weight that ``objective`` gives it in the middle of its ramp."""
        if self.adversary is None:
            return None
        middle = objective.adversarial.warmup_updates + objective.adversarial.ramp_updates // 2
        factor = objective.adversarial.factor(middle, start=0)
        assert factor is not None and factor > 0
        return replace(self.adversary, factor=factor)


def changes_of(name: str) -> tuple[str, dict[str, dict[str, Any]]]:
    return VARIANTS.get(name, (name, {}))


@pytest.fixture(scope="module")
def cases() -> Iterator[dict[str, Case]]:
    """Cases by name, built when first used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)  # losses ask for float32
        yield {}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    if request.param not in cases:
        cases[request.param] = build_case(*changes_of(request.param))
    return cases[request.param]


def build_case(preset: str, changes: dict[str, dict[str, Any]]) -> Case:
    torch.manual_seed(0)
    config = tiny_preset(preset, **changes)
    net = build_net(config, None)
    if load_preset(preset).model.freeze_encoder:
        FAMILIES[config.model.architecture].freeze_encoder(net)
    wrapper = wrapped(net, config)
    side = config.data.resolution
    discriminator = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3))
    discriminator = discriminator.double()
    return Case(
        config=config,
        wrapper=wrapper,
        images=torch.rand(2, 3, side, side, dtype=torch.float64) * 2 - 1,
        perceptual=Distance().double(),
        adversary=Adversary(discriminator=discriminator, prepared=discriminator, factor=0.0)
        if config.discriminator.disc_scale > 0
        else None,
    )


def wrapped(net: Any, config: TrainConfig) -> nn.Module:
    wrapper = FAMILIES[config.model.architecture].wrapper(
        net, output_logvar=OUTPUT_LOGVAR, learn_logvar=config.objective.learn_logvar
    )
    return wrapper.double().train()


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_total_is_the_sum_of_weight_times_value(case: Case, adaptive: bool) -> None:
    loss = case.loss(case.objective(adaptive=adaptive), case.forward())
    assert loss.weights.keys() == loss.values.keys()
    total = sum(loss.weights[name] * value for name, value in loss.values.items())
    torch.testing.assert_close(torch.as_tensor(total), loss.total, **TOLERANCE)


def test_a_doubled_weight_adds_its_term_once_more(case: Case) -> None:
    out, objective = case.forward(), case.objective()
    before = case.loss(objective, out)
    terms = {f"loss/{name}": name for name in objective.weights if name in shown(before, objective)}
    terms |= {objective.kl_form.name: "kl"} if "kl" in objective.weights else {}
    assert len(terms) == len(before.values) - 1 - (case.adversary is not None)  # + log-variance
    for log_name, name in terms.items():
        other = copy.copy(objective)
        other.weights = objective.weights | {name: 2 * objective.weights[name]}
        assert_doubled(before, case.loss(other, out), log_name)
    if case.adversary is not None:
        other = copy.copy(objective)
        scale = 2 * objective.adversarial.scale
        other.adversarial = replace(objective.adversarial, scale=scale)
        assert_doubled(before, case.loss(other, out), "discriminator/adversarial")


def shown(loss: Loss, objective: Objective) -> set[str]:
    """Terms, but the KL, that have a weight of their own."""
    return {name for name in objective.weights if name != "kl" and f"loss/{name}" in loss.values}


def assert_doubled(before: Loss, after: Loss, *names: str) -> None:
    """The terms ``names`` count twice as much, nothing else is changed."""
    added = [before.weights[name] * before.values[name] for name in names]
    expected = before.total + sum(added)
    torch.testing.assert_close(after.total, expected, **TOLERANCE)
    for name, value in before.values.items():
        torch.testing.assert_close(after.values[name], value, **TOLERANCE)
        factor = 2.0 if name in names else 1.0
        expected = torch.as_tensor(before.weights[name]) * factor
        torch.testing.assert_close(torch.as_tensor(after.weights[name]), expected, **TOLERANCE)


OPTIONS = {
    ("objective", "perceptual_scale"): ["loss/lpips"],
    ("objective", "feature_scale"): ["loss/feature"],
    ("objective", "logit_laplace_scale"): ["loss/logit_laplace"],
    ("objective", "kl_scale"): ["kl"],
    ("discriminator", "disc_scale"): ["discriminator/adversarial"],
    ("quantizer", "commitment_weight"): ["loss/commitment"],
    ("quantizer", "codebook_weight"): ["loss/codebook"],
    ("quantizer", "entropy_weight"): ["loss/sample_entropy", "loss/batch_entropy"],
    ("quantizer", "batch_entropy_gamma"): ["loss/batch_entropy"],
}


def test_a_doubled_option_doubles_its_terms(case: Case) -> None:
    out, objective = case.forward(), case.objective()
    before, tried = case.loss(objective, out), set()
    model: Any = case.config.model
    sections = {
        "objective": case.config.objective,
        "discriminator": case.config.discriminator,
        "quantizer": getattr(model, "quantizer", None),
    }
    for (section, option), terms in OPTIONS.items():
        if not getattr(sections[section], option, 0):
            continue  # an option that the preset does not have, or has at 0
        names = [objective.kl_form.name if name == "kl" else name for name in terms]
        names = [name for name in names if name in before.values]
        tried.update(names)
        config = case.config.model_copy(deep=True)
        changed: Any = {"quantizer": getattr(config.model, "quantizer", None)}.get(
            section, getattr(config, section, None)
        )
        setattr(changed, option, 2 * getattr(changed, option))
        assert_doubled(before, case.loss(case.objective(config), out), *names)
    weighted = {name for name, weight in before.weights.items() if torch.as_tensor(weight) != 0}
    assert weighted - tried <= {"loss/rec", "objective/output_logvar"}


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_pass_has_the_gradient_of_the_total(case: Case, adaptive: bool) -> None:
    wrapper, objective = case.wrapper, case.objective(adaptive=adaptive)
    wrapper.zero_grad()
    case.loss(objective, case.forward()).total.backward()
    plain = gradients(wrapper)

    wrapper.zero_grad()
    log = backward_model(
        case.images,
        case.forward(),
        objective=objective,
        update=UPDATE,
        last_layer=wrapper.last_layer,
        adversary=case.adversary_of(objective),
    )
    found = gradients(wrapper)

    assert found.keys() == plain.keys()
    largest = max(grad.abs().max().item() for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-9 * largest, msg=name)
    assert log.keys() == case.loss(objective, case.forward()).log.keys()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert found
    return found
