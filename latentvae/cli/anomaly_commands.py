"""The commands `latentvae anomaly fit` and `latentvae anomaly score`."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from latentvae.cli.flags import say_once
from latentvae.errors import UserError

TABLE_METHODS = ("dagmm", "vae", "latent_density")
MEASURES = ("auroc", "average_precision", "f1")
IMAGE_METHODS = ("reconstruction", "latent_density", "positions", "likelihood")


@dataclass(frozen=True)
class AnomalyFit:
    """Learn what clean rows of a table, or clean images, look like.

        latentvae anomaly fit --data clean.csv --out detector
        latentvae anomaly fit --data photos/good --model runs/kl/export --out detector

    Clean rows or images are those without anomalies. Some clean rows or images are held out: the
    detector does not learn from these, but their scores set the threshold. With the default
    `--false_alarm_rate`, about one clean row or image in a hundred is then flagged by mistake.
    """

    data: Path
    """Clean data: a table (.csv, .parquet, .npz or .npy), or a folder of images."""

    out: Path
    """Folder for the detector. The folder is created if it does not exist."""

    method: (
        Literal["dagmm", "vae", "latent_density", "reconstruction", "positions", "likelihood"]
        | None
    ) = None
    """Method that gives each row or image an anomaly score. For tables: `vae` (default), `dagmm`,
    or `latent_density` (a density of rows, not of latents). For images: `positions` (default),
    `latent_density`, `reconstruction` or `likelihood`. `positions` fits a Gaussian of the latents
    at each position, for images that were all taken from the same view. `latent_density` fits one
    density of whole images. `reconstruction` uses the autoencoder's reconstruction error.
    `likelihood` is for models of `latentvae train-vae`."""

    model: str | None = None
    """For images: folder or Hub id of an autoencoder, such as an export of `latentvae train`."""

    resolution: int | None = None
    """For images: size in pixels. The shorter side of each image is resized to this number, and the
    centre is cropped to a square. The default is 128. If the model accepts only one size, the
    default is this size."""

    distance: Literal["l1", "lpips"] = "l1"
    """For the method `reconstruction`: distance between an image and its reconstruction. `l1` is
    the mean absolute error. `lpips` is the perceptual distance LPIPS."""

    density: Literal["gmm", "knn"] = "gmm"
    """For the method `latent_density`: `gmm` fits a Gaussian mixture. `knn` uses the mean distance
    to the nearest clean rows or images."""

    correction: Literal["none", "complexity", "ratio"] = "none"
    """For the method `likelihood`: correction of the score -ln p(x), which is otherwise low for all
    simple images. `complexity` subtracts the size of the image as PNG, in nats. `ratio` subtracts
    the score of the same image under the model that `--background` names."""

    background: str | None = None
    """For `--correction ratio`: folder of the background model. Train this model with `latentvae
    train-vae --perturb_rate 0.2`."""

    samples: int = 10
    """For the method `likelihood`: number of latent samples for each image. More samples bring the
    score closer to the exact -ln p(x)."""

    criterion: Literal["reconstruction_probability", "elbo", "importance"] = "elbo"
    """For the method `vae`: value in nats whose negative is the score of a row.
    `reconstruction_probability` is the mean of log p(x|z) over samples of z. `elbo` is the evidence
    lower bound. `importance` is the importance-weighted bound, which is tighter than the evidence
    lower bound."""

    epochs: int | None = None
    """For the methods `vae` and `dagmm`: number of training epochs. The default depends on the
    method."""

    num_networks: int | None = None
    """For the method `dagmm`: number of networks to train, each from other random weights. The
    score is the average of their scores. The default is 1. With 8 networks, scores are more stable,
    but training takes eight times as long."""

    false_alarm_rate: float = 0.01
    """Fraction of the clean rows or images that may be flagged by mistake."""

    held_out: float = 0.2
    """Fraction of the clean rows or images that are held out: the detector does not learn from
    these, but their scores set the threshold. The methods `reconstruction` and `likelihood` learn
    nothing, so with these methods the scores of all clean images set the threshold."""

    labels: str | None = None
    """For tables: name of a column that holds 0 for normal rows and 1 for anomalies. Rows with 1
    are not used."""

    drop: tuple[str, ...] = ()
    """For tables: names of columns that are not used, such as names and dates."""

    seed: int = 0
    """Seed of the training and of the choice of the held-out rows or images."""

    def run(self) -> None:
        """Fit the detector, save it, and print its threshold."""
        from latentvae.anomaly.table_runs import read_run

        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = lambda message, *_, **__: say_once(f"warning: {message}")
            if self.data.is_dir():
                self._fit_images()
            else:
                self._fit_table()
        print(self._said(read_run(self.out)))

    def _fit_table(self) -> None:
        from latentvae.anomaly.table_runs import fit_table

        method = self._method(TABLE_METHODS, default="vae", kind="a table")
        if self.model is not None:
            raise UserError(f"--model is for folders of images, but '{self.data}' is a file.")
        if self.correction != "none" or self.background is not None:
            raise UserError("--correction and --background are for images. Leave them out.")
        fit_table(
            self.data,
            self.out,
            method=method,
            options=self._options(method),
            labels=self.labels,
            drop=self.drop,
            held_out_share=self.held_out,
            false_alarm_rate=self.false_alarm_rate,
            seed=self.seed,
        )

    def _options(self, method: str) -> dict[str, Any]:
        """Return the options that the user gave for the class of the detector."""
        chosen: dict[str, Any] = {
            "dagmm": {"epochs": self.epochs, "num_networks": self.num_networks},
            "vae": {"epochs": self.epochs, "criterion": self.criterion},
            "latent_density": {"density": self.density},
        }[method]
        for name in ("epochs", "num_networks"):
            if getattr(self, name) is not None and name not in chosen:
                raise UserError(f"--{name} has no meaning for --method {method}. Leave it out.")
        return {name: value for name, value in chosen.items() if value is not None}

    def _method(self, allowed: tuple[str, ...], *, default: str, kind: str) -> str:
        method = self.method or default
        if method not in allowed:
            raise UserError(
                f"--method {method} is not for {kind}. Give one of {', '.join(allowed)}."
            )
        return method

    def _fit_images(self) -> None:
        from latentvae.anomaly.image_methods import ImageOptions
        from latentvae.anomaly.image_runs import fit_images

        method = self._method(IMAGE_METHODS, default="positions", kind="a folder of images")
        if self.model is None:
            raise UserError(
                f"'{self.data}' is a folder of images, which needs an autoencoder: give --model."
            )
        of_tables = self.epochs, self.num_networks, self.labels, self.drop or None
        if any(value is not None for value in of_tables):
            raise UserError(
                "--epochs, --num_networks, --labels and --drop are for tables. Leave them out."
            )
        if method != "likelihood" and (self.correction != "none" or self.background is not None):
            raise UserError(
                f"--correction and --background are for --method likelihood (got {method}). "
                "Give --method likelihood, or leave out both options."
            )
        fit_images(
            self.data,
            self.out,
            model=self.model,
            method=method,
            resolution=self.resolution,
            options=ImageOptions(
                distance=self.distance,
                density=self.density,
                correction=self.correction,
                background=self.background,
                samples=self.samples,
                seed=self.seed,
            ),
            held_out_share=self.held_out,
            false_alarm_rate=self.false_alarm_rate,
        )

    def _said(self, content: dict[str, Any]) -> str:
        return (
            f"learned from {content['training_items']} rows or images, "
            f"{content['held_out_items']} held out: threshold {content['threshold']:.6g} at a "
            f"false-alarm rate of {self.false_alarm_rate:g}, in {self.out}"
        )


@dataclass(frozen=True)
class AnomalyScore:
    """Score new rows or images with a detector, and flag those above its threshold.

        latentvae anomaly score detector --data new.csv --out result --json result.json

    The command writes OUT/scores.csv. For images, the command also writes OUT/most_anomalous.png:
    the images with the highest scores, with heat maps that show where an image is unusual.
    """

    detector: Annotated[Path, Positional]
    """Folder that `latentvae anomaly fit` wrote."""

    data: Path
    """New data to score: a table with the same columns as the training data, or a folder of
    images."""

    out: Path
    """Folder for scores.csv and pictures. The folder is created if it does not exist."""

    labels: str | None = None
    """True labels, from which AUROC, average precision and F1 are computed. For tables: name of the
    column of labels, with 0 for normal rows and 1 for anomalies. For images: name of the
    first-level folder that holds the normal images."""

    json: Path | None = None
    """JSON file to write the results to: the number of rows or images, the threshold, and the
    number of flagged rows or images. With `--labels`, the file also holds AUROC, average precision
    and F1."""

    num_pictures: int = 8
    """For images: number of images in most_anomalous.png."""

    heat_maps: bool = False
    """For images: write the heat map of every image to OUT/heat_maps."""

    def run(self) -> None:
        """Score the rows or images and write the results."""
        from latentvae.anomaly.table_runs import read_run, score_table

        if read_run(self.detector)["kind"] == "image":
            from latentvae.anomaly.image_runs import score_images

            results = score_images(
                self.detector,
                self.data,
                self.out,
                normal_folder=self.labels,
                num_pictures=self.num_pictures,
                heat_maps=self.heat_maps,
            )
        else:
            results = score_table(self.detector, self.data, labels=self.labels)
        results.write(self.out, self.json)
        summary = results.summary()
        measures = [f"{n} {v:.4f}" for n, v in summary.items() if n in MEASURES]
        print(
            f"{summary['flagged']} of {summary['items']} rows or images flagged (threshold "
            f"{summary['threshold']:.6g}), in {self.out / 'scores.csv'}"
        )
        if measures:
            print(", ".join(measures))
