"""Faults to put into the trainer, one at a time, and the one check of `latentvae preflight` that
must find each.

A fault takes the place of a function, a method or an entry of a table for as long as it is applied
(see tests/proofs/injection.py). `fault` says which fault of other trainers it stands for, by the
tables of docs/faults.md: A for train_autoencoderkl.py, V for train_vqgan.py, T for
taming-transformers and what came of it.
"""

import contextlib
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

import pytest
from torch import nn

from latentvae.bottlenecks import VectorQuantizer
from latentvae.bottlenecks.quantized import Quantized
from latentvae.losses.adversarial import GAN_LOSSES, GANLoss
from latentvae.losses.perceptual import PerceptualLoss
from latentvae.outputs import AutoencoderOutput
from tests.proofs.injection import Inject, around, built, entry, instead, result

TRAINING = "latentvae.tasks.autoencoder."
STEP = TRAINING + "updates:Updates.step"
MAKE = TRAINING + "updates:Updates.make"
MICRO_STEP = TRAINING + "updates:Updates.micro_step"
RATES = TRAINING + "updates:Updates.set_learning_rates"
BUILD = TRAINING + "run:build_run"
RESTORE = TRAINING + "state:restore"
BACKWARD_MODEL = TRAINING + "update:backward_model"
BACKWARD_CRITIC = TRAINING + "update:backward_critic"
TERMS = "latentvae.losses.objective:Objective."
ADVERSARIAL = "latentvae.losses.adversarial:"
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
        edits: (module:function, text that goes, text that comes); while the trainer is rebuilt.
        fails: the checks that must fail, one wherever that can be; `why` says why there are two.
        config: options of the run that shows it.
        model: section of the model, where another architecture is needed.
        processes: that show it.
        fine_tuned: a base with a frozen encoder is needed.
    """

    name: str
    fault: str
    edits: tuple[tuple[str, str, str], ...] = ()
    inject: Inject | None = None
    fails: tuple[str, ...]
    why: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] | None = None
    processes: int = 1
    fine_tuned: bool = False


def one(
    name: str, fault: str, target: str, old: str, new: str, fails: str, **more: Any
) -> Mutation:
    """A mutation of one edit that fails one check."""
    return Mutation(name=name, fault=fault, edits=((target, old, new),), fails=(fails,), **more)


def seam(name: str, fault: str, inject: Inject, *fails: str, **more: Any) -> Mutation:
    """A mutation of one seam."""
    return Mutation(name=name, fault=fault, inject=inject, fails=fails, **more)


def _swapped_losses(quantized: Quantized, *_: Any, **__: Any) -> Quantized:
    losses = quantized.losses
    swapped = {"commitment": losses["codebook"], "codebook": losses["commitment"]}
    return quantized._replace(losses=losses | swapped)


def _without_gradient_of_kl(out: AutoencoderOutput, *_: Any, **__: Any) -> AutoencoderOutput:
    (latent,) = out.latents
    assert latent.kl is not None and latent.kl_per_channel is not None
    cut = replace(latent, kl=latent.kl.detach(), kl_per_channel=latent.kl_per_channel.detach())
    return replace(out, latents=(cut,))


def _trainable_lpips(loss: PerceptualLoss) -> None:
    for value in loss.lpips.buffers():
        value.requires_grad_()


def _without_straight_through(quantizer: VectorQuantizer) -> None:
    quantizer.gradient = lambda vectors, quantised: quantised.detach()


def _negated(name: str) -> Inject:
    """The critic's side of a GAN loss takes images for reconstructions."""
    right = GAN_LOSSES[name]
    wrong = GANLoss(lambda real, fake: right.critic(-real, -fake), right.generator)
    return entry(GAN_LOSSES, name, wrong)


PERCEPTUAL = "latentvae.losses.perceptual:PerceptualLoss."
WRAPPER = "latentvae.models.conv.kl:KLTrainingWrapper."

