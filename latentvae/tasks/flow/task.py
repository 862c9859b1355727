"""Define the task "flow": train a network to turn noise into latents, by flow matching.

    export = engine.loop.train(FlowTask(config))

Symbols: `B` batch, `d` latent channels, `h w` height and width of latents.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentvae.autoencoder import hash_of_weights
from latentvae.distributed import barrier, gather_objects, is_main, rank, world_size
from latentvae.engine.task import Learner
from latentvae.errors import UserError
from latentvae.pictures import save_grid
from latentvae.priors.dit import (
    PIPELINE_CLASSES,
    Condition,
    build_dit,
    sample_latents,
)
from latentvae.priors.flow_matching import (
    FlowSampling,
    default_shift,
    draw_sigmas,
    even_sigmas,
    gaussian_loss,
    noise_of,
)
from latentvae.priors.pixart import build_pixart, encode_captions, load_caption_encoder
from latentvae.priors.text import describe_encoder
from latentvae.priors.transformer import NO_CLASS, Text
from latentvae.tasks.flow.config import LatentFlowConfig
from latentvae.tasks.flow.flow_export import export_flow, open_autoencoder
from latentvae.tasks.flow.latents import Batch, LatentData, open_latents
from latentvae.tasks.flow.trained_flow import TrainedFlow, flow_loss
from latentvae.tasks.generator_task import GeneratorTask
from latentvae.tasks.shards import check_captions, with_captions

Known = TypeVar("Known", Tensor, list[str])  # condition of images: classes (B,) or captions
PICTURE_BATCH = 40  # images that are sampled at once
DECODE_BATCH = 4  # a decoder needs much memory
WRONG = ("wrong_class", "wrong_text")
VALIDATION_DRAWS = 4  # number of noise levels for each image in a validation
LEVELS = 1000  # number of noise levels over which the loss of independent Gaussians is averaged


class FlowTask(GeneratorTask):
    """Train a DiT, or for text a PixArt network, by flow matching on latents.

    Attributes:
        data: latents to train on and to validate on.
        autoencoder: the autoencoder that made the latents.
        net: the network, not wrapped by DDP.
        condition: the condition that the model gets with an image: "class", "text" or "none".
        num_classes: number of classes, 0 if the condition is not "class".
        words, encoder: tokenizer and frozen text encoder for captions, or None.
        shift: shift of the noise levels in training and sampling. 1 is no shift.
        gaussian: validation loss of the best model that assumes independent Gaussian latent values,
            for comparison.
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
        if options.captions is not None:
            self.data = with_captions(self.data, options.captions)
        self.autoencoder = self.open_autoencoder()
        self.condition = self._condition()
        self.words: Any = None
        self.encoder: Any = None
        if self.condition == "text":
            assert options.text_encoder is not None  # the options are checked
            self.words, self.encoder = load_caption_encoder(options.text_encoder)
        self.num_classes = self._num_classes() if self.condition == "class" else 0

        # the network
        channels, height, width = self.data.shape
        if height != width:
            raise UserError(
                f"the latents are {height} x {width}, but the network needs square latents. Encode "
                "the images again, with one number as --resolution."
            )
        if height % options.patch_size:
            fits = max(n for n in range(1, options.patch_size) if height % n == 0)
            raise UserError(
                f"patch_size {options.patch_size} does not divide the side of the latents, "
                f"{height}. The next smaller divisor is {fits}."
            )
        self.shift = (
            default_shift(channels * height * width) if options.shift == "auto" else options.shift
        )
        self.gaussian = self._gaussian()

    def open_data(self) -> LatentData:
        """Read the latents to train on and to validate on."""
        return open_latents(self.config.latents, seed=self.config.run.seed)

    def open_autoencoder(self) -> Any:
        """Return the autoencoder that made the latents."""
        return open_autoencoder(self.config.latents.autoencoder, self.data)

    def _condition(self) -> str:
        """Return the kind of condition: class, text or none.

        The options and the latents decide the kind.
        """
        asked, encoder = self.config.flow.condition, self.config.flow.text_encoder
        if encoder is not None:
            train, held = self.data.train, self.data.validation
            if not any([*train.captions, *held.captions]):
                raise UserError(
                    f"text_encoder '{encoder}' needs captions, but the latents have none. Give "
                    "--captions FILE, or leave text_encoder out."
                )
            check_captions(train, held, option="latents", instead="leave text_encoder out")
            return "text"

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
        """Return the smallest possible loss if all latent values were independent Gaussians.

        So a model with a lower loss has learned more than the mean and variance of each channel.
        """
        z = self.data.normalization.apply(self.data.validation.z.float())
        sigmas = even_sigmas(LEVELS, shift=self.shift)
        return gaussian_loss(z.var(dim=(0, 2, 3)), sigmas).item()

    def build(self, accelerator: Accelerator, *, resumed: bool) -> None:
        options = self.config.flow
        shape: dict[str, int] = {
            "channels": self.data.shape[0],
            "side": self.data.shape[1],
            "width": options.width,
            "depth": options.depth,
            "head_dim": options.head_dim,
            "patch_size": options.patch_size,
        }
        self.net: Any
        if self.encoder is None:
            self.net = build_dit(num_classes=self.num_classes, **shape)
        else:
            self.encoder.to(accelerator.device)
            text_channels = self.states([""]).states.shape[2]
            self.net = build_pixart(text_channels=text_channels, **shape)
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
        found = {
            "autoencoder": self.data.content.model_sha256[:16],
            **self.data.train.identity(),
        }
        if self.condition == "text":
            found["captions"] = self.data.train.captions_hash()
            found["text_encoder"] = hash_of_weights(self.encoder)[:16]
        return found

    def done(self, out: Path) -> str:
        prompt = '--prompt "TEXT" ' if self.condition == "text" else ""
        return f"done: {out}. `latentvae sample {out} {prompt}--out pictures` draws pictures."

    def plan(self) -> dict[str, str]:
        size = sum(p.numel() for p in self.net.parameters())
        shape = " x ".join(map(str, self.data.shape))
        dropped = f"no condition for {self.config.flow.condition_dropout:.0%} of the images"
        kinds = {"class": f"{self.num_classes} classes, {dropped}", "none": "none"}
        if self.encoder is not None:
            kinds["text"] = f"captions, {dropped}, read by {describe_encoder(self.encoder)}, frozen"
        return {
            "network": f"{type(self.net).__name__}, {size / 1e6:.1f} M parameters",
            "latents": (
                f"{shape}, {len(self.data.train):,} images to train, "
                f"{len(self.data.validation):,} to validate"
            ),
            "condition": kinds[self.condition],
            "noise levels": f"shift {self.shift:g}",
            "to beat": f"loss {self.gaussian:.4f}, best model of independent Gaussian latents",
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
        x, known = self.moved(batch, sample=self.config.latents.posterior_sample)
        noise, sigma = self.draw(x, batch)
        condition = self.read(self.drop_condition(known))
        loss = self.learners["model"].prepared(x, noise, sigma, condition)
        (loss / self.config.run.gradient_accumulation_steps).backward()
        return {"loss/flow": loss.detach()}

    def draw(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return noise in the shape of `x` and noise levels (B,), by torch's global generator."""
        return torch.randn_like(x), draw_sigmas(len(x), shift=self.shift, device=self.device)

    def moved(self, batch: Batch, *, sample: bool = False) -> tuple[Tensor, Any]:
        """Return normalised latents (B, d, h, w) and classes (B,) on the device.

        With the condition "text", the captions are returned in place of the classes. With the
        condition "none", every class is `NO_CLASS`.

        Args:
            batch: rows of a `LatentTable`.
            sample: whether to draw latents from the posterior, if the table has standard
                deviations. If `sample` is false, the latents are the posterior means.
        """
        z = batch.z
        if sample and batch.stds is not None:
            z = z + batch.stds * torch.randn_like(z)
        x = self.data.normalization.apply(z.to(self.device))
        if self.condition == "text":
            return x, batch.captions
        classes = batch.classes.to(self.device)
        return x, classes if self.num_classes else torch.full_like(classes, NO_CLASS)

    def drop_condition(self, known: Known) -> Known:
        """Drop the class or caption of some images, chosen by torch's global generator.

        A dropped caption becomes "".
        """
        share = self.config.flow.condition_dropout
        if isinstance(known, Tensor):
            dropped = torch.rand(known.shape, device=known.device) < share
            return known.masked_fill(dropped, NO_CLASS)
        lost = (torch.rand(len(known)) < share).tolist()  # on the CPU, where the texts are
        return ["" if drop else text for drop, text in zip(lost, known, strict=True)]

    def read(self, known: Tensor | list[str]) -> Condition:
        """Return the condition that the network takes: classes as they are, captions encoded."""
        return known if isinstance(known, Tensor) else self.states(known)

    def states(self, captions: list[str]) -> Text:
        """Return the text encoder's hidden states of captions, without a gradient."""
        return encode_captions(captions, self.words, self.encoder)

    def nothing(self, count: int) -> Tensor | list[str]:
        """Return the condition that stands for "no class or caption", for `count` images."""
        if self.condition == "text":
            return [""] * count
        return torch.full((count,), NO_CLASS, device=self.device)

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
        return {
            "validation/loss": means["right"],
            **{f"validation/loss_{name}": means[name] for name in WRONG if name in means},
            "validation/loss_gaussian": self.gaussian,
            "validation/images": len(table),
        }

    def _losses(self, batch: Batch, numbers: range) -> dict[str, Tensor]:
        """Return the loss (B,) of each image, with its own class or caption and with a wrong one.

        Noise and noise levels depend only on the image's index: they never change between updates.
        """
        x, known = self.moved(batch)
        conditions = {"right": self.read(known), **self._wrong(known)}

        # Each image has evenly spread noise levels, with another start than its neighbours.
        levels = even_sigmas(VALIDATION_DRAWS * 64, shift=self.shift)
        offsets = torch.from_numpy(np.array([(n * 37) % 64 for n in numbers]))
        losses = {name: torch.zeros(len(x), device=self.device) for name in conditions}
        for draw in range(VALIDATION_DRAWS):
            sigma = levels[draw * 64 + offsets].to(self.device)
            noise = noise_of(x.shape[1:], seed=draw, numbers=numbers).to(self.device)
            for name, condition in conditions.items():
                found = flow_loss(self.net, x, noise, sigma, condition)
                losses[name] += found / VALIDATION_DRAWS
        return losses

    def _wrong(self, known: Tensor | list[str]) -> dict[str, Condition]:
        """Return a dict with a wrong class or a wrong caption for each image.

        The key is `wrong_class` or `wrong_text`. An image without a class gets no wrong class. The
        result is {} if there are fewer than two classes or captions.
        """
        if isinstance(known, Tensor):
            wrong = (known + max(self.num_classes // 2, 1)) % max(self.num_classes, 1)
            several = self.num_classes > 1
            return {"wrong_class": wrong.where(known >= 0, NO_CLASS)} if several else {}
        if len(self.other_captions) == 1:
            return {}
        return {"wrong_text": self.states([self.other_captions[text] for text in known])}

    def validation_line(self, values: Mapping[str, float]) -> str:
        named = {
            "a wrong class": values.get("validation/loss_wrong_class"),
            "a wrong caption": values.get("validation/loss_wrong_text"),
        }
        wrong = [f" ({loss:.4f} with {name})" for name, loss in named.items() if loss is not None]
        return (
            f"loss {values['validation/loss']:.4f}{''.join(wrong)}"
            f" on {values['validation/images']:,} unseen images"
        )

    def save_samples(self, path: Path) -> bool:
        """Draw a picture with equally many samples for each class or caption that it shows."""
        rows = self.sample_rows(self.num_classes)
        self.autoencoder.net.to(self.device)
        options = FlowSampling(
            steps=self.config.flow.sampling_steps, solver=self.config.flow.solver
        )
        images = []
        for start in range(0, len(rows.classes), PICTURE_BATCH):
            numbers = range(start, min(start + PICTURE_BATCH, len(rows.classes)))
            known = rows.captions if self.condition == "text" else rows.classes
            latents = sample_latents(
                self.net,
                self.read(known[start : numbers.stop]),
                options=options,
                shift=self.shift,
                seed=self.config.run.seed,
                numbers=numbers,
            )
            for z in self.data.normalization.invert(latents).split(DECODE_BATCH):
                images.append(self.autoencoder.decode(z).clamp(-1.0, 1.0).cpu())
        save_grid(torch.cat(images), path, labels=rows.labels)
        return True

    @property
    def labels(self) -> list[str]:
        """Names of the classes. The list is empty if the condition is not "class"."""
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
