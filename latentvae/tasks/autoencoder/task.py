"""Define the task "autoencoder": train an autoencoder on images with several loss terms.

From Python, start a training with this task as follows:

    from latentvae.tasks.autoencoder import load_preset
    from latentvae.tasks.autoencoder.task import AutoencoderTask

    export = engine.loop.train(AutoencoderTask(load_preset("kl_small")))
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from latentvae.data import BadImages, Batch, ImageStream
from latentvae.engine.progress import not_of_a_run
from latentvae.losses.posterior import ActiveUnits
from latentvae.models import calls
from latentvae.tasks.autoencoder import plan_rows, reach, refusals
from latentvae.tasks.autoencoder.build_parts import open_features
from latentvae.tasks.autoencoder.collapse_watch import CollapseWatch, Finding, what_to_watch
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.discretise import check_discretising, warmup_steps
from latentvae.tasks.autoencoder.fine_tuning import BASE_NAME, open_base, with_shape_of
from latentvae.tasks.autoencoder.images import eval_transform
from latentvae.tasks.autoencoder.run_export import done, export_of_run, is_whole, options_of_export
from latentvae.tasks.autoencoder.state import AutoencoderState, KLTargetState, RankState
from latentvae.tasks.autoencoder.update_step import LearningAutoencoder
from latentvae.tasks.autoencoder.validate import save_grid, validate, validation_line
from latentvae.tasks.image_task import ImageTask


class AutoencoderTask(ImageTask, LearningAutoencoder):
    """Train an autoencoder on images."""

    config: TrainConfig
    config_class = TrainConfig
    state_class, rank_state_class = AutoencoderState, RankState
    title, shown = "Autoencoder", ("loss/rec", "loss/lpips")
    files, parts = (BASE_NAME,), {"codebook": "net.quantize."}
    non_finite_advice = ", or a later disc_start"
    launch = ("-m", "latentvae.cli.train")

    # before the run

    def check(self) -> None:
        refusals.check_images(self.config)
        reach.check_model_learns(self.config)

    def open(self) -> None:
        self.base = open_base(self.config)
        check_discretising(self.config, self.base)
        self.config = with_shape_of(self.config, self.base)
        self.open_images()
        self.features = open_features(self.config)
        if self.features is not None:
            self._identity["feature_loss"] = self.features.weights_id

    def check_processes(self, processes: int) -> None:
        super().check_processes(processes)
        refusals.check_compilation(self.config, processes=processes)

    def build(self, accelerator: Accelerator, *, resumed: bool) -> None:
        super().build(accelerator, resumed=resumed)
        self.begin_images()
        self._watch_from_here({})

    def write_files(self, folder: Path) -> None:
        if self.base is not None:
            self.base.write(folder)
        else:
            # A fine-tuning that ended before its first update may have left this file.
            (folder / BASE_NAME).unlink(missing_ok=True)

    def plan(self) -> dict[str, str]:
        return plan_rows.plan(self)

    def warnings(self) -> list[str]:
        few = reach.few_validation_images(
            self.config,
            count=len(self.validation_images),
            training=None if isinstance(self.train_images, ImageStream) else len(self.train_images),
        )
        return [*reach.without_effect(self.config), *few]

    def memory_advice(self) -> list[str]:
        return refusals.memory_advice(self.config, super().memory_advice())

    # an update

    def begin(self, update: int) -> None:
        if self.progress.discriminator_stopped is not None:
            self.say(
                "the discriminator has been off since update "
                f"{self.progress.discriminator_stopped:,}"
            )
        # A resume with a new `--disc_watch disable` may switch the discriminator off now.
        self._tell([], update)

    def micro_step(self, batch: Batch, update: int) -> dict[str, Tensor]:
        self.saw(batch)
        return super().micro_step(batch, update)

    # between updates

    def row(self, update: int, means: Mapping[str, float]) -> dict[str, float]:
        self.name_bad_images()
        own: dict[str, float] = {}
        if (active := self.units.count()) is not None:
            own["latent/active_units"] = active
        findings = self.watch.row(update, {**means, **own})
        own |= {**self.watch.flags(), "data/bad_images": len(self.bad)}
        self._tell(findings, update)
        return own

    def validate(self, update: int) -> dict[str, float]:
        bad = BadImages()
        values = validate(
            self.net,
            self.validation_images,
            transform=eval_transform(self.config),
            perceptual=self.metric,
            batch_size=self.config.run.eval_batch_size,
            limit=self.config.data.max_validation_images,
            device=self.accelerator.device,
            bad=bad,
        )
        self.name_bad_validation_images(bad)
        return values

    def save_samples(self, path: Path) -> bool:
        save_grid(
            self.net,
            self.validation_images,
            path,
            transform=eval_transform(self.config),
            count=self.config.run.num_sample_images,
            device=self.accelerator.device,
        )
        return True

    def validation_line(self, values: Mapping[str, float]) -> str:
        return validation_line(values)

    def validated(self, update: int, values: Mapping[str, float]) -> None:
        self._tell(self.watch.validation(update, values), update)

    def summary(self) -> str | None:
        return self.watch.summary()

    def _tell(self, findings: list[Finding], update: int) -> None:
        """Print new warnings.

        With `--disc_watch disable`, switch the discriminator off if it is a possible cause of a
        problem that is present now.
        """
        for found in findings:
            self.say(f"watch, update {update:,}: {found.sentence}")
        disable = self.config.discriminator.disc_watch == "disable"
        if (
            disable
            and self.progress.discriminator_stopped is None
            and self.watch.blames_discriminator()
        ):
            # All ranks have the same warnings, so they make the same decision.
            self.progress.discriminator_stopped = update
            self.watch.discriminator_stops(update)
            self.say(
                f"watch, update {update:,}: the discriminator is switched off for the rest of "
                "the run (--disc_watch disable)"
            )

    def _watch_from_here(self, saved: dict[str, Any]) -> None:
        self.watch = CollapseWatch(
            what_to_watch(
                self.config,
                discriminator_start=self.progress.discriminator_start,
                num_codes=calls.num_codes(self.net),
                discriminator_stopped=self.progress.discriminator_stopped is not None,
            ),
            saved=saved,
        )

    # checkpoints

    def state(self) -> AutoencoderState:
        self.name_bad_images()
        bad = [list(entry) for entry in self.bad.reasons.items()]
        changes = {"bad_images": bad, "watch": self.watch.state_dict()}
        if (target := self.objective.kl_target) is not None:
            changes["kl_target"] = KLTargetState(**target.state_dict())
        return self.progress.model_copy(update=changes)

    def load_state(self, state: AutoencoderState, *, update: int) -> None:
        started = state.discriminator_start <= update
        if not started:  # changed options may still change when the discriminator starts
            state = state.model_copy(
                update={"discriminator_start": self.config.discriminator_start}
            )
        self.progress = state
        if (target := self.objective.kl_target) is not None:
            target.load_state_dict(state.kl_target.model_dump())
        self.bad.update((name, reason) for name, reason in state.bad_images)
        self._watch_from_here(state.watch)

    def rank_state(self) -> RankState:
        return RankState(units=self.units.state())

    def load_rank_state(self, state: RankState) -> None:
        d = self.config.model.latent_channels
        if state.units and [len(row) for row in state.units] != [d] * 3:
            raise not_of_a_run(f"units: not 3 x {d} sums for each process")
        if any(
            not math.isfinite(n) or n < 0 or n % 1 or n > 2**53 for n in (state.units or [[]])[0]
        ):
            raise not_of_a_run("units: a count is not a whole number from 0 to 2^53")
        device = self.accelerator.device
        self.units = ActiveUnits(d, device=device, saved=state.units or None)

    # the end

    def export(self, out: Path, *, update: int, folder: Path) -> dict[str, Any]:
        return export_of_run(
            self.net,
            self.config,
            images=(self.statistics_images, self.validation_images),
            update=update,
            folder=folder,
            out=out,
            device=self.accelerator.device,
            base=self.base,
        )

    def export_options(self) -> dict[str, Any]:
        return options_of_export(self.config)

    def has_export(self, out: Path) -> bool:
        return is_whole(out)

    def done(self, out: Path) -> str:
        return done(out)

    # proofs

    @classmethod
    def shortened(cls, config: TrainConfig, *, updates: int) -> TrainConfig:
        early, discriminator = updates // 4, config.discriminator
        sections: dict[str, dict[str, Any]] = {
            "data": {"max_validation_images": min(config.data.max_validation_images, 8)},
            "discriminator": {
                "disc_start": float(early),
                "disc_warmup_steps": min(discriminator.disc_warmup_steps, early),
                "disc_ramp_steps": min(discriminator.disc_ramp_steps, early),
            },
            "run": {"num_sample_images": 1},
        }
        if steps := warmup_steps(config):
            sections["model"] = {"quantizer_warmup_steps": min(steps, early)}
        return config.with_changes(sections)
