"""Measure autoencoders and image codecs on the same pictures, under one stated protocol.

    models = {"mine": latentvae.load("runs/mine/export")}
    source = open_source("photos")
    report = evaluate(models, source, Path("report"), data_name="photos", lpips=lpips)

Each picture is resized as the protocol of the report says. Every model and codec encodes and
decodes the picture. The decoded picture is rounded to 8 bits and compared with the original. Memory
holds only a few pictures at a time, besides sums and features for the metrics. To continue a
stopped evaluation, call `evaluate` again with the same arguments.
"""

import contextlib
import csv
import hashlib
import itertools
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from latentvae.autoencoder import Autoencoder, NotFiniteError
from latentvae.coding.image_codecs import available_codecs
from latentvae.compute.precision import full_float32
from latentvae.data import ImageSource, UnreadableImage, spread
from latentvae.data.buckets import bucket_sizes
from latentvae.errors import UserError
from latentvae.evaluation.checks import check_names, check_options, check_resolution, check_sides
from latentvae.evaluation.codec_rows import codec_rows, encode_picture
from latentvae.evaluation.curves import Curves, bd_rates
from latentvae.evaluation.examinations import Examination, examinations
from latentvae.evaluation.linear_baseline import baselines, verdict
from latentvae.evaluation.measures import CSV_COLUMNS, Judge, Means, Row
from latentvae.evaluation.model_evaluation import Encoded, ModelMeasures
from latentvae.evaluation.phases import Phases
from latentvae.evaluation.picture_source import Pictures, Seen, to_picture
from latentvae.evaluation.protocol import protocol
from latentvae.evaluation.saved_progress import Accumulator, Progress
from latentvae.evaluation.settings import FULL, Plan
from latentvae.evaluation.sheet import reconstruct_for_sheet, sheet, sheet_row
from latentvae.losses.perceptual import PerceptualLoss
from latentvae.report.figures import rate_figure
from latentvae.report.schema import ModelReport, Report

SAVE_SECONDS = 30.0  # shortest time between two saved states
# Entries of the protocol that may change when a stopped evaluation continues.
CIRCUMSTANCES = ("device", "threads")


