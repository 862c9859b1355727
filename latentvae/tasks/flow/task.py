"""Define the task "flow": train a network to turn noise into latents, by flow matching.

    export = engine.loop.train(FlowTask(config))

`B` batch, `d` latent channels, `h w` latent positions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from latentvae.data import spread
from latentvae.distributed import barrier, gather_objects, is_main, rank, world_size
from latentvae.engine.task import Learner
from latentvae.errors import UserError
from latentvae.latents.opening import open_model
from latentvae.pictures import save_grid
from latentvae.priors.dit import PIPELINE_CLASSES, build_dit, sample_latents, velocity
from latentvae.priors.flow_matching import (
    FlowSampling,
    default_shift,
    draw_sigmas,
    even_sigmas,
    gaussian_loss,
    noise_of,
    noised,
)
from latentvae.priors.transformer import NO_CLASS
from latentvae.tasks.flow.config import LatentFlowConfig
from latentvae.tasks.flow.flow_export import export_flow
from latentvae.tasks.flow.latents import Batch, LatentData, open_latents
from latentvae.tasks.generator_task import GeneratorTask

PICTURE_BATCH = 40  # images that are sampled at once
MAX_ROWS = 10  # classes in a picture
DECODE_BATCH = 4  # a decoder needs much memory
VALIDATION_DRAWS = 4  # noise levels of each image in a validation
LEVELS = 1000  # noise levels over which the error of independent Gaussians is averaged


class FlowTask(GeneratorTask):
    """Train a DiT by flow matching on latents.

    Attributes:
        data: latents to train on and to validate on.
        autoencoder: the autoencoder that made the latents.
        net: the DiT, not wrapped by DDP.
        condition: the condition that the model gets with an image: "class" or "none".
        num_classes: number of classes, 0 without condition.
        shift: shift of the noise levels.
        gaussian: validation loss of the best model of independent Gaussian values.
    """

    config: LatentFlowConfig
    config_class = LatentFlowConfig
    title, unit, shown = "Flow matching", "images", ("loss/flow",)
    launch = ("-m", "latentvae.cli.train_flow")
    most_classes: ClassVar[int | None] = PIPELINE_CLASSES  # None if there is no export for them

    # before the run

    def open(self) -> None:
        options = self.config.flow
        self.data = self.open_data()
        self.autoencoder = self.open_autoencoder()
        self.condition = self._condition()
        self.num_classes = self._num_classes() if self.condition == "class" else 0

        # the network
        channels, height, width = self.data.shape
        if height != width:
            raise UserError(
                f"the latents are {height} x {width}, but the network needs square latents. Encode "
                "with one number as --resolution."
            )
        if height % options.patch_size:
            fits = max(n for n in range(1, options.patch_size) if height % n == 0)
            raise UserError(
                f"patch_size {options.patch_size} does not divide the side of the latents, "
                f"{height}. The nearest smaller one that does is {fits}."
            )
        self.shift = (
            default_shift(channels * height * width) if options.shift == "auto" else options.shift
        )
        self.gaussian = self._gaussian()

    def open_data(self) -> LatentData:
        """Read the latents to train on and to validate on."""
        return open_latents(self.config.latents, seed=self.config.run.seed)

    def open_autoencoder(self) -> Any:
        """Return the autoencoder that made the latents.

        Raises:
            UserError: there is no such autoencoder, or it has other weights.
        """
        path, data = self.config.latents.autoencoder, self.data
        try:
            autoencoder = open_model(path or data.model, device="cpu")
        except UserError as error:
            if path is not None:
                raise
            raise UserError(
                f"{error} (The manifest of the latents names this autoencoder. Give another with "
                "--autoencoder.)"
            ) from error
        if autoencoder.info()["weights_sha256"] != data.content.model_sha256:
            raise UserError(
                f"autoencoder '{path or data.model}' has other weights than the autoencoder that "
                f"made the latents ('{data.model}'). Give that autoencoder, or encode the images "
                "again."
            )
        return autoencoder

    def _condition(self) -> str:
        """Return the condition that `condition auto` stands for, after a check."""
        asked = self.config.flow.condition
        has_classes = bool((self.data.train.classes != NO_CLASS).any())
        if asked == "auto":
            return "class" if has_classes else "none"
        if asked == "class" and not has_classes:
            raise UserError(
                f"condition class needs latents with classes, but "
                f"'{self.config.latents.latents[0]}' has none. Give --condition none, or encode "
                "images that lie in one folder per class."
            )
        return asked

    def _num_classes(self) -> int:
        count = self.count_classes()
        if self.most_classes is not None and count > self.most_classes:
            raise UserError(
                f"the latents have {count} classes, but diffusers' DiTPipeline takes at most "
                f"{self.most_classes}. Give --condition none."
            )
        return count

    def _gaussian(self) -> float:
        """Return the loss of independent Gaussian values with the variances of the channels."""
        z = self.data.normalization.apply(self.data.validation.z.float())
        sigmas = even_sigmas(LEVELS, shift=self.shift)
        return gaussian_loss(z.var(dim=(0, 2, 3)), sigmas).item()

    def build(self, accelerator: Accelerator, *, resumed: bool) -> None:
        options = self.config.flow
        self.net = build_dit(
            channels=self.data.shape[0],
            side=self.data.shape[1],
            num_classes=self.num_classes,
            width=options.width,
            depth=options.depth,
            head_dim=options.head_dim,
            patch_size=options.patch_size,
        )
        if self.config.run.gradient_checkpointing:
            self.net.enable_gradient_checkpointing()

        linear = [p for p in self.net.transformer_blocks.modules() if isinstance(p, nn.Linear)]
        learner = Learner.with_optimizer(
            TrainedFlow(self.net),
            accelerator,
            self.config.optimizer,
            averaged=self.net,
            matrices=[cast("nn.Parameter", part.weight) for part in linear],
        )
        self.learners = {"model": learner}

    def identity(self) -> dict[str, Any]:
        return {
            "autoencoder": self.data.content.model_sha256[:16],
            **self.data.train.identity(),
        }

    def plan(self) -> dict[str, str]:
        size = sum(p.numel() for p in self.net.parameters())
        shape = " x ".join(map(str, self.data.shape))
        dropped = f"dropped for {self.config.flow.condition_dropout:.0%} of the images"
        return {
            "network": f"DiTTransformer2DModel, {size / 1e6:.1f} M parameters",
            "latents": (
                f"{shape}, {len(self.data.train):,} images to train, "
                f"{len(self.data.validation):,} to validate"
            ),
            "condition": f"{self.num_classes} classes, {dropped}" if self.num_classes else "none",
            "noise levels": f"shift {self.shift:g}",
            "to beat": f"loss {self.gaussian:.4f}, of independent Gaussian values",
        }

    def warnings(self) -> list[str]:
        found = []
        if self.condition != "none" and not self.config.flow.condition_dropout:
            found.append("condition_dropout is 0, so sampling with guidance will not work.")
        z = self.data.normalization.apply(self.data.validation.z.float())
        if not 0.5 <= (std := z.std().item()) <= 2.0:
            found.append(
                f"the standard deviation of the normalised latents is {std:.3g}, not about 1. Give "
                "--normalization channel."
            )
        return found

    # an update

    def micro_step(self, batch: Batch, update: int) -> dict[str, Tensor]:
        x, classes = self.moved(batch, sample=self.config.latents.posterior_sample)
        noise, sigma = self.draw(x, batch)
        loss = self.learners["model"].prepared(x, noise, sigma, self.drop_condition(classes))
        (loss / self.config.run.gradient_accumulation_steps).backward()
        return {"loss/flow": loss.detach()}

    def draw(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return noise like `x` and noise levels (B,) by the global random generator."""
        return torch.randn_like(x), draw_sigmas(len(x), shift=self.shift, device=self.device)

    def moved(self, batch: Batch, *, sample: bool = False) -> tuple[Tensor, Tensor]:
        """Return normalised latents (B, d, h, w) and classes (B,) on the device.

        Args:
            batch: images of a table.
            sample: draw from the posterior, if the table has standard deviations. Otherwise the
                latents are the posterior means.
        """
        z = batch.z
        if sample and batch.stds is not None:
            z = z + batch.stds * torch.randn_like(z)
        x = self.data.normalization.apply(z.to(self.device))
        classes = batch.classes.to(self.device)
        return x, classes if self.num_classes else torch.full_like(classes, NO_CLASS)

    def drop_condition(self, classes: Tensor) -> Tensor:
        """Drop the class of some images, chosen by the global random generator."""
        dropped = torch.rand(classes.shape, device=classes.device)
        return classes.masked_fill(dropped < self.config.flow.condition_dropout, NO_CLASS)

    # between updates

    @torch.no_grad()
    def validate(self, update: int) -> dict[str, float]:
        # this rank's images
        table, step = self.data.validation, self.config.run.eval_batch_size
        mine = range(rank(), len(table), world_size())
        sums: dict[str, float] = {}
        for start in range(0, len(mine), step):
            numbers = mine[start : start + step]
            for name, loss in self._losses(table.rows(numbers), numbers).items():
                sums[name] = sums.get(name, 0.0) + loss.double().sum().item()

        # means over all ranks
        parts: list[dict[str, float]] = [part for part in gather_objects(sums) if part]
        means = {name: sum(part[name] for part in parts) / len(table) for name in parts[0]}
        wrong = means.get("wrong")
        return {
            "validation/loss": means["right"],
            **({} if wrong is None else {"validation/loss_wrong_class": wrong}),
            "validation/loss_gaussian": self.gaussian,
            "validation/images": len(table),
        }

    def _losses(self, batch: Batch, numbers: range) -> dict[str, Tensor]:
        """Return the loss (B,) of each image, for its own and for a wrong class.

        Noise and noise levels depend only on the image's number.
        """
        x, classes = self.moved(batch)
        wrong = (classes + max(self.num_classes // 2, 1)) % max(self.num_classes, 1)
        conditions = {"right": classes}
        if self.num_classes > 1:
            conditions["wrong"] = wrong.where(classes >= 0, NO_CLASS)

        # Each image has evenly spread noise levels, with another start than its neighbours.
        levels = even_sigmas(VALIDATION_DRAWS * 64, shift=self.shift)
        offsets = torch.from_numpy(np.array([(n * 37) % 64 for n in numbers]))
        losses = {name: torch.zeros(len(x), device=self.device) for name in conditions}
        for draw in range(VALIDATION_DRAWS):
            sigma = levels[draw * 64 + offsets].to(self.device)
            noise = noise_of(x.shape[1:], seed=draw, numbers=numbers).to(self.device)
            for name, labels in conditions.items():
                found = flow_loss(self.net, x, noise, sigma, labels)
                losses[name] += found / VALIDATION_DRAWS
        return losses

    def validation_line(self, values: Mapping[str, float]) -> str:
        wrong = values.get("validation/loss_wrong_class")
        return (
            f"loss {values['validation/loss']:.4f}"
            + (f" ({wrong:.4f} with a wrong class)" if wrong is not None else "")
            + f" on {values['validation/images']:,} unseen images"
        )

    def save_samples(self, path: Path) -> bool:
        """Draw a picture of samples, the same number for each class."""
        count = self.config.run.num_sample_images
        chosen = spread(max(self.num_classes, 1), min(MAX_ROWS, count))
        columns = count // len(chosen)
        classes = torch.full((count,), NO_CLASS)
        if self.num_classes:
            classes = torch.tensor(chosen).repeat_interleave(columns)

        self.autoencoder.net.to(self.device)
        options = FlowSampling(
            steps=self.config.flow.sampling_steps, solver=self.config.flow.solver
        )
        images = []
        for start in range(0, len(classes), PICTURE_BATCH):
            numbers = range(start, min(start + PICTURE_BATCH, len(classes)))
            latents = sample_latents(
                self.net,
                classes[start : numbers.stop],
                options=options,
                shift=self.shift,
                seed=self.config.run.seed,
                numbers=numbers,
            )
            for z in self.data.normalization.invert(latents).split(DECODE_BATCH):
                images.append(self.autoencoder.decode(z).clamp(-1.0, 1.0).cpu())
        labels = [self.labels[number] for number in chosen] if self.num_classes else None
        save_grid(torch.cat(images), path, labels=labels)
        return True

    @property
    def labels(self) -> list[str]:
        """Names of the classes, empty without condition."""
        names = self.data.content.class_names or [f"class {i}" for i in range(self.num_classes)]
        return list(names) if self.num_classes else []

    # the end

    def export(self, out: Path, *, update: int, folder: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if is_main():
            loss = export_flow(self, out, update=update, folder=folder)
            values = {"export/loss": loss} if loss is not None else {}
        barrier()  # no process may end while the first one still writes
        return values

    # proofs

    @classmethod
    def shortened(cls, config: LatentFlowConfig, *, updates: int) -> LatentFlowConfig:
        few = {"max_validation_images": min(config.latents.max_validation_images, 8)}
        short = {"run": {"num_sample_images": 1}, "flow": {"sampling_steps": 2}}
        return config.with_changes({"latents": few, **short})


class TrainedFlow(nn.Module):
    """The module that training calls. It returns the loss: a mean squared error, a scalar.

    Accelerate replaces `forward` of the module that it prepares, to compute in mixed precision. So
    the network is inside, and validation computes in float32.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, noise: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        return flow_loss(self.net, x, noise, sigma, classes).mean()


def flow_loss(net: nn.Module, x: Tensor, noise: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
    """Return the squared error of the predicted velocity, the mean for each image, (B,), float32.

    Args:
        net: the DiT.
        x: normalised latents, (B, d, h, w).
        noise: like `x`.
        sigma: noise level of each image in [0, 1], (B,).
        classes: (B,), int64. `NO_CLASS` means "no class".
    """
    predicted = velocity(net, noised(x, noise, sigma), sigma, classes)
    errors = F.mse_loss(predicted.float(), noise - x, reduction="none")
    return errors.mean(dim=(1, 2, 3))
