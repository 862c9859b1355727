"""Faults to put into the trainer, one at a time, and the one check of `latentvae preflight` that
must find each.

A fault takes the place of a function, a method or an entry of a table for as long as it is applied
(see tests/proofs/injection.py). `fault` says which fault of other trainers it stands for, by the
tables of docs/faults.md: A for train_autoencoderkl.py, V for train_vqgan.py, T for
taming-transformers and what came of it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latentvae.bottlenecks import Quantized
from latentvae.bottlenecks.vector import VectorQuantizer
from latentvae.engine.task import Learner
from latentvae.engine.training import Training
from latentvae.engine.updates import Updates
from latentvae.engine.weight_average import WeightAverage
from latentvae.losses.adversarial import GAN_LOSSES, Adversary, GANLoss
from latentvae.losses.perceptual import PerceptualLoss
from latentvae.models import TrainingWrapper
from latentvae.models.family import Family
from latentvae.outputs import AutoencoderOutput
from latentvae.tasks.autoencoder.update_step import DISCRIMINATOR, MODEL
from tests.proofs.injection import Inject, around, both, built, entry, instead, result

# Seams, each in the module whose code calls it.
STEP = "latentvae.engine.updates:Updates.step"
RATE = "latentvae.engine.updates:learning_rate"
AVERAGE_STEP = "latentvae.engine.weight_average:WeightAverage.step"
PREPARE = "latentvae.engine.task:prepare"
LEARNER = "latentvae.engine.task:Learner.with_optimizer"
SNAPSHOT = "latentvae.engine.checkpoint_content:"
RESTORE = "latentvae.proofs.preflight.saving:restore"
AUTOENCODER = "latentvae.tasks.autoencoder."
TASK = AUTOENCODER + "task:AutoencoderTask."
BACKWARD_MODEL = AUTOENCODER + "update_step:backward_model"
BACKWARD_DISCRIMINATOR = AUTOENCODER + "update_step:backward_discriminator"
OBJECTIVE = "latentvae.losses.objective."
TERMS = OBJECTIVE + "objective:Objective."
RAMP = OBJECTIVE + "adversarial_weight:AdversarialWeight.factor"
PERCEPTUAL = "latentvae.losses.perceptual:PerceptualLoss."
WRAPPER = "latentvae.models.posterior:KLTrainingWrapper."
VECTOR = "latentvae.bottlenecks.vector:VectorQuantizer."

SHAPE = {"block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4}
CODES = {"type": "vq", "num_codes": 16, "code_channels": 4, "kmeans_iterations": 2}
LEARNED_CODES = {"architecture": "vq", "quantizer": CODES, **SHAPE}
AVERAGED_CODES = {**LEARNED_CODES, "quantizer": {**CODES, "codebook_decay": 0.5}}


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One fault.

    Attributes:
        name: in words.
        fault: which of the known faults it stands for, such as "A1"; "" for one of our own.
        inject: puts the fault in, until the patch is undone.
        fails: the checks that must fail, one wherever that can be; `why` says why there are two.
        config: options of the run that shows it.
        model: section of the model, where another architecture is needed.
        processes: that show it.
        fine_tuned: a base with a frozen encoder is needed.
    """

    name: str
    fault: str
    inject: Inject
    fails: tuple[str, ...]
    why: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] | None = None
    processes: int = 1
    fine_tuned: bool = False


def seam(name: str, fault: str, inject: Inject, *fails: str, **more: Any) -> Mutation:
    """A mutation of one seam."""
    return Mutation(name=name, fault=fault, inject=inject, fails=fails, **more)


# Losses


def _with_random_weights(lpips: Any, *_: Any, **__: Any) -> Any:
    for value in lpips.net.buffers():
        value.normal_(0, 0.05)
    return lpips


def _trainable_lpips(loss: PerceptualLoss) -> None:
    for value in loss.lpips.buffers():
        value.requires_grad_()


def _frozen_by_an_attribute(family: Family, net: Any) -> None:
    for part in family.latent_side(net):
        part.requires_grad = False  # type: ignore[assignment]


def _summed_over_pixels(
    terms: dict[str, Tensor], objective: Any, images: Tensor, *_: Any, **__: Any
) -> dict[str, Tensor]:
    return terms | {"rec": terms["rec"] * images[0].numel()}


