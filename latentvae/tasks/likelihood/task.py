"""Define the task "likelihood": train a variational autoencoder by a bound of ln p(x).

export = engine.loop.train(LikelihoodTask(config))

Symbols: `B` batch, `N` images, `C` channels, `H W` image size.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from latentvae.data import BadImages, Batch, ImageStream, IndexSampler, some_of
from latentvae.distributed import barrier, gather_objects, is_main, rank, world_size
from latentvae.engine.task import Learner, State
from latentvae.errors import UserError, printable
from latentvae.evaluation.likelihood import bits_per_dim, bounds_of, total_of
from latentvae.losses.variational import VariationalLoss
from latentvae.models.hierarchical.spectral import spectral_penalty
from latentvae.models.matrices import muon_matrices
from latentvae.pictures import save_grid
from latentvae.tasks.autoencoder.images import eval_transform
from latentvae.tasks.autoencoder.reach import few_validation_images
from latentvae.tasks.autoencoder.refusals import check_source
from latentvae.tasks.autoencoder.state import Named
from latentvae.tasks.image_task import ImageTask
from latentvae.tasks.likelihood.config import LikelihoodConfig
from latentvae.tasks.likelihood.few_labels import (
    Classes,
    ClassLoss,
    ClassTraining,
    count_errors,
    some_labels,
)
from latentvae.tasks.likelihood.images import (
    batches_of,
    binary,
    binary_bytes,
    check_memory,
    perturbed,
    read_all,
)
from latentvae.tasks.likelihood.likelihood_export import export_network, is_whole
from latentvae.tasks.likelihood.total_correlation import (
    BatchEstimate,
    DiscriminatorEstimate,
    TotalCorrelation,
    build_discriminator,
)

STATIC_SEED = 0  # seed of images that are made binary once
START_IMAGES = 1000  # number of training images whose mean initialises the decoder


class LikelihoodState(State):
    """State of a run: name of each unreadable file so far, and why it cannot be read."""

    bad_images: list[Named] = Field(default_factory=list)


class LikelihoodTask(ImageTask):
    """Train a network by a bound of its likelihood.

    Attributes:
        net: the network, not wrapped by DDP.
        objective: the loss.
        pixels: all readable training images as bytes, (N, C, H, W), or None if they are not kept in
            memory. With `binarize` static, they are already binary.
        validation_pixels: the readable validation images, at most `max_validation_images`, as
            bytes. With `binarize` dynamic or static, they are already binary.
    """

    config: LikelihoodConfig
    config_class = LikelihoodConfig
    state_class = LikelihoodState
    title, shown = "Variational autoencoder", ("loss/total",)
    launch = ("-m", "latentvae.cli.train_vae")

    # before the run

    def check(self) -> None:
        check_source(self.config)

    def open(self) -> None:
        self.open_images()
        self.classes = self._find_classes()
        self.pixels: Tensor | None = None  # `build` reads them
        self.kept: list[int] = []

    def _find_classes(self) -> Classes | None:
        """Return the classes of the images, and set `num_classes`.

        The result is None if the network does not model classes.
        """
        vae = self.config.vae
        if not vae.has_classes:
            return None
        if isinstance(self.train_images, ImageStream):
            raise UserError(
                "architecture 'classes' does not work with streaming. Leave --streaming out."
            )
        found = Classes(self.train_images, self.validation_images)
        count = vae.model_dump()["num_classes"] or len(found.names)
        if count < len(found.names):
            raise UserError(
                f"num_classes {count} is too small: the images have {len(found.names)} classes."
            )
        self.config = self.config.with_changes({"vae": {"num_classes": count}})
        return found

    def build(self, accelerator: Accelerator, *, resumed: bool) -> None:
        self.begin_images()
        self._read_images()
        self.net: Any = self.config.vae.build(self.config.image_shape)
        if self.config.vae.has_batch_norm and world_size() > 1:
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        if not resumed and (mean := self._mean_image()) is not None:
            self.net.start_at(mean)
        if self.config.run.gradient_checkpointing:
            self.net.enable_gradient_checkpointing()

        self.objective = VariationalLoss(
            self.config.objective,
            total=self.config.run.max_train_steps,
            group_sizes=self.net.group_sizes,
        )
        self.class_loss: ClassLoss | None = None
        module = self.net
        if self.classes is not None:
            kept, per_class = self.classes.train[self.kept], self.config.data.labels_per_class
            if per_class:
                seed = self.config.run.seed
                kept = some_labels(kept, self.classes.names, per_class=per_class, seed=seed)
            self.class_loss = ClassLoss(kept, self.config.objective, self.net.num_classes)
            self.net.register_to_config(class_names=self.classes.names)
            module = ClassTraining(self.net)
        learner = Learner.with_optimizer(
            module,
            accelerator,
            self.config.optimizer,
            averaged=self.net,
            matrices=muon_matrices(self.net, outer=self.net.outer_layers),
        )
        self.learners = {"model": learner}
        self.tc = self._build_total_correlation(accelerator)

    def _build_total_correlation(self, accelerator: Accelerator) -> TotalCorrelation | None:
        options = self.config.objective
        if not options.tc_scale:
            return None
        if options.tc_estimate == "minibatch":
            return BatchEstimate(self._num_images())
        units = self.net.config.latent_units[0]
        learner = build_discriminator(units, options, self.config.optimizer, accelerator)
        self.learners["tc_discriminator"] = learner
        return DiscriminatorEstimate(learner)

    def _num_images(self) -> int:
        images = self.train_images
        return len(images) if not isinstance(images, ImageStream) else images.num_images or 10**6

    def _read_images(self) -> None:
        """Read validation images, and with `cache_images` also training images, into memory."""
        data, transform = self.config.data, eval_transform(self.config)
        if data.cache_images:
            assert not isinstance(self.train_images, ImageStream)
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            check_memory(len(self.train_images), self.config.image_shape, processes=local)
            self.pixels, self.kept = read_all(
                self.train_images,
                transform,
                bad=self.bad,
                progress="reading images into memory" if is_main() else None,
            )
            _tell_unreadable(self.bad, "train")
            self.bad.check(len(self.train_images), data.max_bad_share)
            if data.binarize == "static":
                self.pixels = binary_bytes(self.pixels, seed=STATIC_SEED)

        chosen = some_of(self.validation_images, data.max_validation_images)
        self.validation_pixels, kept = read_all(chosen, transform, bad=self.bad_validation)
        self.validation_kept = torch.tensor(chosen.indices)[torch.tensor(kept)]
        _tell_unreadable(self.bad_validation, "validate")
        if data.binarize in ("dynamic", "static"):
            self.validation_pixels = binary_bytes(self.validation_pixels, seed=STATIC_SEED)

    def _mean_image(self) -> Tensor | None:
        """Return the mean of some training images, (C, H, W), or None if images are a stream.

        A new decoder starts with this mean as its output, if the likelihood allows it.
        """
        if isinstance(self.train_images, ImageStream):
            return None
        chosen = some_of(self.train_images, START_IMAGES)
        pixels, _ = read_all(chosen, eval_transform(self.config), bad=BadImages())
        return pixels.float().mean(0) / 127.5 - 1.0

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        return found if self.classes is None else {**found, "classes": self.classes.identity()}

    def plan(self) -> dict[str, str]:
        size = sum(p.numel() for p in self.net.parameters()) / 1e6
        shape, options = " x ".join(map(str, self.config.image_shape)), self.config.objective
        images = self.train_images
        stream = isinstance(images, ImageStream)
        known = "a stream" if stream else f"{len(images) - len(self.bad):,}"
        samples = f", {options.train_samples} samples" if options.train_samples > 1 else ""
        return {
            "network": (
                f"{type(self.net).__name__} ({self.config.vae.architecture}), {size:.2f} M "
                f"parameters, {self.net.num_groups} groups of latents"
            ),
            "images": (
                f"{known} to train, {len(self.validation_pixels):,} to validate, {shape}"
                + (f", {self.config.data.binarize}" if self._binary else "")
            ),
            "objective": f"{options.bound}{samples}, likelihood {self.config.vae.likelihood}",
            **self._class_plan(),
        }

    def _class_plan(self) -> dict[str, str]:
        if self.class_loss is None or self.classes is None:
            return {}
        labels, images = len(self.class_loss.labelled), len(self.class_loss.classes)
        return {"labels": f"{labels:,} of {images:,} images, {len(self.classes.names)} classes"}

    @property
    def _binary(self) -> bool:
        return self.config.data.binarize != "none"

    def warnings(self) -> list[str]:
        options, updates = self.config.objective, self.config.run.max_train_steps
        found = []
        if options.kl_warmup_steps > (cycle := math.ceil(updates / options.kl_cycles)):
            found.append(
                f"kl_warmup_steps {options.kl_warmup_steps} is longer than a cycle of {cycle} "
                "updates, so the weight of the KL never reaches kl_scale."
            )
        return found + few_validation_images(
            self.config,
            count=len(self.validation_images),
            training=None if isinstance(self.train_images, ImageStream) else len(self.train_images),
        )

    def check_processes(self, processes: int) -> None:
        if processes > 1 and self.config.vae.has_batch_norm and not torch.cuda.is_available():
            raise UserError(
                f"this network has batch norm, whose statistics only processes with GPUs can share "
                f"(got {processes} processes). Use one process, or --block vdvae."
            )
        if not self.config.data.cache_images:
            super().check_processes(processes)
        else:
            self._sampler(len(self.train_images), rank=0, processes=processes, start=0)  # type: ignore[arg-type]

    # batches

    def batches(self, *, start_step: int) -> Iterable[Batch]:
        if self.pixels is None:
            return super().batches(start_step=start_step)
        sampler = self._sampler(
            len(self.pixels), rank=rank(), processes=world_size(), start=start_step
        )
        self.steps_per_epoch = sampler.steps_per_epoch
        return batches_of(self.pixels, iter(sampler))

    def _sampler(self, count: int, *, rank: int, processes: int, start: int) -> IndexSampler:
        return IndexSampler(
            count,
            self.config.run.train_batch_size,
            seed=self.config.run.seed,
            rank=rank,
            world_size=processes,
            start_step=start,
        )

    @property
    def num_workers(self) -> int:
        return 0 if self.config.data.cache_images else super().num_workers

    def names(self, keys: Tensor) -> list[str]:
        return super().names(keys if not self.kept else torch.tensor(self.kept)[keys])

    # an update

    def micro_step(self, batch: Batch, update: int) -> dict[str, Tensor]:
        self.saw(batch)
        if self.class_loss is not None:
            return self._class_step(self.class_loss, batch, update)
        bound = self.learners["model"].prepared(
            self.prepared_images(batch),
            samples=self.config.objective.train_samples,
            detach_posterior=self.objective.detaches_posterior,
        )
        loss, logged = self.objective(bound, update=update)
        if scale := self.config.objective.spectral_scale:
            penalty = spectral_penalty(self.net)
            loss = loss + scale * penalty
            logged["loss/spectral"] = penalty.detach()
        if self.tc is None:
            (loss / self.config.run.gradient_accumulation_steps).backward()
            return logged

        # total correlation, and the network that estimates it
        share = 1.0 / self.config.run.gradient_accumulation_steps
        correlation = self.tc.of(bound)
        ((loss + self.config.objective.tc_scale * correlation) * share).backward()
        return {
            **logged,
            "loss/total_correlation": correlation.detach(),
            **self.tc.learn(bound, share=share),
        }

    def _class_step(self, objective: ClassLoss, batch: Batch, update: int) -> dict[str, Tensor]:
        """Add the gradients of a batch, for a network with classes. Return values to log."""
        assert self.pixels is not None
        drawn = objective.draw(batch.indices)
        labelled = Batch(self.pixels[drawn], drawn, [])
        loss, logged = objective(
            self.learners["model"].prepared,
            self.prepared_images(batch),
            self.prepared_images(labelled),
            drawn,
            update=update,
        )
        (loss / self.config.run.gradient_accumulation_steps).backward()
        return logged

    def prepared_images(self, batch: Batch) -> Tensor:
        """Return the images on the device.

        The options may ask for random changes, such as random binary values. torch's global
        generator draws these changes.
        """
        images, data = batch.on(self.device), self.config.data
        if self.pixels is not None and data.random_flip:
            mirrored = torch.rand(len(images), device=self.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        kind = data.binarize
        if data.perturb_rate:
            images = perturbed(images, rate=data.perturb_rate)
            kind = "dynamic" if kind == "static" else kind  # draws the random values
        if kind in ("dynamic", "threshold"):
            images = binary(images, kind)
        return images if self._binary else self.net.pixels.rounded(images)

    # between updates

    def row(self, update: int, means: Mapping[str, float]) -> dict[str, float]:
        self.name_bad_images()
        return {"data/bad_images": len(self.bad)}

    def validation_batch(self, numbers: range) -> Tensor:
        """Return the validation images with the indices `numbers`, on the device."""
        batch = Batch(
            self.validation_pixels[numbers.start : numbers.stop : numbers.step], Tensor(), []
        )
        images = batch.on(self.device)
        return binary(images, "threshold") if self._binary else images

    def validate(self, update: int) -> dict[str, float]:
        options, shape = self.config.run, self.config.image_shape
        mine = range(rank(), len(self.validation_pixels), world_size())
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(rank())
            parts = [
                bounds_of(
                    self.net,
                    self.validation_batch(mine[start : start + options.eval_batch_size]),
                    samples=options.validation_samples,
                )
                for start in range(0, len(mine), options.eval_batch_size)
            ]

        total = total_of(part for part in gather_objects(total_of(parts)) if part.images)
        elbo = -total.elbo / total.images
        values = {
            "validation/nats": elbo,
            "validation/bits_per_dim": bits_per_dim(elbo, shape),
            "validation/kl": float(torch.as_tensor(total.kl).sum()) / total.images,
            "validation/images": total.images,
        }
        if (active := total.active_units()) is not None:
            values["validation/active_units"] = active
        if options.validation_samples > 1:
            values["validation/nats_importance"] = -total.importance / total.images
        if self.classes is not None:
            values |= self._class_errors(mine)
        return values

    def _class_errors(self, mine: range) -> dict[str, float]:
        """Return the share of wrong classes in percent, over validation images with a class.

        The result is {} if no validation image has a class.
        """
        assert self.classes is not None
        classes = self.classes.validation[self.validation_kept]
        wrong = known = 0
        for start in range(0, len(mine), self.config.run.eval_batch_size):
            numbers = mine[start : start + self.config.run.eval_batch_size]
            part = classes[numbers.start : numbers.stop : numbers.step]
            found = count_errors(self.net, self.validation_batch(numbers), part)
            wrong, known = wrong + found[0], known + found[1]
        found = gather_objects((wrong, known))
        wrong, known = (sum(values) for values in zip(*found, strict=True))
        return {"validation/class_error": 100.0 * wrong / known} if known else {}

    def validation_line(self, values: Mapping[str, float]) -> str:
        nats, bits, kl, images = (
            values[f"validation/{name}"] for name in ("nats", "bits_per_dim", "kl", "images")
        )
        importance = values.get("validation/nats_importance")
        units = values.get("validation/active_units")
        error = values.get("validation/class_error")
        return (
            f"{nats:.2f} nats per image ({bits:.3f} bits per dimension)"
            + (f", importance-weighted {importance:.2f}" if importance is not None else "")
            + f", KL {kl:.2f}"
            + (f", {units:,.0f} active units" if units is not None else "")
            + (f", {error:.2f} % wrong classes" if error is not None else "")
            + f", on {images:,.0f} unseen images"
        )

    @torch.no_grad()
    def save_samples(self, path: Path) -> bool:
        draws = torch.Generator(self.device).manual_seed(self.config.run.seed)
        images = self.net.sample(self.config.run.num_sample_images, generator=draws)
        save_grid(images.cpu(), path)
        return True

    # checkpoints

    def state(self) -> LikelihoodState:
        self.name_bad_images()
        return LikelihoodState(bad_images=[list(entry) for entry in self.bad.reasons.items()])

    def load_state(self, state: LikelihoodState, *, update: int) -> None:
        self.bad.update((name, reason) for name, reason in state.bad_images)

    # the end

    def export(self, out: Path, *, update: int, folder: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if is_main():
            values = export_network(self, out, update=update, folder=folder)
        barrier()  # no process may end while the first one still writes
        return values

    def has_export(self, out: Path) -> bool:
        return is_whole(out)

    def done(self, out: Path) -> str:
        return (
            f"done: {out}. `latentvae likelihood {out} --data IMAGES` measures the likelihood of "
            f"images, and `latentvae sample {out} --out pictures` draws pictures."
        )

    # proofs

    def order(self, *, rank: int, processes: int, start: int, stop: int) -> list[Any] | None:
        if not self.config.data.cache_images:
            return super().order(rank=rank, processes=processes, start=start, stop=stop)
        count = len(self.train_images if self.pixels is None else self.pixels)  # type: ignore[arg-type]
        sampler = self._sampler(count, rank=rank, processes=processes, start=start)
        return [step for _, step in zip(range(start, stop), sampler, strict=False)]

    @classmethod
    def shortened(cls, config: LikelihoodConfig, *, updates: int) -> LikelihoodConfig:
        few = {"max_validation_images": min(config.data.max_validation_images, 8)}
        return config.with_changes({"data": few, "run": {"num_sample_images": 1}})


def _tell_unreadable(bad: BadImages, use: str) -> None:
    """Print the unreadable files on one process only, because every process reads all files."""
    for name, reason in bad.reasons.items() if is_main() else ():
        print(f"cannot {use} on {printable(name)} ({printable(reason)})")