MUTATIONS = [
    # Losses
    seam(
        "LPIPS without gradient",
        "A1",
        result(PERCEPTUAL + "forward", lambda distance, *_: distance.detach()),
        "lpips-gradient",
    ),
    one(
        "LPIPS on random weights",
        "",
        "latentvae.losses.perceptual:load_lpips",
        "_check_known_distance(model, path, net)",
        "[value.normal_(0, 0.05) for value in model.net.buffers()]",
        "lpips-weights",
    ),
    seam(
        "LPIPS in train mode, with whatever dropout it has",
        "T1",
        instead(PERCEPTUAL + "train", nn.Module.train),
        "frozen",
    ),
    seam("LPIPS takes gradients", "V6", built(PerceptualLoss, _trainable_lpips), "frozen"),
    one(
        "an encoder that is frozen by an attribute of the module",
        "V6",
        "latentvae.models.family:freeze_encoder",
        "part.requires_grad_(False)",
        "part.requires_grad = False",
        "frozen",
        fine_tuned=True,
    ),
    one(
        "a reconstruction loss summed over pixels",
        "A10",
        TERMS + "reconstruction_terms",
        "pixel.flatten(1).mean(1)",
        "pixel.flatten(1).sum(1)",
        "reconstruction",
    ),
    one(
        "a reconstruction loss that holds LPIPS",
        "A10",
        TERMS + "reconstruction_terms",
        "return terms",
        'return terms | {"rec": terms["rec"] + terms["lpips"]}',
        "reconstruction",
    ),
    one(
        "a KL averaged over latent elements",
        "A10",
        TERMS + "latent_terms",
        "out.kl / images[0].numel()",
        "out.kl / out.latents[0].z[0].numel()",
        "kl",
    ),
    one(
        "a KL summed over the batch",
        "A10",
        TERMS + "latent_loss",
        "term.mean()",
        "term.sum()",
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
    one(
        "the critic takes gradients from the model's part",
        "A2",
        TRAINING + "update:_adversarial",
        "(grad,) = torch.autograd.grad(loss, recon)",
        "loss.backward(); grad = recon.grad.clone(); recon.grad = None",
        "critic-untouched",
    ),
    Mutation(
        name="a reconstruction that is not detached for the critic",
        fault="A2",
        edits=(
            (MICRO_STEP, "run.objective.picture(out.recon.detach())", "out.recon"),
            (BACKWARD_CRITIC, "to_rgb(recon.detach(), background)", "to_rgb(recon, background)"),
            (BACKWARD_MODEL, "for g in logvar_grad)],", "for g in logvar_grad)], None, True,"),
        ),
        fails=("model-untouched",),
    ),
    one(
        "a critic that is never updated",
        "A9",
        STEP,
        "run.critic_optimizer.step()",
        "pass",
        "critic-start",
    ),
    one(
        "a critic that is computed and trained from the first update",
        "A9",
        TRAINING + "schedule:adversarial_factor",
        "if critic.disc_scale == 0 or update < start:\n        return None",
        "if update < start:\n        return 0.0",
        "critic-start",
    ),
    one(
        "an untrained critic at full weight",
        "T2",
        TRAINING + "schedule:adversarial_factor",
        "return critic.disc_scale * min(ramp, 1.0)",
        "return critic.disc_scale",
        "critic-ramp",
    ),
    Mutation(
        name="one counter for the updates of model and critic",
        fault="T7",
        edits=(
            (
                TRAINING + "updates:Updates.adversary",
                "self.progress.update, start=",
                "2 * self.progress.update, start=",
            ),
        ),
        fails=("critic-start", "critic-ramp"),
        why="the critic's start and the growth of its weight are counted by the same",
    ),
    seam(
        "a sigmoid before the hinge",
        "V8",
        result(
            "latentvae.losses.discriminators:PatchGAN.forward", lambda logits, *_: logits.sigmoid()
        ),
        "critic-separates",
    ),
    seam("the wrong sign in the critic's loss", "", _negated("hinge"), "critic-separates"),
    seam(
        "swapped arguments of the binary cross-entropy",
        "T8",
        _negated("non_saturating"),
        "critic-separates",
        config={"disc_loss": "non_saturating"},
    ),
    one(
        "an adaptive weight without a cap",
        "T3",
        ADVERSARIAL + "adaptive_weight",
        ".clamp(max=cap)",
        "",
        "adaptive-weight",
        config={"disc_weight_cap": 1e-3},
    ),
    # What learns
    Mutation(
        name="weights in bf16",
        fault="A4",
        edits=(
            (
                BUILD,
                "ema=_ema(net, config),",
                "ema=(_ema(net, config), net.to(torch.bfloat16))[0],",
            ),
            # diffusers' average, which takes weights of any precision; ours refuses these.
            (TRAINING + "run:_ema", "return WeightAverage(", "return EMAModel("),
        ),
        fails=("weights", "validation"),
        why="outside of autocast such weights refuse float32 images",
        config={"mixed_precision": "bf16"},
    ),
    one(
        "weights rounded to bf16 after each update",
        "A4",
        STEP,
        "run.optimizer.step()\n",
        "run.optimizer.step()\n        [p.data.copy_(p.data.bfloat16()) "
        "for p in run.wrapper.parameters()]\n",
        "weights",
        config={"learning_rate": 4.5e-6},
    ),
    one(
        "a model called past autocast",
        "A4",
        BUILD,
        "prepared = accelerator.prepare(wrapper)",
        "prepared = wrapper",
        "precision",
        config={"mixed_precision": "bf16"},
    ),
    one(
        "an average in bf16",
        "A5",
        TRAINING + "run:_ema",
        "return WeightAverage(list(net.parameters())",
        "return EMAModel([p.detach().bfloat16() for p in net.parameters()]",
        "average",
    ),
    one(
        "an average that is never stepped",
        "A5",
        STEP,
        "run.ema.step(run.net.parameters())",
        "pass",
        "average",
    ),
    one(
        "an average that steps in the critic's turn as well",
        "A5",
        STEP,
        "run.ema.step(run.net.parameters())",
        "run.ema.step(run.net.parameters()); adversary and run.ema.step(run.net.parameters())",
        "average",
    ),
    one(
        "an average that steps in the critic's turn alone",
        "V9",
        STEP,
        "if run.ema is not None and not",
        "if run.ema is not None and adversary and not",
        "average",
    ),
    one(
        "an output log-variance that no optimiser has",
        "T8",
        BUILD,
        "optimizer=_adamw(wrapper,",
        "optimizer=_adamw(net,",
        "optimizer",
    ),
    one(
        "a gradient that is not a number",
        "",
        TERMS + "nll",
        "return error.mean()",
        "return float('nan') * error.mean()",
        "updates",
    ),
    # Counting
    one(
        "a schedule that counts micro-steps",
        "A9",
        RATES,
        "learning_rate(self.progress.update,",
        "learning_rate(self.progress.update * config.run.gradient_accumulation_steps,",
        "learning-rate",
    ),
    one(
        "a schedule that counts the updates of model and critic",
        "A9",
        RATES,
        "learning_rate(self.progress.update,",
        "learning_rate(2 * self.progress.update,",
        "learning-rate",
    ),
    one(
        "a learning rate multiplied by the batch",
        "T7",
        RATES,
        "peak=peak,",
        "peak=peak * self.run.images_per_update,",
        "learning-rate",
    ),
    one(
        "micro-steps that are added up and not averaged",
        "V3",
        BACKWARD_MODEL,
        "[recon_grad / divide_by,",
        "[recon_grad,",
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
    one(
        "a validation in another precision than the model",
        "A7",
        TRAINING + "validate:validate",
        "images = images.to(device)",
        "images = images.bfloat16()",
        "validation",
    ),
    one(
        "a resume that raises",
        "A6",
        RESTORE,
        'load_weights(run.wrapper, tensors["model"])',
        'load_weights(run.wrapper, str(tensors["model"]))',
        "checkpoint",
    ),
    one(
        "an optimiser that is not restored",
        "A6",
        RESTORE,
        'load_optimizer_tensors(run.optimizer, run.wrapper, tensors["optimizer"])',
        "pass",
        "checkpoint",
    ),
    one(
        "a critic that is not restored",
        "A6",
        RESTORE,
        'load_weights(run.critic, tensors["critic"])',
        "pass",
        "checkpoint",
    ),
    one(
        "an average that is not restored",
        "A6",
        RESTORE,
        'shadow.copy_(tensors["ema"][name])',
        "pass",
        "checkpoint",
    ),
    one(
        "a LeCam average that is not restored",
        "A6",
        RESTORE,
        'run.lecam.load_state_dict(tensors["lecam"])',
        "pass",
        "checkpoint",
        config={"disc_lecam_weight": 0.1},
    ),
    one(
        "images that start over after a resume",
        "A6",
        RESTORE,
        'micro_step=values["micro_step"],',
        "",
        "checkpoint",
    ),
    one(
        "gradients that are left over",
        "A2",
        MAKE,
        "run.optimizer.zero_grad()",
        "pass",
        "cleared",
    ),
    # Two processes
    one(
        "a model called past DDP",
        "A3",
        BUILD,
        "prepared = accelerator.prepare(wrapper)",
        "prepared = wrapper",
        "ranks-equal",
        processes=2,
    ),
    one(
        "a critic called past DDP",
        "T8",
        BUILD,
        "critic_prepared = accelerator.prepare(critic) if critic is not None else None",
        "critic_prepared = critic",
        "ranks-equal",
        processes=2,
    ),
    one(
        "a codebook whose statistics are not reduced",
        "T4",
        TRAINING + "codebook:CodebookUpdate.apply",
        "all_reduce_sum(value)",
        "value",
        "ranks-equal",
        model=AVERAGED_CODES,
        processes=2,
    ),
    one(
        "the same images in each process",
        "V2",
        TRAINING + "batches:batches",
        '"rank": rank()',
        '"rank": 0',
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
    "T5": "cannot occur: no critic has batch statistics, LPIPS has no state to save",
    "T6": "of packaging: tests/test_layers.py",
}


@contextlib.contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The fault is there inside the block."""
    if mutation.inject is not None:
        with pytest.MonkeyPatch.context() as patch:
            mutation.inject(patch)
            yield
        return
    sources: dict[str, str] = {}
    for target, old, new in mutation.edits:
        source = sources.get(target) or textwrap.dedent(inspect.getsource(_function(target)))
        assert source.count(old) == 1, f"{mutation.name}: {source.count(old)} times in {target}"
        sources[target] = source.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        for target, source in sources.items():
            _replace(target, source, patch)
        yield


def _replace(target: str, source: str, patch: pytest.MonkeyPatch) -> None:
    """The function's code, so that whoever imported the function has it too; where it knows its
    class (`super`), the class's attribute."""
    function, names = _function(target), dict(vars(import_module(target.split(":")[0])))
    exec(compile(source, f"<{target}, mutated>", "exec"), names)
    new = inspect.unwrap(names[function.__name__])
    if function.__code__.co_freevars == new.__code__.co_freevars:
        code: CodeType = new.__code__
        patch.setattr(function, "__code__", code)
        return
    module, _, path = target.partition(":")
    owner, _, name = path.rpartition(".")
    patch.setattr(functools.reduce(getattr, owner.split("."), import_module(module)), name, new)


def _function(target: str) -> FunctionType:
    module, _, path = target.partition(":")
    found: Any = functools.reduce(getattr, path.split("."), import_module(module))
    return inspect.unwrap(found)
