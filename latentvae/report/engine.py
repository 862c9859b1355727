"""Measure autoencoders and image codecs on the same pictures, under one stated protocol.

    models = {"mine": latentvae.load("runs/mine/export")}
    report = evaluate(models, open_source("photos"), Path("report"), lpips=lpips)

Each picture is brought to the protocol's size, coded and rebuilt by every model and codec, rounded
to 8 bits, and compared with the original. One picture is in memory at a time; what is kept of it is
sums. The same call again goes on where the last one was stopped.
"""

import csv
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from latentvae.autoencoder import Autoencoder
from latentvae.data import ImageSource, UnreadableImage
from latentvae.errors import UserError
from latentvae.losses.perceptual import PerceptualLoss
from latentvae.metrics.rate import bd_rate
from latentvae.report.codecs import available_codecs
from latentvae.report.figures import rate_figure, sheet, sheet_row
from latentvae.report.measures import Judge, Means, Row, codec_rows
from latentvae.report.model import ModelMeasures
from latentvae.report.passport import passport
from latentvae.report.pictures import Pictures, Seen, center_square, spread
from latentvae.report.plan import FULL, Plan
from latentvae.report.priors import fit_priors
from latentvae.report.protocol import protocol
from latentvae.report.resume import Accumulator, Progress
from latentvae.report.schema import BDRate, Point, Report
from latentvae.report.speed import measure_speed

SAVE_SECONDS = 30.0  # between two states on disk
PASSPORT_SIDE = 512  # pixels; larger pictures are cropped for the passport
ANCHOR = "jpeg"  # of the BD-rates


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
    """Measure, write the report into `out` (report.json, per_image.csv, pictures) and return it.

    Args:
        models: by the names to show.
        source: the images; unreadable ones are named on the screen, counted and left out.
        data_name: what the report calls the source.
        lpips: `PerceptualLoss` for each of `plan.lpips_nets`.
        inception: as `metrics.distribution.load_inception` gives it, or None.
        max_images: at most so many, evenly spread over the source.
        sheet_images: how many images the sheet shows, evenly spread too.
        overwrite: forget what is in `out`.
        device: where models and metrics run.

    Raises:
        UserError: `out` holds another evaluation, or not one image can be read.
    """
    if sheet_images < 1:
        raise UserError(f"the sheet is to show {sheet_images} images; at least 1 is needed")
    run = _Run(models, source, out, data_name, lpips, inception, plan, max_images, device)
    return run(sheet_images=sheet_images, overwrite=overwrite)


