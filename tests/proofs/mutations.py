"""Faults to put into the trainer, one at a time, and the one check of `latentvae preflight` that
must find each.

A fault is an edit of a function's source: the text that goes and the text that comes. Where the
text is not there any more the mutation fails, so that the list keeps up with the code. `fault` says
which fault of other trainers it stands for, by the tables of docs/faults.md: A for
train_autoencoderkl.py, V for train_vqgan.py, T for taming-transformers and what came of it.
"""

import contextlib
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

import pytest

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
        edits: (module:function, text that goes, text that comes).
        fails: the checks that must fail, one wherever that can be; `why` says why there are two.
        config: options of the run that shows it.
        model: section of the model, where another architecture is needed.
        processes: that show it.
        fine_tuned: a base with a frozen encoder is needed.
    """

    name: str
    fault: str
    edits: tuple[tuple[str, str, str], ...]
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


MUTATIONS = [
    # Losses
    one(
        "LPIPS without gradient",
        "A1",
        "latentvae.losses.perceptual:PerceptualLoss.forward",
        "return self.distance(targets, self.features(recon))",
        "return self.distance(targets, self.features(recon)).detach()",
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
    one(
        "LPIPS in train mode, with whatever dropout it has",
        "T1",
        "latentvae.losses.perceptual:PerceptualLoss.train",
        "return super().train(False)",
        "return nn.Module.train(self, mode)",
        "frozen",
    ),
    one(
        "LPIPS takes gradients",
        "V6",
        "latentvae.losses.perceptual:_freeze",
        "value.detach().clone()",
        "value.detach().clone().requires_grad_()",
        "frozen",
    ),
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
    one(
        "a KL of detached moments",
        "",
        "latentvae.models.conv.kl:KLTrainingWrapper.forward",
        "kl=found.kl.sum(dim=1)",
        "kl=found.kl.sum(dim=1).detach()",
        "kl-gradient",
    ),
    one(
        "a latent without a gradient to the encoder",
        "",
        "latentvae.models.conv.kl:KLTrainingWrapper.forward",
        "self.decode(latent.z, images)",
        "self.decode(latent.z.detach(), images)",
        "latent-gradient",
    ),
    one(
        "a straight-through estimator that is lost",
        "",
        "latentvae.bottlenecks.quantized:straight_through",
        "quantised.detach() + (vectors - vectors.detach())",
        "quantised.detach()",
        "latent-gradient",
        model=LEARNED_CODES,
    ),
    Mutation(
        name="beta on the wrong term",
        fault="V11",
        edits=(
            (VECTOR + "_losses", "F.mse_loss(vectors, quantised.detach())", "COMMITMENT"),
            (VECTOR + "_losses", "F.mse_loss(quantised, vectors.detach())", "CODEBOOK"),
            (VECTOR + "_losses", "COMMITMENT", "F.mse_loss(quantised, vectors.detach())"),
            (VECTOR + "_losses", "CODEBOOK", "F.mse_loss(vectors, quantised.detach())"),
        ),
        fails=("commitment", "codebook"),
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
    one(
        "a sigmoid before the hinge",
        "V8",
        "latentvae.losses.discriminators:PatchGAN.forward",
        "return self.layers(images)",
        "return self.layers(images).sigmoid()",
        "critic-separates",
    ),
    Mutation(
        name="the wrong sign in the critic's loss",
        fault="",
        edits=(
            (ADVERSARIAL + "hinge_critic_loss", "1.0 - real_logits", "1.0 + real_logits"),
            (ADVERSARIAL + "hinge_critic_loss", "1.0 + fake_logits", "1.0 - fake_logits"),
        ),
        fails=("critic-separates",),
    ),
    Mutation(
        name="swapped arguments of the binary cross-entropy",
        fault="T8",
        edits=(
            (
                ADVERSARIAL + "non_saturating_critic_loss",
                "softplus(-real_logits.float()).mean() + F.softplus(fake_logits",
                "softplus(real_logits.float()).mean() + F.softplus(-fake_logits",
            ),
        ),
        fails=("critic-separates",),
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
    one(
        "validation images in [0, 1]",
        "V10",
        "latentvae.data.transforms:EvalTransform.__call__",
        "box=Window().box(image.size, size)))",
        "box=Window().box(image.size, size))) / 2 + 0.5",
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
    """The fault is in the code inside the block."""
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
