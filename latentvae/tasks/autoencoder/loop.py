"""The training loop: one forward per micro-step, straight down, then the critic; the same for any
number of ranks."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from latentvae.compute.memory import keep_freed_memory
from latentvae.config.autoencoder import TrainConfig, flat
from latentvae.config.presets import checked
from latentvae.data import (
    BadImages,
    Batch,
    ImageSource,
    ImageStream,
    IndexSampler,
    some_of,
)
from latentvae.distributed import (
    barrier,
    from_main,
    gather_objects,
    is_main,
    world_size,
)
from latentvae.engine.checkpoint import PREFIX, load_checkpoint, save_checkpoint
from latentvae.engine.data_wait import DataWait
from latentvae.engine.lock import locked
from latentvae.engine.log import MeanWindow, RunLog
from latentvae.engine.publishing import check_push, push_export, repository
from latentvae.engine.signals import Interrupt
from latentvae.engine.tracker import close_tracker, start_tracker
from latentvae.errors import RunError, printable
from latentvae.losses.posterior import ActiveUnits
from latentvae.models.calls import num_codes
from latentvae.tasks.autoencoder.base import Base, open_base, with_shape_of
from latentvae.tasks.autoencoder.batches import batches
from latentvae.tasks.autoencoder.exporting import averaged_weights, export_run, is_exported
from latentvae.tasks.autoencoder.failures import explained
from latentvae.tasks.autoencoder.non_finite import describe
from latentvae.tasks.autoencoder.plan import plan
from latentvae.tasks.autoencoder.refusals import check_compilation, check_paths
from latentvae.tasks.autoencoder.resume import find_start, take_folder
from latentvae.tasks.autoencoder.run import (
    Run,
    build_run,
    end_accelerator,
    eval_transform,
    open_data,
    start_accelerator,
)
from latentvae.tasks.autoencoder.schedule import learning_rate
from latentvae.tasks.autoencoder.state import Progress, restore, take_snapshot
from latentvae.tasks.autoencoder.updates import Made, Updates
from latentvae.tasks.autoencoder.validate import (
    readable_images,
    sample_grid_path,
    save_grid,
    validate,
)
from latentvae.tasks.autoencoder.watch import CollapseWatch, Finding, what_to_watch


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
        RunError: the machine did not let it end: a full disk, no memory, a process that died.
        UploadError: the run is done and exported, but the Hub did not take it.
        Stopped: after SIGTERM or SIGINT, with everything saved.
    """
    config = checked(config)
    folder = check_paths(config)
    base = open_base(config)
    config = with_shape_of(config, base)
    data = open_data(config)
    accelerator = start_accelerator(config, folder)
    options, processes = config.run, accelerator.num_processes
    try:
        keep_freed_memory(accelerator.device)
        if not isinstance(data[0], ImageStream):  # is there one batch for each rank?
            IndexSampler(len(data[0]), config.images_read, seed=0, world_size=processes)
        check_compilation(config, processes=processes)
        if options.push_to_hub:
            check_push(repository(options.hub_model_id, folder), private=options.hub_private_repo)
        with explained(config), locked(folder):
            update = _run(config, folder=folder, accelerator=accelerator, data=data, base=base)
    finally:
        close_tracker(accelerator)
        end_accelerator(accelerator)
    export = folder / "export"
    if options.push_to_hub and accelerator.is_main_process:  # no rank waits, so none times out
        push_export(
            export,
            repo_id=repository(options.hub_model_id, folder),
            private=options.hub_private_repo,
            update=update,
        )
    return export


def _run(
    config: TrainConfig,
    *,
    folder: Path,
    accelerator: Accelerator,
    data: tuple[ImageSource | ImageStream, ImageSource],
    base: Base | None,
) -> int:
    """From the folder to the export; returns the updates done."""
    checkpoint = find_start(config, folder)
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
    if progress.update < config.run.max_train_steps:
        validated = some_of(run.validation_images, config.data.max_validation_images)
        readable_images(validated, eval_transform(config), count=1)
    take_folder(config, folder, checkpoint=checkpoint, base=base)
    _train_and_export(run, progress)
    return progress.update


def _train_and_export(run: Run, progress: Progress) -> None:
    if progress.update >= run.config.run.max_train_steps:
        run.accelerator.print(
            f"the run in '{run.folder}' has made all its {progress.update:,} updates"
        )
        if from_main(is_exported(run.folder, progress.update, config=run.config)):
            return
    _train(run, progress)
    export_run(run, update=progress.update)


