"""The training loop: one forward per micro-step, straight down, then the critic; the same for any
number of ranks."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentvae.data import (
    BadImages,
    Batch,
    ImageStream,
    IndexSampler,
)
from latentvae.distributed import (
    all_reduce_max,
    barrier,
    from_main,
    gather_objects,
    is_main,
    rank,
    world_size,
)
from latentvae.errors import printable
from latentvae.losses.adversarial import GAN_LOSSES, lazy_weight
from latentvae.losses.colors import random_background
from latentvae.losses.discriminators import power_iteration
from latentvae.losses.posterior import (
    ActiveUnits,
    capacity,
    capacity_kl,
    free_bits_kl,
    kl_warmup,
)
from latentvae.outputs import AutoencoderOutput
from latentvae.training.base import BASE_NAME, open_base, with_shape_of
from latentvae.training.batches import batches
from latentvae.training.checkpoint import PREFIX, load_checkpoint, save_checkpoint
from latentvae.training.codebook import CodebookUpdate, temperature
from latentvae.training.config import TrainConfig, flat
from latentvae.training.exporting import averaged_weights, export_run, is_exported
from latentvae.training.interrupt import Interrupt
from latentvae.training.log import MeanWindow, RunLog
from latentvae.training.plan import plan
from latentvae.training.publishing import check_push, push_export, repository
from latentvae.training.randomness import Stream, seed_everything
from latentvae.training.resume import prepare_folder
from latentvae.training.run import (
    Run,
    build_run,
    check_paths,
    eval_transform,
    open_data,
    start_accelerator,
)
from latentvae.training.schedule import adversarial_factor, critic_learns_alone, learning_rate
from latentvae.training.state import Progress, restore, take_snapshot
from latentvae.training.tracker import close_tracker, start_tracker
from latentvae.training.update import Adversary, backward_critic, backward_model, clip_gradients
from latentvae.training.validate import first_readable, sample_grid_path, save_grid, validate


class Stopped(Exception):
    """A signal told the run to stop; it finished the update and saved."""

    def __init__(self, signal: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by signal {signal} and saved {checkpoint}; the same command goes on "
            "from there"
        )
        self.signal = signal


def train(config: TrainConfig) -> Path:
    """Train, validate and export; returns the export's folder. The same call again goes on where
    the last one ended.

    Raises:
        UserError: a wrong option, path or image folder; before any work.
        UploadError: the run is done and exported, but the Hub did not take it.
        Stopped: after SIGTERM or SIGINT, with everything saved.
    """
    folder = check_paths(config)
    base = open_base(config)
    config = with_shape_of(config, base)
    data = open_data(config)
    accelerator = start_accelerator(config, folder)
    if not isinstance(data[0], ImageStream):  # is there one batch for each rank?
        IndexSampler(
            len(data[0]), config.run.train_batch_size, seed=0, world_size=accelerator.num_processes
        )
    options = config.run
    if options.push_to_hub:
        check_push(repository(options.hub_model_id, folder), private=options.hub_private_repo)
    checkpoint = prepare_folder(config, folder)
    if is_main():
        if base is not None:
            base.write(folder)
        else:
            (folder / BASE_NAME).unlink(missing_ok=True)  # of a fine-tuning that never began
    run = build_run(
        config,
        folder=folder,
        accelerator=accelerator,
        data=data,
        base=base,
        from_checkpoint=checkpoint is not None,
    )
    progress = Progress(critic_start=config.critic_start)
    if checkpoint is not None:
        progress = restore(run, load_checkpoint(checkpoint))
    try:
        _train_and_export(run, progress)
    finally:
        close_tracker(accelerator)
        accelerator.end_training()  # ends the process group
    export = folder / "export"
    if options.push_to_hub and accelerator.is_main_process:  # no rank waits, so none times out
        push_export(
            export,
            repo_id=repository(options.hub_model_id, folder),
            private=options.hub_private_repo,
            update=progress.update,
        )
    return export


def _train_and_export(run: Run, progress: Progress) -> None:
    if progress.update >= run.config.run.max_train_steps:
        run.accelerator.print(
            f"the run in '{run.folder}' has made all its {progress.update:,} updates"
        )
        if from_main(is_exported(run.folder, progress.update)):
            return
    _train(run, progress)
    export_run(run, update=progress.update)


def _train(run: Run, progress: Progress) -> None:
    options = run.config.run
    first_readable(run.validation_images, eval_transform(run.config), count=1)
    loader, steps_per_epoch = batches(run, start_step=progress.micro_step)
    run.accelerator.print(plan(run, steps_per_epoch=steps_per_epoch, start=progress.update))
    start_tracker(
        run.accelerator,
        options.report_to,
        folder=run.folder,
        project=options.tracker_project_name,
        options=flat(run.config),
    )
    log = RunLog(
        run.folder,
        run.accelerator,
        start=progress.update,
        total=options.max_train_steps,
        images_per_update=run.images_per_update,
    )
    with Interrupt() as interrupt, contextlib.closing(log):
        loop = _Loop(run, progress, log=log, interrupt=interrupt)
        loop.catch_up()
        loop.go(iter(loader))


class _Loop:
    """Updates until the end or a signal, with what happens between them."""

    def __init__(self, run: Run, progress: Progress, *, log: RunLog, interrupt: Interrupt) -> None:
        self.run = run
        self.progress = progress
        self.log = log
        self.interrupt = interrupt
        self.window = MeanWindow(run.accelerator.device, saved=progress.window)
        self.units = ActiveUnits(
            run.config.model.latent_channels,
            device=run.accelerator.device,
            saved=progress.units or None,
        )
        self.means: list[Tensor] = []  # of the posteriors, in this update's micro-steps
        quantizer = getattr(run.net, "quantize", None)
        self.codebook = CodebookUpdate(quantizer, seed=run.config.run.seed)
        self.bad = BadImages()
        self.bad.update(progress.bad_images)
        self.unnamed: list[tuple[str, str]] = []
        self.bad_validation = BadImages()

    def go(self, batches: Iterator[Batch]) -> None:
        options, progress = self.run.config.run, self.progress
        while progress.update < options.max_train_steps:
            signal = self._update(batches)
            last = progress.update == options.max_train_steps
            self.log.step()
            if progress.update % options.log_steps == 0 or last:
                self._row()
            if progress.update % options.checkpointing_steps == 0 or last or signal:
                checkpoint = self._save()
                if signal and not last:
                    raise Stopped(signal, checkpoint)
            if self._validation_is_due():
                self._validate()

    def catch_up(self) -> None:
        """Make up for a validation that a kill or a signal came before."""
        if from_main(self._validation_is_due() and not self.log.has_validation):
            self._validate()

    def _validation_is_due(self) -> bool:
        options, update = self.run.config.run, self.progress.update
        return update > 0 and (
            update % options.validation_steps == 0 or update == options.max_train_steps
        )

    def _update(self, batches: Iterator[Batch]) -> int:
        """One update of the model and, once it has started, of the critic; returns the signal to
        stop, or 0."""
        run, progress = self.run, self.progress
        self._set_learning_rates()
        adversary = self._adversary()
        micro_steps = run.config.run.gradient_accumulation_steps
        logged: list[dict[str, Tensor]] = []
        for i in range(micro_steps):
            batch = next(batches)
            self.unnamed += batch.bad
            with self._synchronised(i == micro_steps - 1):
                logged.append(self._micro_step(batch, adversary))
            progress.micro_step += 1
        norms = {
            "grad/model": clip_gradients(
                run.wrapper.parameters(), run.config.optimizer.max_grad_norm
            )
        }
        if adversary is not None:
            norms["grad/critic"] = clip_gradients(
                adversary.critic.parameters(), run.config.optimizer.max_grad_norm
            )
        finite, signal = self._verdict(norms)
        if finite:
            self._step(adversary)
            learned = self.codebook.apply(
                progress.update, optimizer=run.optimizer, averages=run.averages()
            )
            for values in (*logged, norms, learned):
                self.window.add(values)
            self._observe(adversary, logged)
        self.means.clear()
        self.codebook.clear()
        self._count_skipped(finite)
        run.optimizer.zero_grad()
        if run.critic_optimizer is not None:
            run.critic_optimizer.zero_grad()
        progress.update += 1
        return signal

    def _micro_step(self, batch: Batch, adversary: Adversary | None) -> dict[str, Tensor]:
        """Add the gradients of one batch; returns what to log."""
        run, options = self.run, self.run.config.run
        seed_everything(Stream.MICRO_STEP, options.seed, self.progress.micro_step, rank())
        images = batch.images.to(run.accelerator.device, non_blocking=True)
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
                kl=self._controlled_kl(out),
                background=background,
                divide_by=options.gradient_accumulation_steps,
            )
            if out.mean is not None:
                self.means.append(out.mean.detach())
            self.codebook.add(out)
        if adversary is not None:
            logged |= backward_critic(
                images,
                run.objective.picture(out.recon.detach()),
                adversary=adversary,
                background=background,
                divide_by=options.gradient_accumulation_steps,
            )
        logged |= {
            "latent/rms": out.z.detach().square().mean().sqrt(),
            "objective/output_logvar": out.output_logvar.detach(),
        }
        if out.kl_per_channel is None or out.kl is None:
            return logged
        nats = out.kl.detach().mean()
        return logged | {
            "latent/kl_nats": nats,
            "latent/kl_bits_per_element": nats / (math.log(2.0) * _kl_elements(out)),
        }

    def _critic_learns_alone(self) -> bool:
        return critic_learns_alone(
            self.progress.update, start=self.progress.critic_start, critic=self.run.config.critic
        )

    def _adversary(self) -> Adversary | None:
        run, options = self.run, self.run.config.critic
        factor = adversarial_factor(
            self.progress.update, start=self.progress.critic_start, critic=options
        )
        if factor is None or run.critic is None or run.critic_prepared is None:
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

    def _controlled_kl(self, out: AutoencoderOutput) -> Tensor | None:
        """What stands in for the mean KL in the loss, nats per image; None: the KL itself."""
        options, update = self.run.config.objective, self.progress.update
        if out.kl is None or out.kl_per_channel is None:
            return None
        if not (options.kl_warmup_steps or options.free_bits or options.kl_capacity):
            return None
        factor = kl_warmup(update, options.kl_warmup_steps)
        if options.free_bits:
            positions = out.z[0, 0].numel()
            kl = free_bits_kl(out.kl_per_channel, bits=options.free_bits, positions=positions)
        elif options.kl_capacity:
            bits = capacity(
                update, target=options.kl_capacity, growth_updates=options.kl_capacity_steps
            )
            kl = capacity_kl(out.kl, bits=bits, elements=_kl_elements(out))
        else:
            kl = out.kl.mean()
        return factor * kl

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Reduce gradients over ranks in the last micro-step only."""
        with contextlib.ExitStack() as stack:
            if not last:
                stack.enter_context(self.run.accelerator.no_sync(self.run.prepared))
                if self.run.critic_prepared is not None:
                    stack.enter_context(self.run.accelerator.no_sync(self.run.critic_prepared))
            yield

    def _set_learning_rates(self) -> None:
        config = self.run.config
        for optimizer, peak in (
            (self.run.optimizer, config.optimizer.learning_rate),
            (self.run.critic_optimizer, config.critic.disc_learning_rate),
        ):
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] = learning_rate(self.progress.update, peak=peak, config=config)

    def _verdict(self, norms: dict[str, Tensor]) -> tuple[bool, int]:
        """Whether all gradients on all ranks are finite, and the signal any rank has had: the
        update's one host sync."""
        finite = torch.stack([norm.isfinite() for norm in norms.values()]).all()
        signal = torch.full_like(finite, self.interrupt.requested, dtype=torch.float32)
        not_finite, signal = all_reduce_max(torch.stack([(~finite).float(), signal])).tolist()
        return not_finite == 0, int(signal)

    def _step(self, adversary: Adversary | None) -> None:
        run = self.run
        if not self._critic_learns_alone():
            run.optimizer.step()
        if adversary is not None and run.critic_optimizer is not None:
            run.critic_optimizer.step()
            power_iteration(adversary.critic)
        if run.ema is not None and not self._critic_learns_alone():
            run.ema.step(run.net.parameters())

    def _observe(self, adversary: Adversary | None, logged: Sequence[dict[str, Tensor]]) -> None:
        """What follows the updates: active units, LeCam's averages."""
        for mean in self.means:
            self.units.add(mean)
        if adversary is not None and self.run.lecam is not None:
            real, fake = (
                torch.stack([values[f"critic/logits_{kind}"] for values in logged]).mean()
                for kind in ("real", "fake")
            )
            self.run.lecam.update(real, fake)

    def _count_skipped(self, finite: bool) -> None:
        progress, allowed = self.progress, self.run.config.optimizer.max_skipped_updates
        if finite:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.log.say(
            f"update {progress.update + 1} skipped: its gradient is not finite "
            f"({progress.skipped} skipped so far)"
        )
        if progress.skipped_in_a_row >= allowed:
            raise RuntimeError(
                f"{allowed} updates in a row had gradients that are not finite, the last is "
                f"{progress.update + 1}; the checkpoints are "
                "untouched. Try a lower learning_rate, --mixed_precision no, or a later disc_start"
            )

    def _row(self) -> None:
        config, progress = self.run.config, self.progress
        self._name_bad_images()
        rate = learning_rate(
            progress.update - 1, peak=config.optimizer.learning_rate, config=config
        )
        means = self.window.means()
        if (active := self.units.count()) is not None:
            means["latent/active_units"] = active
        self.log.row(
            progress.update,
            {
                **means,
                "optimizer/learning_rate": rate,
                "data/bad_images": len(self.bad),
                "optimizer/skipped": progress.skipped,
            },
        )

    def _name_bad_images(self) -> None:
        """Name each unreadable file once, over all ranks; stop if there are too many."""
        for found in gather_objects(self.unnamed):
            for name, reason in self.bad.update(found):
                self.log.say(
                    f"cannot read {printable(name)} ({printable(reason)}); another image takes its "
                    "place"
                )
        self.unnamed = []
        images = self.run.train_images
        if isinstance(images, ImageStream):
            seen = self.progress.micro_step * self.run.config.run.train_batch_size * world_size()
            total = images.num_images or max(seen, 1)
        else:
            total = len(images)
        self.bad.check(total, self.run.config.data.max_bad_share)

    def _validate(self) -> None:
        """Measure the averaged weights and draw the grid."""
        run, config = self.run, self.run.config
        transform, device = eval_transform(config), run.accelerator.device
        bad = BadImages()
        with self.log.pause(), averaged_weights(run.net, run.ema):
            values = validate(
                run.net,
                run.validation_images,
                transform=transform,
                perceptual=run.metric,
                batch_size=config.run.eval_batch_size,
                limit=config.data.max_validation_images,
                device=device,
                bad=bad,
            )
            for found in gather_objects(list(bad.reasons.items())):
                for name, reason in self.bad_validation.update(found):
                    self.log.say(f"cannot validate on {printable(name)} ({printable(reason)})")
            grid = sample_grid_path(run.folder, self.progress.update)
            if is_main():
                save_grid(
                    run.net,
                    run.validation_images,
                    grid,
                    transform=transform,
                    count=config.run.num_sample_images,
                    device=device,
                )
        self.log.write(self.progress.update, values)
        self.log.picture(self.progress.update, grid)
        codes = ""
        if "validation/usage" in values:
            codes = (
                f"{values['validation/usage']:.1%} of the codes used by "
                f"{values['validation/tokens']:,} tokens, perplexity "
                f"{values['validation/perplexity']:.0f}, "
            )
        self.log.say(
            f"update {self.progress.update:,}: PSNR {values['validation/psnr']:.2f} dB, "
            f"SSIM {values['validation/ssim']:.3f}, LPIPS {values['validation/lpips']:.3f}, "
            f"{codes}on {values['validation/images']:,} unseen images"
        )

    def _save(self) -> Path:
        options, progress = self.run.config.run, self.progress
        self._name_bad_images()
        with self.log.pause():
            progress.window = self.window.state()
            progress.units = self.units.state()
            progress.bad_images = list(self.bad.reasons.items())
            snapshot = take_snapshot(self.run, progress)
            path = self.run.folder / f"{PREFIX}{progress.update}"
            if is_main():
                save_checkpoint(
                    self.run.folder,
                    snapshot,
                    update=progress.update,
                    keep=options.checkpoints_total_limit,
                )
            barrier()
        return path


def _kl_elements(out: AutoencoderOutput) -> int:
    """Latent elements of an image that the KL is a sum over; of Gumbel-softmax its tokens."""
    assert out.kl_per_channel is not None
    return out.kl_per_channel.shape[1] * out.z[0, 0].numel()