class _Run:
    """One evaluation: its parts, and the order of the work."""

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
        self.models, self.out, self.plan, self.data_name = dict(models), out, plan, data_name
        self.device = torch.device(device)
        self.judge = Judge({net: loss.to(self.device) for net, loss in lpips.items()}, inception)
        self.codecs = available_codecs(plan.qualities) if plan.qualities else {}
        indices = spread(len(source), max_images)
        self.pictures = Pictures(source, indices, resolution=plan.resolution)
        self.console = Console(stderr=True)
        self.seen, self.codec_means = Seen(), Means()
        self.measures: dict[str, ModelMeasures] = {}
        self.passports: dict[str, Any] = {}
        self.speeds: dict[str, Any] = {}

    def __call__(self, *, sheet_images: int, overwrite: bool) -> Report:
        progress = Progress(self.out, self._task(), overwrite=overwrite)
        if progress.finished:
            self.console.print(f"measured already: {self.out / 'report.json'}", markup=False)
            return Report.read(self.out / "report.json")
        self._prepare()
        if progress.values:
            self._restore(progress)
        self._measure(progress)
        self._examine(progress)
        report = self._report()
        report.write(self.out / "report.json")
        rate_figure(report, self.out / "rate.png")
        self._draw_sheet(sheet_images)
        progress.finish()
        return report

    def _prepare(self) -> None:
        for name, model in self.models.items():
            self._check_size(model)
            priors = None
            if self.plan.noise_psnr and not model.num_codes:
                self.console.print(f"{name}: fitting the bitstream's model", markup=False)
                priors = fit_priors(model, self.pictures, plan=self.plan)
            self.measures[name] = ModelMeasures(
                name, model, judge=self.judge, plan=self.plan, priors=priors
            )

    def _check_size(self, model: Autoencoder) -> None:
        only = model.fixed_size
        if only is not None and self.plan.resolution != only:
            raise UserError(
                f"'{model.name}' makes {only} x {only} images alone: measure with resolution {only}"
            )

    def _measure(self, progress: Progress) -> None:
        """Every picture that is not through yet. The state is saved between pictures alone."""
        with self._open_csv(progress) as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            if file.tell() == 0:
                writer.writeheader()
            saved = time.monotonic()
            for position in self._bar(progress.done):
                writer.writerows(row.to_dict() for row in self._update(position))
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save(progress, position + 1, csv_bytes=_written(file))
                    saved = time.monotonic()
            self._save(progress, len(self.pictures), csv_bytes=_written(file))
        if not self.seen.count:
            raise UserError(f"not one of {len(self.pictures)} images can be read")

    def _open_csv(self, progress: Progress) -> TextIO:
        """Cut to the rows that the saved state knows of."""
        path, rows = self.out / "per_image.csv", progress.values.get("csv_bytes", 0)
        try:
            file = path.open("r+" if rows else "w", newline="", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write '{path}': {error.strerror}") from error
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
        rows = [row for measures in self.measures.values() for row in measures.update(original)]
        of_codecs = codec_rows(self.judge, original, self.codecs)
        self.codec_means.update(of_codecs, position=position)
        self.seen.add(images)
        return rows + of_codecs

    def _examine(self, progress: Progress) -> None:
        """Passports and speeds; each is saved when it is there."""
        for name, model in self.models.items():
            if self.plan.passport_images and name not in self.passports:
                self.console.print(f"{name}: precision and tiling", markup=False)
                self.passports[name] = passport(model.net, self._passport_images(model), f=model.f)
                self._save(progress, progress.done)
            if self.plan.speed_sizes and name not in self.speeds:
                self.console.print(f"{name}: speed and memory", markup=False)
                self.speeds[name] = self._speed(model)
                self._save(progress, progress.done)

    def _passport_images(self, model: Autoencoder) -> list[Tensor]:
        multiple = model.f * model.normalization.fold
        read = self.pictures.some(self.plan.passport_images)
        squares = (center_square(i, side=PASSPORT_SIDE, multiple=multiple) for _, i in read)
        return [images.to(self.device) for images in squares]

    def _speed(self, model: Autoencoder) -> Any:
        sizes = self.plan.speed_sizes if model.fixed_size is None else (model.fixed_size,)
        return measure_speed(
            model.net,
            sizes=sizes,
            f=model.f * model.normalization.fold,
            budget_s=self.plan.speed_budget,
            device=self.device,
        )

    def _parts(self) -> dict[str, Accumulator]:
        parts: dict[str, Accumulator] = {"codecs": self.codec_means}
        for number, measures in enumerate(self.measures.values()):
            parts |= {f"{number}.{name}": part for name, part in measures.parts().items()}
        return parts

    def _save(self, progress: Progress, done: int, *, csv_bytes: int | None = None) -> None:
        values = {
            "csv_bytes": progress.values["csv_bytes"] if csv_bytes is None else csv_bytes,
            "seen": self.seen.state(),
            "passports": self.passports,
            "speeds": self.speeds,
        }
        progress.save(done, values, self._parts())

    def _restore(self, progress: Progress) -> None:
        progress.restore(self._parts())
        self.seen.load_state(progress.values["seen"])
        self.passports, self.speeds = progress.values["passports"], progress.values["speeds"]
        self.console.print(f"going on after {progress.done} images", markup=False)

    def _report(self) -> Report:
        models = {
            name: measures.report(passport=self.passports.get(name), speed=self.speeds.get(name))
            for name, measures in self.measures.items()
        }
        codecs = {
            name: self.codec_means.points("codec", name, codec.qualities)
            for name, codec in self.codecs.items()
        }
        return Report(
            protocol=self._protocol(),
            data={"source": self.data_name, **self.seen.describe()},
            models=models,
            codecs=codecs,
            bd_rate=bd_rates({name: model.rate.points for name, model in models.items()} | codecs),
        )

    def _task(self) -> dict[str, Any]:
        """All that the numbers depend on; names, not pixels, tell the images."""
        names = "\n".join(self.pictures.name(i) for i in range(len(self.pictures)))
        return {
            "models": {name: model.info() for name, model in self.models.items()},
            "images": hashlib.sha256(names.encode()).hexdigest(),
            "data": self.data_name,
            "plan": asdict(self.plan),
            "protocol": self._protocol(),
        }

    def _protocol(self) -> dict[str, Any]:
        return protocol(self.plan, judge=self.judge, codecs=self.codecs, device=self.device)

    def _draw_sheet(self, count: int) -> None:
        rows = [
            sheet_row(self.models, self.pictures.name(position), images.to(self.device))
            for position, images in self.pictures.some(count)
        ]
        sheet(rows, self.out / "sheet.png")


def bd_rates(curves: Mapping[str, Sequence[Point]]) -> dict[str, BDRate]:
    """Of every curve beside JPEG's; LPIPS counts downwards. Empty where JPEG was not measured."""
    if not curves.get(ANCHOR):
        return {}
    rates: dict[str, BDRate] = {}
    for name, points in curves.items():
        if name == ANCHOR or len(points) < 2:
            continue
        found = {
            metric: bd_rate(*(_curve(p, metric, sign) for p in (curves[ANCHOR], points)))
            for metric, sign in (("psnr", 1), ("lpips_alex", -1))
        }
        rates[name] = BDRate(**found)
    return rates


def _curve(points: Sequence[Point], metric: str, sign: int) -> list[tuple[float, float]]:
    values = [(point.bpp, getattr(point, metric)) for point in points]
    return [(bpp, sign * value) for bpp, value in values if value is not None]


def _written(file: TextIO) -> int:
    """Bytes of the file, all of them on disk."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()
