"""Define the task "distill": train a small autoencoder (student) from a given one (teacher).

export = engine.loop.train(DistillTask(config))
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from latentvae.data import BadImages, Batch, ImageStream
from latentvae.distributed import barrier, is_main
from latentvae.engine.processes import DTYPES
from latentvae.engine.task import Learner, State
from latentvae.errors import UserError
from latentvae.losses.distillation import DistillationLoss, noisy
from latentvae.losses.perceptual import MIN_SIZE, PerceptualLoss, load_lpips
from latentvae.models.students import inner_matrices
from latentvae.tasks.autoencoder.images import eval_transform
from latentvae.tasks.autoencoder.reach import few_validation_images
from latentvae.tasks.autoencoder.refusals import check_source
from latentvae.tasks.autoencoder.state import Named
from latentvae.tasks.distill.config import DistillConfig
from latentvae.tasks.distill.distill_export import export_student, is_whole
from latentvae.tasks.distill.teaching import (
    UNTRAINED,
    Pair,
    TrainedStudent,
    build_student,
    open_teacher,
    untrained_part,
)
from latentvae.tasks.distill.validate import save_grid, validate
from latentvae.tasks.image_task import ImageTask


class DistillState(State):
    """State of a run: name of each unreadable file so far, and why it cannot be read."""

    bad_images: list[Named] = Field(default_factory=list)


class DistillTask(ImageTask):
    """Train a student from a teacher.

    Attributes:
        teacher: the opened teacher, frozen.
        kind: the kind of student that fits the teacher, see `StudentKind`.
        net: the student, not wrapped by DDP.
        pair: the teacher and the student, which encode and decode without gradients.
        objective: the student's loss.
        metric: LPIPS for the validation, in float32.
    """

    config: DistillConfig
    config_class = DistillConfig
    state_class = DistillState
    title, shown = "Small autoencoder", ("loss/total",)
    launch = ("-m", "latentvae.cli.train_tiny")

    # before the run

    def check(self) -> None:
        check_source(self.config)
        least = MIN_SIZE[self.config.objective.lpips_net]
        if min(map(min, self.config.train_sizes)) < least:
            raise UserError(
                f"resolution {self.config.data.resolution} is too small: "
                f"LPIPS-{self.config.objective.lpips_net} needs at least {least} px a side."
            )

    def open(self) -> None:
        self.teacher, self.kind = open_teacher(self.config)
        # The weights on the disk may change later, so the hash is taken now.
        self.teacher_sha256 = self.teacher.info()["weights_sha256"]
        self.open_images()

    def build(self, accelerator: Accelerator, *, resumed: bool) -> None:
        # student and teacher
        options, part = self.config.objective, self.config.student.student
        self.net = build_student(self.config.student, self.teacher.net, self.kind)
        self.teacher.net.to(accelerator.device)
        self.pair = Pair(self.teacher.net, self.net, part)
        self.begin_images()

        # losses
        lpips = load_lpips(
            options.lpips_net, weights=options.lpips_weights, allow_download=options.download_lpips
        )
        self.metric = PerceptualLoss(lpips).to(accelerator.device)
        self.autocast_dtype = DTYPES[accelerator.mixed_precision]
        self.objective = DistillationLoss(
            rec_loss=options.rec_loss,
            perceptual=self.metric,
            perceptual_scale=options.perceptual_scale,
            teacher_share=options.teacher_share,
            latent_scale=options.latent_scale,
            autocast_dtype=self.autocast_dtype,
        )

        # learner
        learner = Learner.with_optimizer(
            TrainedStudent(self.net, part),
            accelerator,
            self.config.optimizer,
            averaged=self.net,
            matrices=list(inner_matrices(self.net)),
        )
        self.learners = {"model": learner}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"teacher": self.teacher_sha256[:16]}

    def plan(self) -> dict[str, str]:
        shape = f"f = {self.teacher.f}, d = {self.teacher.latent_channels}"
        start = self.config.student.pretrained_model_name_or_path
        images = self.train_images
        known = "a stream" if isinstance(images, ImageStream) else f"{len(images):,}"
        size = " x ".join(map(str, dict.fromkeys(self.config.data.size)))
        return {
            "teacher": f"{type(self.teacher.net).__name__} {self.teacher.name}, {shape}",
            "student": (
                f"{type(self.net).__name__}, {self._learning_millions():.2f} M parameters learn "
                f"({self.config.student.student}){f', from {start}' if start else ''}"
            ),
            "images": (
                f"{known} to train, {len(self.validation_images):,} to validate, at {size} px"
            ),
            "objective": self._formula(),
        }

    def _learning_millions(self) -> float:
        return sum(p.numel() for p in self.net.parameters() if p.requires_grad) / 1e6

    def _formula(self) -> str:
        options, part, terms = self.config.objective, self.config.student.student, []
        if part != "encoder":
            distance = f"({options.rec_loss} + {options.perceptual_scale:g} LPIPS)"
            shares = {"images": 1 - options.teacher_share, "teacher": options.teacher_share}
            terms += [f"{share:g} {distance} to {n}" for n, share in shares.items() if share]
        if part != "decoder":
            terms.append(f"{options.latent_scale:g} l2 of latents")
        noise = f", noise up to {options.latent_noise:g}" if options.latent_noise else ""
        return " + ".join(terms) + noise

    def warnings(self) -> list[str]:
        found = few_validation_images(
            self.config,
            count=len(self.validation_images),
            training=None if isinstance(self.train_images, ImageStream) else len(self.train_images),
        )
        if (part := untrained_part(self.config.student, self.kind)) is not None:
            found.append(
                f"the export's {part} will not be trained and {UNTRAINED[part]}. Use the teacher's "
                f"{part}, or give --student both."
            )
        return found

    # an update

    def micro_step(self, batch: Batch, update: int) -> dict[str, Tensor]:
        self.saw(batch)
        images, options = batch.on(self.device), self.config.objective
        taught = self.pair.teach(
            images,
            decode=options.teacher_share > 0 and self.pair.part != "encoder",
            autocast_dtype=self.autocast_dtype,
        )
        recon, z = self.learners["model"].prepared(images, noisy(taught.z, options.latent_noise))
        loss, logged = self.objective(taught, recon, z)
        (loss / self.config.run.gradient_accumulation_steps).backward()
        return logged | {"loss/total": loss.detach()}

    # between updates

    def row(self, update: int, means: Mapping[str, float]) -> dict[str, float]:
        self.name_bad_images()
        return {"data/bad_images": len(self.bad)}

    def validate(self, update: int) -> dict[str, float]:
        bad = BadImages()
        values = validate(
            self.pair,
            self.validation_images,
            transform=eval_transform(self.config),
            perceptual=self.metric,
            batch_size=self.config.run.eval_batch_size,
            limit=self.config.data.max_validation_images,
            device=self.device,
            bad=bad,
        )
        self.name_bad_validation_images(bad)
        return values

    def validation_line(self, values: Mapping[str, float]) -> str:
        latent = values.get("validation/latent_error")
        return (
            f"PSNR {values['validation/psnr']:.2f} dB (teacher "
            f"{values['validation/psnr_teacher']:.2f}), LPIPS {values['validation/lpips']:.3f} "
            f"(teacher {values['validation/lpips_teacher']:.3f}), "
            f"{values['validation/psnr_to_teacher']:.2f} dB to the teacher"
            + (f", latent error {latent:.3f}" if latent is not None else "")
            + f", on {values['validation/images']:,} unseen images"
        )

    def save_samples(self, path: Path) -> bool:
        save_grid(
            self.pair,
            self.validation_images,
            path,
            transform=eval_transform(self.config),
            count=self.config.run.num_sample_images,
            device=self.device,
        )
        return True

    # checkpoints

    def state(self) -> DistillState:
        self.name_bad_images()
        return DistillState(bad_images=[list(entry) for entry in self.bad.reasons.items()])

    def load_state(self, state: DistillState, *, update: int) -> None:
        self.bad.update((name, reason) for name, reason in state.bad_images)

    # the end

    def export(self, out: Path, *, update: int, folder: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if is_main():
            values = export_student(self, out, update=update, folder=folder)
        barrier()  # no process may end while the first one still writes
        return values

    def has_export(self, out: Path) -> bool:
        return is_whole(out)

    def done(self, out: Path) -> str:
        kind = self.kind.network.__name__
        return f"done: {out} loads with diffusers.{kind}.from_pretrained('{out}')"

    # proofs

    @classmethod
    def shortened(cls, config: DistillConfig, *, updates: int) -> DistillConfig:
        few = {"max_validation_images": min(config.data.max_validation_images, 8)}
        return config.with_changes({"data": few, "run": {"num_sample_images": 1}})