def _divided_by_latent_elements(
    latent: Callable[..., Any], objective: Any, images: Tensor, out: AutoencoderOutput, **more: Any
) -> Any:
    return latent(objective, out.latents[0].z, out, **more)


def _without_gradient_of_kl(out: AutoencoderOutput, *_: Any, **__: Any) -> AutoencoderOutput:
    (latent,) = out.latents
    assert latent.kl is not None and latent.kl_per_channel is not None
    cut = replace(latent, kl=latent.kl.detach(), kl_per_channel=latent.kl_per_channel.detach())
    return replace(out, latents=(cut,))


def _without_straight_through(quantizer: VectorQuantizer) -> None:
    quantizer.gradient = lambda vectors, quantised: quantised.detach()


def _swapped_losses(quantized: Quantized, *_: Any, **__: Any) -> Quantized:
    losses = quantized.losses
    swapped = {"commitment": losses["codebook"], "codebook": losses["commitment"]}
    return quantized._replace(losses=losses | swapped)


# The two players


def _sent_back_at_once(value: Tensor, *_: Any, **__: Any) -> Tensor:
    """The generator's loss leaves gradients on the discriminator."""
    value.backward(retain_graph=True)
    return value


def _not_detached() -> Inject:
    """The discriminator's loss goes back through the reconstruction into the model."""
    kept: list[AutoencoderOutput] = []

    def model(backward: Any, images: Tensor, out: AutoencoderOutput, **more: Any) -> Any:
        kept[:] = [out]
        return backward(images, out, **more)

    def discriminator(
        images: Tensor, *_: Any, adversary: Adversary, divide_by: int, **__: Any
    ) -> Any:
        seen = torch.cat([images, kept[0].recon])
        real, fake = adversary.prepared(seen).float().chunk(2)
        loss = adversary.loss.discriminator(real, fake)
        (loss / divide_by).backward()
        means = {"loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return {f"discriminator/{name}": value.detach() for name, value in means.items()}

    def keep_graph(backward: Any, tensors: Any, grads: Any = None, *_: Any, **__: Any) -> None:
        backward(tensors, grads, retain_graph=True)

    return both(
        around(BACKWARD_MODEL, model),
        instead(BACKWARD_DISCRIMINATOR, discriminator),
        around("torch.autograd:backward", keep_graph),
    )


def _without_discriminator(
    step: Callable[..., None], updates: Updates, learning: Sequence[str]
) -> None:
    step(updates, [name for name in learning if name != DISCRIMINATOR])


def _negated(name: str) -> Inject:
    """The discriminator's side of a GAN loss takes images for reconstructions."""
    right = GAN_LOSSES[name]
    wrong = GANLoss(lambda real, fake: right.discriminator(-real, -fake), right.generator)
    return entry(GAN_LOSSES, name, wrong)


# What learns


def _of_the_model(change: Callable[[Learner], None]) -> Inject:
    """The model's learner goes through `change` when it is built."""

    def changed(learner: Learner, *_: Any, **__: Any) -> Learner:
        if learner.averaged is not None:
            change(learner)
        return learner

    return result(LEARNER, changed)


def _round_after_each_step(learner: Learner) -> None:
    def rounded(*_: Any) -> None:
        for parameter in learner.module.parameters():
            parameter.data.copy_(parameter.data.bfloat16())

    learner.optimizer.register_step_post_hook(rounded)


def _of_the_network_alone(learner: Learner) -> None:
    assert learner.averaged is not None
    of_network = {id(parameter) for parameter in learner.averaged.parameters()}
    for group in learner.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in of_network]


def _keep_gradients(learner: Learner) -> None:
    learner.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]


def _unprepared(*, model: bool) -> Inject:
    """The model, or the discriminator, is called as it is."""

    def fault(
        prepare: Callable[..., nn.Module], accelerator: Any, module: nn.Module, **options: Any
    ) -> nn.Module:
        if isinstance(module, TrainingWrapper) == model:
            return module.to(accelerator.device)
        return prepare(accelerator, module, **options)

    return around(PREPARE, fault)


def _in_bf16(training: Training) -> None:
    training.averaged(MODEL).to(torch.bfloat16)


def _average_in_bf16(average: WeightAverage) -> None:
    average.shadow_params = [shadow.bfloat16() for shadow in average.shadow_params]