@full_float32()
def evaluate(
    models: Mapping[str, Autoencoder],
    source: ImageSource,
    out: Path,
    *,
    data_name: str,
    lpips: Mapping[str, PerceptualLoss],
    inception: Any | None = None,
    plan: Plan = FULL,
    max_images: int | None = None,
    sheet_images: int = 4,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> Report:
    """Measure models and codecs, write the report into `out`, and return the report.

    The files are report.json, per_image.csv, and the pictures rate.png and sheet.png. A file is
    missing if no section of the plan needs it. For example, rate.png needs the section `rate`.

    Args:
        models: the autoencoders, by their names in the report.
        source: the images. Unreadable images are left out, and the report lists their names.
        data_name: name of the source in the report.
        lpips: `PerceptualLoss` for each of `plan.lpips_nets`.
        inception: the network that `metrics.inception.load_inception` returns. With None, rFID and
            KID are not measured.
        plan: says what is measured, and with which settings.
        max_images: measure at most this many images, evenly spread over the source.
        sheet_images: number of images in sheet.png, evenly spread over the measured images.
        overwrite: delete an earlier evaluation in `out`, and start a new evaluation.
        device: where the metrics run. The models are not moved to this device.

    Raises:
        UserError: an argument is wrong, a model does not support the images' sizes, `out` holds
            another evaluation, or no image can be read.
    """
    check_options(models, lpips, plan=plan, sheet_images=sheet_images)

    evaluation = _Evaluation(
        models, source, out, data_name, lpips, inception, plan, max_images, device
    )
    return evaluation(sheet_images=sheet_images, overwrite=overwrite)


class _Evaluation:
    """Holds the models, pictures and metrics of one evaluation, and runs its phases in order."""

    def __init__(
        self,
        models: Mapping[str, Autoencoder],
        source: ImageSource,
        out: Path,
        data_name: str,
        lpips: Mapping[str, PerceptualLoss],
        inception: Any | None,
        plan: Plan,
        max_images: int | None,
        device: torch.device | str,
    ) -> None:
        # models and pictures
        self.models, self.out, self.plan, self.data_name = dict(models), out, plan, data_name
        self.device = torch.device(device)
        indices = spread(len(source), max_images)
        self.pictures = Pictures(source, indices, sizes=_shapes(plan, self.models))

        # metrics and codecs
        on_device = {net: loss.to(self.device) for net, loss in lpips.items()}
        self.judge = Judge(on_device, None if inception is None else inception.to(self.device))
        self.codecs = available_codecs(plan.qualities) if plan.qualities else {}
        self.thread = ThreadPoolExecutor(max_workers=1)

        # results
        self.seen, self.codec_means, self.curves = Seen(), Means(), Curves()
        self.measures = {
            name: ModelMeasures(
                name, model, judge=self.judge, plan=plan, num_pictures=len(self.pictures)
            )
            for name, model in self.models.items()
        }
        sizes = [(m.f, m.latent_channels) for m in self.models.values() if not m.num_codes]
        compares = "distortion" in plan.sections
        self.linear = baselines(sizes if compares else [], judge=self.judge)
        check_names(self.models, [linear.name for linear in self.linear.values()])
        self.examined: dict[str, dict[str, Any]] = {name: {} for name in self.models}
        self.phases = Phases(self._num_phases())

    def __call__(self, *, sheet_images: int, overwrite: bool) -> Report:
        progress = Progress(self.out, self._task(), overwrite=overwrite)
        if progress.finished:
            self.phases.say(f"the images were measured already: see {self.out / 'report.json'}")
            return Report.read(self.out / "report.json")

        # check the sizes of all images before hours of work
        for model in self.models.values():
            check_resolution(model, self.plan)
        strictest = max(self.models.values(), key=lambda model: model.smallest_side)
        if self.plan.resolution is None and not progress.values and strictest.smallest_side > 1:
            self.phases.say(f"reading the sizes of {len(self.pictures):,} images")
            check_sides(self.pictures, strictest)

        # pictures
        if progress.values:
            self._restore(progress)
        else:
            self._fit_linear_codes()
            self._fit_priors()
        if self.plan.measures_images:
            self._keep_for_sheet(sheet_images)
            self._measure(progress)
            self._report().write(self.out / "report.json")  # in case a later phase fails

        # half precision, tiles and speed of each model
        self._examine(progress)

        # report
        self.phases.begin("report and pictures")
        report = self._report()
        report.write(self.out / "report.json")
        if "rate" in self.plan.sections:
            rate_figure(report, self.out / "rate.png")
        if "distortion" in self.plan.sections:
            self._draw_sheet(sheet_images)
        progress.finish()
        return report

    def _num_phases(self) -> int:
        own = sum(measures.priors is not None for measures in self.measures.values())
        own += len(self.linear)
        return own + self.plan.measures_images + len(self.models) * len(self._examinations) + 1

    def _fit_linear_codes(self) -> None:
        for linear in self.linear.values():
            patch = f"{linear.f} px patch"
            self.phases.begin(f"fitting a linear code of {linear.d} numbers per {patch}")
            if not linear.fit(self.pictures):
                self.phases.say("the images have too few patches for a linear code")

    def _fit_priors(self) -> None:
        for name, measures in self.measures.items():
            if measures.priors is not None:
                self.phases.begin(f"{name}: fitting the entropy model of its latents")
                with _failing(measures):
                    measures.priors.fit(
                        measures.model, self.pictures, plan=self.plan, encoded=measures.encoded
                    )

    def _measure(self, progress: Progress) -> None:
        """Measure all pictures that were not measured yet, and write their rows to per_image.csv.

        The state of the evaluation is saved only between two pictures.
        """
        models = ", ".join(self.models)
        self.phases.begin(
            f"measuring {len(self.pictures):,} images: {models}, {len(self.codecs)} codecs"
        )
        with self._open_csv(progress) as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            saved = time.monotonic()
            for position in self._bar(progress.done):
                writer.writerows(row.to_dict() for row in self._update(position))
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save(progress, position + 1, csv_bytes=_written(file))
                    saved = time.monotonic()
            if not self.seen.count:
                raise UserError(f"none of the {len(self.pictures)} images can be read.")
            self._save(progress, len(self.pictures), csv_bytes=_written(file))

    def _open_csv(self, progress: Progress) -> TextIO:
        """Open per_image.csv, and remove the rows written after the state was last saved."""
        path, rows = self.out / "per_image.csv", progress.values.get("csv_bytes", 0)
        try:
            file = path.open("r+" if rows else "w", newline="", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write '{path}': {error.strerror}.") from error
        file.seek(rows)
        file.truncate()
        return file

    def _bar(self, done: int) -> Iterable[int]:
        total = len(self.pictures)
        return tqdm(range(done, total), "measuring", initial=done, total=total, unit="image")

    def _update(self, position: int) -> list[Row]:
        name = self.pictures.name(position)
        try:
            images = self.pictures.read(position)
        except UnreadableImage as error:
            self.seen.leave_out(name, error)
            return []
        original = self.judge.original(name, position, images.to(self.device))

        # The codecs encode in a thread while the models compute.
        encoded: dict[str, Encoded] = {}
        for measures in self._working():
            with _failing(measures, name):
                encoded[measures.name] = measures.encode(original)
        rates = {model: found.raw_bpp for model, found in encoded.items()}
        files = self.thread.submit(
            encode_picture, to_picture(images), self.codecs, rates=set(rates.values())
        )

        # models and linear codes
        rows: list[Row] = []
        for measures in self._working():
            with _failing(measures, name):
                rows += measures.update(original, encoded[measures.name])
        for linear in self.linear.values():
            rows += linear.update(original)

        # codecs at fixed quality settings, and at each model's rate
        rates = {measures.name: rates[measures.name] for measures in self._working()}
        of_codecs, at_rates = codec_rows(
            self.judge, original, self.codecs, files.result(), rates=rates
        )
        self.codec_means.update(of_codecs, position=position)
        self.curves.update(rows + of_codecs)
        for name_of_model, found in at_rates.items():
            self.measures[name_of_model].update_codecs(found, position=position)
        self.seen.add(images)
        return rows + of_codecs + [entry for found in at_rates.values() for entry in found]

    def _working(self) -> Iterator[ModelMeasures]:
        return (measures for measures in self.measures.values() if measures.failure is None)

    def _examine(self, progress: Progress) -> None:
        """Check each model in half precision and in tiles, and measure its speed and memory.

        The evaluation's state is saved before and after each measurement. If a measurement ended
        the process (out of memory), the next call of `evaluate` skips this measurement.
        """
        for (name, model), (section, examination) in itertools.product(
            self.models.items(), self._examinations.items()
        ):
            found = self.examined[name]
            if section in found or self.measures[name].failure is not None:
                self.phases.skip()
                continue
            seconds = self.measures[name].cost.of(examination.pixels)
            self.phases.begin(f"{name}: {examination.title}", seconds=seconds)

            # First save a reason, which stays in the report if this measurement ends the process.
            found[section] = {"skipped": "the process ended here"}
            self._save(progress, progress.done)
            try:
                found[section] = examination.run(model)
            except KeyboardInterrupt:
                del found[section]
                raise
            except torch.OutOfMemoryError:
                found[section] = {"skipped": "out of memory"}
            finally:
                self._save(progress, progress.done)

    @property
    def _examinations(self) -> dict[str, Examination]:
        return examinations(self.plan, self.pictures, mean_pixels=self.seen.mean_pixels)

    def _parts(self) -> dict[str, Accumulator]:
        parts: dict[str, Accumulator] = {"codecs": self.codec_means, "curves": self.curves}
        for number, measures in enumerate(self.measures.values()):
            parts |= {f"{number}.{name}": part for name, part in measures.parts().items()}
        parts |= {linear.name: linear for linear in self.linear.values()}
        return parts

    def _save(self, progress: Progress, done: int, *, csv_bytes: int | None = None) -> None:
        values = {
            "csv_bytes": progress.values.get("csv_bytes", 0) if csv_bytes is None else csv_bytes,
            "seen": self.seen.state(),
            "examined": self.examined,
            "failures": {name: measures.failure for name, measures in self.measures.items()},
        }
        progress.save(done, values, self._parts())

    def _restore(self, progress: Progress) -> None:
        progress.restore(self._parts())
        try:
            self.seen.load_state(progress.values["seen"])
            self.examined = {name: dict(progress.values["examined"][name]) for name in self.models}
            for name, failure in progress.values["failures"].items():
                self.measures[name].failure = failure
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise progress.damaged(error) from error
        self.phases.skip(sum(m.priors is not None for m in self.measures.values()))
        self.phases.skip(len(self.linear))
        self.phases.say(f"continuing after {progress.done} images")

    def _report(self) -> Report:
        models = {
            name: measures.report(
                curves=self.curves,
                codecs=list(self.codecs),
                passport=self.examined[name].get("passport"),
                speed=self.examined[name].get("speed"),
            )
            for name, measures in self.measures.items()
        }
        self._compare_with_linear(models)

        codecs = {
            name: self.curves.points("codec", name, codec.qualities, means=self.codec_means)
            for name, codec in self.codecs.items()
        }
        return Report(
            protocol=self._protocol(),
            data={"source": self.data_name, **self.seen.describe()},
            models=models,
            codecs=codecs,
            bd_rate=bd_rates(codecs | {n: m.rate.points for n, m in models.items() if m.rate}),
        )

    def _compare_with_linear(self, models: dict[str, ModelReport]) -> None:
        """Add the linear codes (PCA of patches) to `models`.

        Add a warning to each model whose PSNR is below the PSNR of its linear code.

        A model is compared with the linear code whose patch side is the model's downsampling
        factor, and which has as many numbers per patch as the model has latent channels. Tokenizers
        are not compared.
        """
        for size, linear in self.linear.items():
            if not linear.halves:
                continue
            models[linear.name] = own = linear.report()
            for name, model in self.models.items():
                if (model.f, model.latent_channels) == size and not model.num_codes:
                    text = verdict(models[name], own)
                    models[name].warnings += [] if text is None else [text]

    def _task(self) -> dict[str, Any]:
        """Return all values that the results depend on. Images are identified by their names."""
        names = "\n".join(self.pictures.name(i) for i in range(len(self.pictures)))
        return {
            "models": {name: model.info() for name, model in self.models.items()},
            "images": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
            "data": self.data_name,
            "plan": asdict(self.plan),
            "protocol": {k: v for k, v in self._protocol().items() if k not in CIRCUMSTANCES},
        }

    def _protocol(self) -> dict[str, Any]:
        return protocol(self.plan, judge=self.judge, codecs=self.codecs, device=self.device)

    def _keep_for_sheet(self, count: int) -> None:
        """Make each `ModelMeasures` keep its reconstructions of the pictures for sheet.png."""
        for measures in self.measures.values():
            measures.shown = dict.fromkeys(spread(len(self.pictures), count))

    def _draw_sheet(self, count: int) -> None:
        rows = []
        for position, images in self.pictures.some(count):
            images = images.to(self.device)
            shown = {
                name: measures.shown.get(position) or reconstruct_for_sheet(measures.model, images)
                for name, measures in self.measures.items()
                if measures.failure is None
            }
            rows.append(sheet_row(shown, self.pictures.name(position), images))
        sheet(rows, self.out / "sheet.png")


def _shapes(plan: Plan, models: Mapping[str, Autoencoder]) -> Sequence[tuple[int, int]]:
    """Return the shapes (height, width) that images are resized to.

    The result is empty if each image keeps its own size. The sides of aspect-ratio buckets are
    multiples of every model's downsampling factor.
    """
    if plan.size is None:
        return ()
    if not plan.buckets:
        return (plan.size,)
    multiple = math.lcm(*(model.f * model.normalization.fold for model in models.values()))
    return bucket_sizes(plan.size, plan.buckets, multiple=multiple)


@contextlib.contextmanager
def _failing(measures: ModelMeasures, image: str = "") -> Iterator[None]:
    """Mark a model as failed if its outputs overflow, so that the evaluation continues without it.

    Args:
        image: name of the image, for the message.
    """
    try:
        yield
    except NotFiniteError as error:
        measures.failure = f"Not measured: {error}{f', on {image}' if image else ''}."
        tqdm.write(f"{measures.name}: {measures.failure}", file=sys.stderr)


def _written(file: TextIO) -> int:
    """Sync the file to disk and return its size in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()