def _train(run: Run, progress: Progress) -> None:
    options = run.config.run
    loader, steps_per_epoch = batches(run, start_step=progress.micro_step)
    run.accelerator.print(plan(run, steps_per_epoch=steps_per_epoch, start=progress.update))
    start_tracker(
        run.accelerator,
        options.report_to,
        folder=run.folder,
        project=options.tracker_project_name,
        options=flat(run.config),
    )
    waiting = DataWait(
        loader,
        num_workers=run.config.data.dataloader_num_workers,
        num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    log = RunLog(
        run.folder,
        run.accelerator,
        start=progress.update,
        total=options.max_train_steps,
        images_per_update=run.images_per_update,
        waiting=waiting,
    )
    with Interrupt() as interrupt, contextlib.closing(log):
        loop = _Loop(run, progress, log=log, interrupt=interrupt)
        try:
            loop.catch_up()
            loop.go(waiting)
        finally:
            loop.tell_what_was_seen()


class _Loop:
    """Updates until the end or a signal, with what happens between them."""

    def __init__(self, run: Run, progress: Progress, *, log: RunLog, interrupt: Interrupt) -> None:
        self.run = run
        self.progress = progress
        self.log = log
        self.updates = Updates(run, progress, requested=lambda: interrupt.requested)
        self.window = MeanWindow(run.accelerator.device, saved=progress.window)
        self.units = ActiveUnits(
            run.config.model.latent_channels,
            device=run.accelerator.device,
            saved=progress.units or None,
        )
        self.bad = BadImages()
        self.bad.update(progress.bad_images)
        self.unnamed: list[tuple[str, str]] = []
        self.bad_validation = BadImages()
        self.watch = CollapseWatch(
            what_to_watch(
                run.config,
                critic_start=progress.critic_start,
                num_codes=num_codes(run.net),
                critic_stopped=progress.critic_stopped is not None,
            ),
            saved=progress.watch,
        )
        if progress.critic_stopped is not None:
            self.log.say(f"the critic is off since update {progress.critic_stopped:,}")

    def go(self, batches: Iterator[Batch]) -> None:
        options, progress = self.run.config.run, self.progress
        while progress.update < options.max_train_steps:
            made = self.updates.make(batches)
            self._take(made)
            last = progress.update == options.max_train_steps
            self.log.step()
            if progress.update % options.log_steps == 0 or last:
                self._row()
            if progress.update % options.checkpointing_steps == 0 or last or made.signal:
                checkpoint = self._save()
                if made.signal and not last:
                    raise Stopped(made.signal, checkpoint)
            if self._validation_is_due():
                self._validate()

    def catch_up(self) -> None:
        """Make up for a validation that a kill or a signal came before; the watch, saved before
        it, sees one that was made. What was found before, a run that goes on with `--critic_watch
        disable` acts on now."""
        self._tell([])
        made = from_main(self.log.validation)
        if made is not None:
            self._tell(self.watch.validation(self.progress.update, made))
        elif self._validation_is_due():
            self._validate()

    def tell_what_was_seen(self) -> None:
        if (summary := self.watch.summary()) is not None:
            self.log.say(summary)

    def _tell(self, findings: list[Finding]) -> None:
        """Say what the watch found, and do what it is asked to. All ranks decide the same."""
        progress = self.progress
        for found in findings:
            self.log.say(f"watch, update {progress.update:,}: {found.sentence}")
        disable = self.run.config.critic.critic_watch == "disable"
        if disable and progress.critic_stopped is None and self.watch.blames_critic():
            progress.critic_stopped = progress.update
            self.watch.critic_stops(progress.update)
            self.log.say(
                f"watch, update {progress.update:,}: the critic is switched off for the rest of "
                "the run (--critic_watch disable)"
            )

    def _validation_is_due(self) -> bool:
        options, update = self.run.config.run, self.progress.update
        return update > 0 and (
            update % options.validation_steps == 0 or update == options.max_train_steps
        )

    def _take(self, made: Made) -> None:
        """Add an update to what the next row tells; end a run whose gradients stay non-finite."""
        self.unnamed += made.bad
        if made.finite:
            for values in made.values:
                self.window.add(values)
            for mean in made.means:
                self.units.add(mean)
            return
        progress, allowed = self.progress, self.run.config.optimizer.max_skipped_updates
        reason = describe(made.values, made.indices, self.run.train_images)
        self.log.say(
            f"update {progress.update} skipped: its gradient is not finite ({reason}; "
            f"{progress.skipped} skipped so far)"
        )
        if progress.skipped_in_a_row >= allowed:
            raise RunError(
                f"{allowed} updates in a row had gradients that are not finite, the last is "
                f"{progress.update} ({reason}); the checkpoints are untouched. "
                " Try a lower learning_rate, --mixed_precision no, or a later disc_start"
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
        findings = self.watch.row(progress.update, means)
        self.log.row(
            progress.update,
            {
                **means,
                **self.watch.flags(),
                "optimizer/learning_rate": rate,
                "data/bad_images": len(self.bad),
                "optimizer/skipped": progress.skipped,
            },
        )
        self._tell(findings)

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
            seen = self.progress.micro_step * self.run.config.images_read * world_size()
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
        self._tell(self.watch.validation(self.progress.update, values))

    def _save(self) -> Path:
        options, progress = self.run.config.run, self.progress
        self._name_bad_images()
        with self.log.pause():
            progress.window = self.window.state()
            progress.units = self.units.state()
            progress.bad_images = list(self.bad.reasons.items())
            progress.watch = self.watch.state_dict()
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