def _twice_with_the_discriminator(
    step: Callable[..., None], updates: Updates, learning: Sequence[str]
) -> None:
    step(updates, learning)
    if DISCRIMINATOR in learning:
        for name, average in updates.training.averages.items():
            average.step(updates.training.averaged(name).parameters())


def _with_the_discriminator_alone(
    step: Callable[..., None], updates: Updates, learning: Sequence[str]
) -> None:
    averages = updates.training.averages
    updates.training.averages = averages if DISCRIMINATOR in learning else {}
    step(updates, learning)
    updates.training.averages = averages


def _rate_of(change: Callable[..., dict[str, Any]]) -> Inject:
    """The schedule is evaluated at another update, or for another peak."""

    def fault(
        rate: Callable[..., float], update: int, *, peak: float, config: Any, pause: range
    ) -> float:
        changed = {"update": update, "peak": peak, "pause": pause}
        changed |= change(update, peak, config.run)
        return rate(changed.pop("update"), config=config, **changed)

    return around(RATE, fault)


def _nothing(_: pytest.MonkeyPatch) -> None:
    """The options alone are the fault."""


# Schedules that reach past the six updates of the run.
SCHEDULES = [
    seam(
        "a model that waits for the discriminator until the run ends",
        "",
        instead("latentvae.proofs.preflight.preflight:check_model_learns", lambda config: None),
        "model-learns",
        "rate-in-run",
        "discriminator-in-run",
        why="without an update of the model nothing of its schedule happens",
        config={"disc_start": 0, "disc_warmup_steps": 6},
    ),
    seam(
        "a warm-up of the learning rate that is longer than the run",
        "",
        _nothing,
        "rate-in-run",
        config={"lr_warmup_steps": 9},
    ),
    seam(
        "a ramp of the adversarial weight that is longer than the run",
        "",
        _nothing,
        "discriminator-in-run",
        config={"disc_ramp_steps": 9},
    ),
    seam(
        "a warm-up of the KL that is longer than the run",
        "",
        _nothing,
        "kl-in-run",
        config={"kl_warmup_steps": 9},
    ),
    seam(
        "a warm-up of the learning rate that passes while the model stands still",
        "",
        _rate_of(lambda update, peak, run: {"pause": range(0)}),
        "learning-rate",
        config={"disc_start": 0, "disc_warmup_steps": 2},
    ),
]


# Checkpoints


def _all_but_the_discriminator(load: Callable[..., None], module: nn.Module, weights: Any) -> None:
    if isinstance(module, TrainingWrapper):
        load(module, weights)


def _all_but_the_average(restore: Callable[..., Any], training: Training, snapshot: Any) -> Any:
    averages, training.averages = training.averages, {}
    window = restore(training, snapshot)
    training.averages = averages
    return window


