"""One update of a run: micro-steps with one forward each, straight down, then the critic; the
optimisers, averages and controllers once. Whoever calls it logs and saves; the preflight makes its
updates by it too."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentvae.data import Batch
from latentvae.distributed import all_reduce_max, all_reduce_mean, rank
from latentvae.engine.randomness import Stream, seed_everything
from latentvae.losses.adversarial import GAN_LOSSES, lazy_weight
from latentvae.losses.colors import random_background
from latentvae.losses.discriminators import power_iteration
from latentvae.tasks.autoencoder.codebook import CodebookUpdate, temperature
from latentvae.tasks.autoencoder.kl_control import (
    held,
    is_held,
    kl_in_loss,
    next_log_factor,
)
from latentvae.tasks.autoencoder.latent_values import latent_values
from latentvae.tasks.autoencoder.run import Run
from latentvae.tasks.autoencoder.schedule import (
    adversarial_factor,
    critic_learns_alone,
    learning_rate,
)
from latentvae.tasks.autoencoder.state import Progress
from latentvae.tasks.autoencoder.update import (
    Adversary,
    backward_critic,
    backward_model,
    clip_gradients,
)


@dataclass
class Made:
    """What an update was.

    Attributes:
        finite: all gradients of all ranks were; if not, nothing was changed but counters.
        signal: that any rank has had, or 0.
        values: what to log, scalars on the device by log name: of each micro-step and of the
            update.
        means: of the posteriors, (B, d, h, w) each, of each micro-step.
        indices: of the images, (B,) each, of each micro-step.
        bad: unreadable files met by this rank, as (name, reason).
    """

    finite: bool = True
    signal: int = 0
    values: list[dict[str, Tensor]] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


class Updates:
    """Makes the updates of a run and moves its progress on.

    Args:
        run: its parts.
        progress: where it stands.
        requested: tells the signal that this rank was asked to stop by, or 0.
    """

    def __init__(
        self, run: Run, progress: Progress, *, requested: Callable[[], int] = lambda: 0
    ) -> None:
        self.run = run
        self.progress = progress
        self.requested = requested
        quantizer = getattr(run.net, "quantize", None)
        self.codebook = CodebookUpdate(quantizer, seed=run.config.run.seed)

    def make(self, batches: Iterator[Batch]) -> Made:
        """One update of the model and, once it has started, of the critic. All ranks call it."""
        run, progress, made = self.run, self.progress, Made()
        self.set_learning_rates()
        adversary = self.adversary()
        micro_steps = run.config.run.gradient_accumulation_steps
        for i in range(micro_steps):
            batch = next(batches)
            made.bad += batch.bad
            made.indices.append(batch.indices)
            with self._synchronised(i == micro_steps - 1):
                made.values.append(self.micro_step(batch, adversary, made))
            progress.micro_step += 1
        norms = self._clip(adversary)
        # While only the critic learns nothing answers to the KL's weight, so it rests.
        measured = held([] if self._critic_learns_alone() else made.values, run.config.objective)
        made.finite, made.signal, found = self._verdict(norms, measured)
        if made.finite:
            self.step(adversary)
            learned = self.codebook.apply(
                progress.update, optimizer=run.optimizer, averages=run.averages()
            )
            self._observe(adversary, made)
            made.values += [norms, learned, self._move_kl_weight(found)]
        self.codebook.clear()
        run.optimizer.zero_grad()
        if run.critic_optimizer is not None:
            run.critic_optimizer.zero_grad()
        progress.skipped += not made.finite
        progress.skipped_in_a_row = 0 if made.finite else progress.skipped_in_a_row + 1
        progress.update += 1
        return made

    def micro_step(
        self, batch: Batch, adversary: Adversary | None, made: Made
    ) -> dict[str, Tensor]:
        """Add the gradients of one batch; returns what to log."""
        run, options = self.run, self.run.config.run
        seed_everything(Stream.MICRO_STEP, options.seed, self.progress.micro_step, rank())
        images = batch.on(run.accelerator.device)
        background = random_background(images)
        alone = self._critic_learns_alone()
        with torch.set_grad_enabled(not alone):
            out = run.prepared(
                images,
                sample=not options.deterministic_posterior,
                temperature=temperature(run.config, self.progress.update),
            )
        logged: dict[str, Tensor] = {}
        if not alone:
            logged = backward_model(
                images,
                out,
                objective=run.objective,
                last_layer=run.wrapper.last_layer,
                adversary=adversary,
                kl=kl_in_loss(
                    out,
                    run.config.objective,
                    update=self.progress.update,
                    log_factor=self.progress.kl_log_factor,
                ),
                background=background,
                divide_by=options.gradient_accumulation_steps,
            )
            means = [latent.mean for latent in out.latents if latent.mean is not None]
            made.means += [mean.detach() for mean in means]
            self.codebook.add(out)
        if adversary is not None:
            logged |= backward_critic(
                images,
                run.objective.picture(out.recon.detach()),
                adversary=adversary,
                background=background,
                divide_by=options.gradient_accumulation_steps,
            )
        logged |= {"objective/output_logvar": out.output_logvar.detach()}
        return logged | latent_values(out)

    def _critic_learns_alone(self) -> bool:
        return self.progress.critic_stopped is None and critic_learns_alone(
            self.progress.update, start=self.progress.critic_start, critic=self.run.config.critic
        )

    def adversary(self) -> Adversary | None:
        """The critic's part in the next update; None before it starts, and after the watch has
        stopped it."""
        run, options = self.run, self.run.config.critic
        factor = adversarial_factor(
            self.progress.update, start=self.progress.critic_start, critic=options
        )
        if factor is None or run.critic is None or run.critic_prepared is None:
            return None
        if self.progress.critic_stopped is not None:
            return None
        return Adversary(
            critic=run.critic,
            prepared=run.critic_prepared,
            factor=factor,
            adaptive=options.disc_adaptive_weight,
            cap=options.disc_weight_cap,
            loss=GAN_LOSSES[options.disc_loss],
            augment=options.disc_augment,
            r1_weight=lazy_weight(
                self.progress.update,
                weight=options.disc_r1_weight,
                interval=options.disc_r1_interval,
            ),
            lecam=run.lecam,
            lecam_weight=options.disc_lecam_weight,
        )

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Reduce gradients over ranks in the last micro-step only."""
        with contextlib.ExitStack() as stack:
            if not last:
                stack.enter_context(self.run.accelerator.no_sync(self.run.prepared))
                if self.run.critic_prepared is not None:
                    stack.enter_context(self.run.accelerator.no_sync(self.run.critic_prepared))
            yield

    def set_learning_rates(self) -> None:
        """Those of the next update."""
        config = self.run.config
        for optimizer, peak in (
            (self.run.optimizer, config.optimizer.learning_rate),
            (self.run.critic_optimizer, config.critic.disc_learning_rate),
        ):
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] = learning_rate(self.progress.update, peak=peak, config=config)

    def _clip(self, adversary: Adversary | None) -> dict[str, Tensor]:
        """Clip the gradients; returns their norms before."""
        largest = self.run.config.optimizer.max_grad_norm
        norms: dict[str, Tensor] = {}
        if not self._critic_learns_alone():
            norms["grad/model"] = clip_gradients(self.run.wrapper.parameters(), largest)
        if adversary is not None:
            norms["grad/critic"] = clip_gradients(adversary.critic.parameters(), largest)
        return norms

    def _verdict(self, norms: dict[str, Tensor], held: Tensor) -> tuple[bool, int, list[float]]:
        """Whether all gradients on all ranks are finite, the signal any rank has had, and the mean
        over ranks of what has a target: the update's one host sync."""
        finite = torch.stack([norm.isfinite() for norm in norms.values()]).all()
        signal = torch.full_like(finite, self.requested(), dtype=torch.float32)
        verdict = all_reduce_max(torch.stack([(~finite).float(), signal]))
        if len(held):
            verdict = torch.cat([verdict, all_reduce_mean(held)])
        not_finite, signal, *found = verdict.tolist()
        return not_finite == 0, int(signal), found

    def step(self, adversary: Adversary | None) -> None:
        """Move weights and averages by the gradients that are there."""
        run = self.run
        if not self._critic_learns_alone():
            run.optimizer.step()
        if adversary is not None and run.critic_optimizer is not None:
            run.critic_optimizer.step()
            power_iteration(adversary.critic)
        if run.ema is not None and not self._critic_learns_alone():
            run.ema.step(run.net.parameters())

    def _observe(self, adversary: Adversary | None, made: Made) -> None:
        """LeCam's averages follow the update."""
        if adversary is not None and self.run.lecam is not None:
            real, fake = (
                torch.stack([values[f"critic/logits_{kind}"] for values in made.values]).mean()
                for kind in ("real", "fake")
            )
            self.run.lecam.update(real, fake)

    def _move_kl_weight(self, found: list[float]) -> dict[str, Tensor]:
        """The KL's weight follows its target; returns the one that was used, to log."""
        options, progress = self.run.config.objective, self.progress
        if not is_held(options):
            return {}
        weight = options.kl_scale * math.exp(progress.kl_log_factor)
        if found:
            progress.kl_log_factor, progress.kl_error = next_log_factor(
                progress.kl_log_factor, options, found=found[0], last_error=progress.kl_error
            )
        return {"objective/kl_weight": torch.full((), weight, device=self.run.accelerator.device)}
