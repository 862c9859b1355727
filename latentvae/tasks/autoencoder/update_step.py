"""Define the learning part of the task "autoencoder": networks, one update, and schedules.

A micro-step handles one batch. The model makes one forward and one backward pass. Then the
discriminator learns from the same images and the detached reconstructions (see `backward`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentvae.data import Batch, ImageSource, ImageStream
from latentvae.engine.task import Averages, Learner, Task
from latentvae.losses.adversarial import GAN_LOSSES, Adversary, LeCam, lazy_weight
from latentvae.losses.colors import random_background
from latentvae.losses.discriminators import power_iteration
from latentvae.losses.feature_loss import FeatureLoss
from latentvae.losses.posterior import ActiveUnits
from latentvae.models import FAMILIES, family_of
from latentvae.tasks.autoencoder.backward import backward_discriminator, backward_model
from latentvae.tasks.autoencoder.build_parts import (
    build_losses,
    build_net,
    build_wrapper,
    compute_faster,
    discriminator_of,
    start_codebook,
)
from latentvae.tasks.autoencoder.codebook import CodebookUpdate, temperature, wants_start
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.discretise import (
    start_quantizer,
    trains_encoder,
    waiting_parts,
    warmup_steps,
)
from latentvae.tasks.autoencoder.earlier_discriminator import load_discriminator
from latentvae.tasks.autoencoder.fine_tuning import Base
from latentvae.tasks.autoencoder.latent_values import latent_values
from latentvae.tasks.autoencoder.linear_start import start_linear
from latentvae.tasks.autoencoder.state import AutoencoderState

MODEL, DISCRIMINATOR = "model", "discriminator"  # learners


class LearningAutoencoder(Task):
    """The part of the autoencoder task that builds and trains the networks.

    `task.AutoencoderTask` adds images, log, checkpoints and export.

    Attributes:
        base: the pretrained network of a fine-tuning. None without fine-tuning.
        features: the frozen network of the option `feature_loss`, or None without this loss.
        train_images: opened source of training images.
        validation_images: opened source of validation images.
        wrapper: the module that wraps the network for training, not wrapped by DDP. `net` is the
            network without this wrapper.
        discriminator: the discriminator, not wrapped by DDP, or None if its weight is 0.
        objective: terms and weights of the model's loss.
        metric: LPIPS for the validation, in float32.
        progress: state of the discriminator's schedule, the KL's weight and the collapse watch.
    """

    config: TrainConfig
    base: Base | None
    features: FeatureLoss | None = None
    train_images: ImageSource | ImageStream
    validation_images: ImageSource

    def build(self, accelerator: Accelerator, *, resumed: bool) -> None:
        # network and objective
        config, self.accelerator = self.config, accelerator
        net = build_net(config, self.base)
        starts_linear = config.starts_linear and not resumed
        if starts_linear:
            start_linear(
                config,
                net,
                accelerator,
                images=self.train_images,
                codebook_images=self.statistics_images,
            )
        discretises = self.base is not None and self.base.discretised
        if discretises and not resumed:
            start_quantizer(
                config,
                net,
                accelerator,
                images=self.train_images,
                codebook_images=self.statistics_images,
            )
        if discretises and not trains_encoder(config):
            net.encoder.requires_grad_(False)
        self.metric, self.objective = build_losses(config, net, accelerator, features=self.features)
        self.wrapper = build_wrapper(config, net, pretrained=self.base is not None)
        if wants_start(config) and self.base is None and not resumed and not starts_linear:
            start_codebook(config, net, accelerator, self.statistics_images)

        # discriminator
        self.discriminator = discriminator_of(config)
        has_lecam = self.discriminator is not None and config.discriminator.disc_lecam_weight > 0
        self.lecam = LeCam(device=accelerator.device) if has_lecam else None

        # layout and speed
        if config.run.channels_last:
            for module in (self.wrapper, self.discriminator):
                if module is not None:
                    module.to(memory_format=torch.channels_last)
        compute_faster(config, net, self.metric, accelerator)

        # learners
        self._waiting = waiting_parts(config, net) if discretises else []
        self.learners = {
            MODEL: Learner.with_optimizer(
                self.wrapper,
                accelerator,
                config.optimizer,
                averaged=self.wrapper.averaged(),
                matrices=FAMILIES[config.model.architecture].matrices(net),
                some_wait=bool(self._waiting),
            )
        }
        self._choose_parts(0)
        if self.discriminator is not None:
            self.learners[DISCRIMINATOR] = Learner.with_optimizer(
                self.discriminator,
                accelerator,
                config.optimizer,
                rate=config.discriminator.disc_learning_rate,
            )

        if config.discriminator.discriminator_from is not None and not resumed:
            load_discriminator(
                self.learners[DISCRIMINATOR],
                Path(config.discriminator.discriminator_from),
                self.lecam,
            )

        # state, codes and active units
        self.progress = AutoencoderState(discriminator_start=config.discriminator_start)
        self.codebook = CodebookUpdate(family_of(net).quantizers(net), seed=config.run.seed)
        self.units = ActiveUnits(config.model.latent_channels, device=accelerator.device)
        self._means: list[Tensor] = []  # posterior means of this update

    @property
    def net(self) -> Any:
        return self.wrapper.net

    @property
    def prepared(self) -> nn.Module:
        return self.learners[MODEL].prepared

    @property
    def statistics_images(self) -> ImageSource:
        """Images for latent statistics and k-means.

        The result is the training images, or the validation images if the training images are a
        stream.
        """
        images = self.train_images
        return self.validation_images if isinstance(images, ImageStream) else images

    # an update

    def learning(self, update: int) -> Sequence[str]:
        names = () if self._discriminator_learns_alone(update) else (MODEL,)
        return names if self.adversary(update) is None else (*names, DISCRIMINATOR)

    def pause(self, name: str) -> range:
        """Return the updates in which the model pauses, because only the discriminator learns.

        The result is empty if `name`, the name of a learner, is not "model".
        """
        weight, progress = self.objective.adversarial, self.progress
        if name != MODEL or self.discriminator is None or weight.scale == 0:
            return range(0)
        start = progress.discriminator_start
        stop = start + weight.warmup_updates
        if progress.discriminator_stopped is not None:
            stop = min(stop, progress.discriminator_stopped)
        return range(start, max(start, stop))

    def _choose_parts(self, update: int) -> None:
        """Freeze the decoder, and the encoder if it learns later, during a new quantiser's warm-up.

        The optimizer, including its weight decay, does not change a weight without a gradient.
        """
        for part in self._waiting:
            part.requires_grad_(update >= warmup_steps(self.config))

    def micro_step(self, batch: Batch, update: int) -> dict[str, Tensor]:
        self._choose_parts(update)
        options = self.config.run
        adversary, alone = self.adversary(update), self._discriminator_learns_alone(update)
        images = batch.on(self.accelerator.device)
        background = random_background(images)

        # forward
        with torch.set_grad_enabled(not alone):
            out = self.prepared(
                images,
                sample=not options.deterministic_posterior,
                temperature=temperature(self.config, update),
            )

        # the model's backward
        logged: dict[str, Tensor] = {}
        if not alone:
            logged = backward_model(
                images,
                out,
                objective=self.objective,
                update=update,
                last_layer=self.wrapper.last_layer,
                adversary=adversary,
                background=background,
                divide_by=options.gradient_accumulation_steps,
            )
            means = [latent.mean for latent in out.latents if latent.mean is not None]
            self._means += [mean.detach() for mean in means]
            self.codebook.add(out)

        # the discriminator's backward
        if adversary is not None:
            logged |= backward_discriminator(
                images,
                self.objective.picture(out.recon.detach()),
                adversary=adversary,
                background=background,
                divide_by=options.gradient_accumulation_steps,
            )
        logged |= {"objective/output_logvar": out.output_logvar.detach()}
        return logged | latent_values(out)

    def adversary(self, update: int) -> Adversary | None:
        """Return the discriminator and its options for an update.

        The result is None without a discriminator, before the discriminator starts, and after the
        collapse watch has switched it off.
        """
        options = self.config.discriminator
        factor = self.objective.adversarial.factor(update, start=self.progress.discriminator_start)
        if (
            factor is None
            or self.discriminator is None
            or self.progress.discriminator_stopped is not None
        ):
            return None

        return Adversary(
            discriminator=self.discriminator,
            prepared=self.learners[DISCRIMINATOR].prepared,
            factor=factor,
            loss=GAN_LOSSES[options.disc_loss],
            augment=options.disc_augment,
            r1_weight=lazy_weight(
                update, weight=options.disc_r1_weight, interval=options.disc_r1_interval
            ),
            lecam=self.lecam,
            lecam_weight=options.disc_lecam_weight,
        )

    def _discriminator_learns_alone(self, update: int) -> bool:
        weight, start = self.objective.adversarial, self.progress.discriminator_start
        return self.progress.discriminator_stopped is None and weight.learns_alone(
            update, start=start
        )

    def measured(self, values: Sequence[Mapping[str, Tensor]], update: int) -> Tensor:
        # While only the discriminator learns, the KL cannot react to its weight, so the weight
        # stays the same.
        target, rests = self.objective.kl_target, self._discriminator_learns_alone(update)
        return torch.empty(0) if target is None else target.measured([] if rests else values)

    def after_update(
        self,
        update: int,
        *,
        values: Sequence[Mapping[str, Tensor]],
        means: Sequence[float],
        averages: Averages,
    ) -> dict[str, Tensor]:
        # codes and spectral norms
        adversary = self.adversary(update)
        if adversary is not None:
            power_iteration(adversary.discriminator)
        learned = self.codebook.apply(
            update, optimizer=self.learners[MODEL].optimizer, averages=averages
        )

        # averages of logits and active units
        if adversary is not None and self.lecam is not None:
            real, fake = (
                torch.stack([logged[f"discriminator/logits_{kind}"] for logged in values]).mean()
                for kind in ("real", "fake")
            )
            self.lecam.update(real, fake)
        for mean in self._means:
            self.units.add(mean)
        return learned | self._move_kl_weight(update, means)

    def end_update(self) -> None:
        self.codebook.clear()
        self._means = []

    def _move_kl_weight(self, update: int, found: Sequence[float]) -> dict[str, Tensor]:
        """Return the KL's weight of this update for the log, and adjust it for the next update."""
        target = self.objective.kl_target
        if target is None:
            return {}
        weight = self.objective.weights["kl"] * target(update)
        if found:
            target.follow(found[0])
        return {"objective/kl_weight": torch.full((), weight, device=self.accelerator.device)}

    # checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {} if self.lecam is None else {"lecam": self.lecam.state_dict()}

    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self.lecam is not None:
            self.lecam.load_state_dict(tensors["lecam"])