MUTATIONS = [
    *SCHEDULES,
    # Losses
    seam(
        "LPIPS without gradient",
        "A1",
        result(PERCEPTUAL + "forward", lambda distance, *_: distance.detach()),
        "lpips-gradient",
    ),
    seam(
        "LPIPS on random weights",
        "",
        result(AUTOENCODER + "build_parts:load_lpips", _with_random_weights),
        "lpips-weights",
    ),
    seam(
        "LPIPS in train mode, with whatever dropout it has",
        "T1",
        instead(PERCEPTUAL + "train", nn.Module.train),
        "frozen",
    ),
    seam("LPIPS takes gradients", "V6", built(PerceptualLoss, _trainable_lpips), "frozen"),
    seam(
        "an encoder that is frozen by an attribute of the module",
        "V6",
        instead("latentvae.models.family:Family.freeze_encoder", _frozen_by_an_attribute),
        "frozen",
        fine_tuned=True,
    ),
    seam(
        "a reconstruction loss summed over pixels",
        "A10",
        result(TERMS + "reconstruction_terms", _summed_over_pixels),
        "reconstruction",
    ),
    seam(
        "a reconstruction loss that holds LPIPS",
        "A10",
        result(
            TERMS + "reconstruction_terms",
            lambda terms, *_, **__: terms | {"rec": terms["rec"] + terms["lpips"]},
        ),
        "reconstruction",
    ),
    seam(
        "a KL averaged over latent elements",
        "A10",
        around(TERMS + "latent", _divided_by_latent_elements),
        "kl",
    ),
    seam(
        "a KL summed over the batch",
        "A10",
        result(OBJECTIVE + "kl_forms:PlainKL.__call__", lambda kl, *_, **__: len(kl) * kl),
        "kl",
    ),
    seam(
        "a KL of detached moments",
        "",
        result(WRAPPER + "forward", _without_gradient_of_kl),
        "kl-gradient",
    ),
    seam(
        "a latent without a gradient to the encoder",
        "",
        around(
            WRAPPER + "decode", lambda decode, self, z, images: decode(self, z.detach(), images)
        ),
        "latent-gradient",
    ),
    seam(
        "a straight-through estimator that is lost",
        "",
        built(VectorQuantizer, _without_straight_through),
        "latent-gradient",
        model=LEARNED_CODES,
    ),
    seam(
        "beta on the wrong term",
        "V11",
        result(VECTOR + "forward", _swapped_losses),
        "commitment",
        "codebook",
        why="each of the two terms has the other's place",
        model=LEARNED_CODES,
    ),
    # The two players
    seam(
        "the discriminator takes gradients from the model's part",
        "A2",
        result(TERMS + "adversarial_value", _sent_back_at_once),
        "discriminator-untouched",
    ),
    seam(
        "a reconstruction that is not detached for the discriminator",
        "A2",
        _not_detached(),
        "model-untouched",
    ),
    seam(
        "a discriminator that is never updated",
        "A9",
        around(STEP, _without_discriminator),
        "discriminator-start",
    ),
    seam(
        "a discriminator that is computed and trained from the first update",
        "A9",
        result(
            RAMP,
            lambda factor, weight, *_, **__: 0.0 if factor is None and weight.scale else factor,
        ),
        "discriminator-start",
    ),
    seam(
        "an untrained discriminator at full weight",
        "T2",
        result(RAMP, lambda factor, weight, *_, **__: None if factor is None else weight.scale),
        "discriminator-ramp",
    ),
    seam(
        "one counter for the updates of model and discriminator",
        "T7",
        around(TASK + "adversary", lambda adversary, task, update: adversary(task, 2 * update)),
        "discriminator-start",
        "discriminator-ramp",
        why="the discriminator's start and the growth of its weight are counted by the same",
    ),
    seam(
        "a sigmoid before the hinge",
        "V8",
        result(
            "latentvae.losses.discriminators:PatchGAN.forward", lambda logits, *_: logits.sigmoid()
        ),
        "discriminator-separates",
    ),
    seam(
        "the wrong sign in the discriminator's loss",
        "",
        _negated("hinge"),
        "discriminator-separates",
    ),
    seam(
        "swapped arguments of the binary cross-entropy",
        "T8",
        _negated("non_saturating"),
        "discriminator-separates",
        config={"disc_loss": "non_saturating"},
    ),
    seam(
        "an adaptive weight without a cap",
        "T3",
        around(
            OBJECTIVE + "objective:adaptive_weight",
            lambda weight, *args, cap, **more: weight(*args, cap=math.inf, **more),
        ),
        "adaptive-weight",
        config={"disc_weight_cap": 0.001},
    ),
    # What learns
    seam(
        "weights in bf16",
        "A4",
        both(
            built(Training, _in_bf16),
            # diffusers' average takes weights of any precision; ours refuses these.
            instead(AVERAGE_STEP, EMAModel.step),
        ),
        "weights",
        "validation",
        why="outside of autocast such weights refuse float32 images",
        config={"mixed_precision": "bf16"},
    ),
    seam(
        "weights rounded to bf16 after each update",
        "A4",
        _of_the_model(_round_after_each_step),
        "weights",
        config={"learning_rate": 4.5e-06},
    ),
    seam(
        "a model called past autocast",
        "A4",
        _unprepared(model=True),
        "precision",
        config={"mixed_precision": "bf16"},
    ),
    seam(
        "an average in bf16",
        "A5",
        both(built(WeightAverage, _average_in_bf16), instead(AVERAGE_STEP, EMAModel.step)),
        "average",
    ),
    seam(
        "an average that is never stepped",
        "A5",
        instead(AVERAGE_STEP, lambda *_: None),
        "average",
    ),
    seam(
        "an average that steps in the discriminator's turn as well",
        "A5",
        around(STEP, _twice_with_the_discriminator),
        "average",
    ),
    seam(
        "an average that steps in the discriminator's turn alone",
        "V9",
        around(STEP, _with_the_discriminator_alone),
        "average",
    ),
    seam(
        "an output log-variance that no optimiser has",
        "T8",
        _of_the_model(_of_the_network_alone),
        "optimizer",
    ),
    seam(
        "a gradient that is not a number",
        "",
        result(TERMS + "nll", lambda nll, *_: math.nan * nll),
        "updates",
    ),
    # Counting
    seam(
        "a schedule that counts micro-steps",
        "A9",
        _rate_of(lambda update, peak, run: {"update": update * run.gradient_accumulation_steps}),
        "learning-rate",
    ),
    seam(
        "a schedule that counts the updates of model and discriminator",
        "A9",
        _rate_of(lambda update, peak, run: {"update": 2 * update}),
        "learning-rate",
    ),
    seam(
        "a learning rate multiplied by the batch",
        "T7",
        _rate_of(
            lambda update, peak, run: {
                "peak": peak * run.train_batch_size * run.gradient_accumulation_steps
            }
        ),
        "learning-rate",
    ),
    seam(
        "micro-steps that are added up and not averaged",
        "V3",
        around(
            BACKWARD_MODEL,
            lambda backward, *args, divide_by, **more: backward(*args, **more),
        ),
        "accumulation",
    ),
    # Images, validation, checkpoints
    seam(
        "validation images in [0, 1]",
        "V10",
        result(
            "latentvae.data.transforms:EvalTransform.__call__", lambda image, *_: image / 2 + 0.5
        ),
        "image-range",
    ),
    seam(
        "a validation in another precision than the model",
        "A7",
        result(
            AUTOENCODER + "validate:validation_batches",
            lambda batches, *_, **__: ((images.bfloat16(), rest) for images, rest in batches),
        ),
        "validation",
    ),
    seam(
        "a resume that raises",
        "A6",
        around(SNAPSHOT + "load_weights", lambda load, module, weights: load(module, str(weights))),
        "checkpoint",
    ),
    seam(
        "an optimiser that is not restored",
        "A6",
        instead(SNAPSHOT + "load_optimizer_tensors", lambda *_: None),
        "checkpoint",
    ),
    seam(
        "a discriminator that is not restored",
        "A6",
        around(SNAPSHOT + "load_weights", _all_but_the_discriminator),
        "checkpoint",
    ),
    seam(
        "an average that is not restored",
        "A6",
        around(RESTORE, _all_but_the_average),
        "checkpoint",
    ),
    seam(
        "a LeCam average that is not restored",
        "A6",
        instead("latentvae.losses.adversarial:LeCam.load_state_dict", lambda *_: None),
        "checkpoint",
        config={"disc_lecam_weight": 0.1},
    ),
    seam(
        "images that start over after a resume",
        "A6",
        around(TASK + "batches", lambda batches, task, start_step: batches(task, start_step=0)),
        "checkpoint",
    ),
    seam(
        "gradients that are left over",
        "A2",
        _of_the_model(_keep_gradients),
        "cleared",
    ),
    # Two processes
    seam(
        "a model called past DDP",
        "A3",
        _unprepared(model=True),
        "ranks-equal",
        processes=2,
    ),
    seam(
        "a discriminator called past DDP",
        "T8",
        _unprepared(model=False),
        "ranks-equal",
        processes=2,
    ),
    seam(
        "a codebook whose statistics are not reduced",
        "T4",
        instead(AUTOENCODER + "codebook:all_reduce_sum", lambda value: value),
        "ranks-equal",
        model=AVERAGED_CODES,
        processes=2,
    ),
    seam(
        "the same images in each process",
        "V2",
        instead(AUTOENCODER + "images:rank", lambda: 0),
        "ranks-batches",
        processes=2,
    ),
]

# Faults that no look at a few updates can find, or that cannot be: see docs/faults.md for what
# keeps each out.
ELSEWHERE = {
    "A8": "of the upload, after the run",
    "A11": "of options and the export, which are checked when they are made",
    "V1": "of the log's rows over epochs: tests/engine/test_log.py",
    "V4": "cannot occur: there is one way to state the length of a run",
    "V5": "of options that do nothing: tests/config/test_no_option_is_unread.py",
    "V7": "of LPIPS itself: tests/losses/test_perceptual.py",
    "V12": "cannot occur: one loop has it all",
    "T5": "cannot occur: no discriminator has batch statistics, LPIPS has no state to save",
    "T6": "of packaging: tests/test_layers.py",
}


@contextlib.contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The fault is there inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        mutation.inject(patch)
        yield
