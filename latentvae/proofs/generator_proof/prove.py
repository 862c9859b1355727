"""Measure how well latents or tokens suit a generator (`latentvae prove`).

The same small generator is trained on each folder of codes, and on controls. Codes are latents (for
a DiT) or tokens (for an autoregressive transformer). A control is a changed copy of the codes,
whose effect on the samples is known. All generators have the same width, depth and number of
updates. The generators' samples are compared with reference values (called floors): the measures of
real pictures, of reconstructions, and of an untrained generator.

    OUT/proof.json   settings and results, the same bytes for the same seeds on the same machine
    OUT/proof.html   the results as a page
    OUT/pictures/    samples, not selected
    OUT/runs/        trainings and measured values. The same command continues a stopped proof.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from latentvae.compute.precision import full_float32
from latentvae.engine.lock import locked
from latentvae.errors import UserError
from latentvae.files import read_text
from latentvae.latents.formats.shards import read_manifest
from latentvae.pictures import save_grid
from latentvae.proofs.generator_proof.latent_subject import LatentSubject
from latentvae.proofs.generator_proof.measures import FEATURES, PictureFeatures, References
from latentvae.proofs.generator_proof.settings import ProofSettings
from latentvae.proofs.generator_proof.subject import CODE, Subject
from latentvae.proofs.generator_proof.token_subject import TokenSubject
from latentvae.report.proof_page import write_page

SHOWN = 40  # number of samples in a picture
SUBJECTS: dict[str, type[Any]] = {"latents": LatentSubject, "tokens": TokenSubject}
FORMAT = 1


@full_float32()
def prove(
    shards: Sequence[str | Path],
    out: str | Path,
    *,
    settings: ProofSettings | None = None,
    data: str | None = None,
    models: Sequence[str] = (),
    controls: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train generators on codes and on changed codes, measure the samples, and write the results.

    The results are proof.json and proof.html.

    Args:
        shards: folders of latents or tokens of the same images, which `latentvae encode` wrote.
        out: folder of the results. An interrupted proof is continued.
        settings: size and training length of the generators.
        data: the images that were encoded. With None, the images' path in each folder's manifest is
            used.
        models: the autoencoder of each folder. If empty, the autoencoders in the folders' manifests
            are used.
        controls: names of the controls to run. A control is a changed copy of the codes, such as
            codes with noise. None runs all controls. The control `labels` (shuffled classes) is
            left out if there are fewer than two classes.
        say: function that prints a line.

    Returns:
        The content of proof.json.

    Raises:
        UserError: before any training, if an argument is wrong, if the folders hold codes of
            different images or resolutions, or if `out` holds another proof or other files.
    """
    settings, out = settings or ProofSettings(), Path(out).expanduser()
    subjects = _open(shards, settings, data=data, models=models)
    _check_controls(subjects, controls)
    for subject in subjects:
        if settings.batch_size > len(subject.train):
            raise UserError(
                f"batch_size {settings.batch_size} is larger than the number of training images, "
                f"{len(subject.train)}. Give a batch_size of at most {len(subject.train)}."
            )
        subject.task(CODE, folder=out, seed=0, shift=1.0).open()  # raises for unusable codes

    _claim(out, _identity(subjects, settings))
    with locked(out):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        features = PictureFeatures(device)
        proofs = [_Proof(s, out / "runs" / s.name, features, say=say) for s in subjects]
        found = [proof.run(controls) for proof in proofs]
        result = _result(subjects, found, settings)
        for subject, proof in zip(subjects, proofs, strict=True):
            proof.draw(out / "pictures" / subject.name)
        _write(out / "proof.json", result)
        write_page(out)
    return result


def _open(
    shards: Sequence[str | Path],
    settings: ProofSettings,
    *,
    data: str | None,
    models: Sequence[str],
) -> list[Subject]:
    """Open all folders, and check that they hold codes of the same images."""
    if not shards:
        raise UserError("shards are missing. Give folders that `latentvae encode` wrote.")
    if models and len(models) != len(shards):
        raise UserError(f"there are {len(models)} models for {len(shards)} folders of shards.")
    contents = [read_manifest(Path(folder).expanduser()).content for folder in shards]
    for folder, content in zip(shards, contents, strict=True):
        for name, words in (("data_sha256", "images"), ("resolution", "resolution")):
            if getattr(content, name) != getattr(contents[0], name):
                raise UserError(
                    f"'{folder}' has other {words} than '{shards[0]}'. Encode the same images at "
                    "the same resolution, so that the generators can be compared."
                )

    names = _names([Path(folder) for folder in shards])
    given = list(models) or [None] * len(shards)
    return [
        SUBJECTS[content.kind](folder, settings, name=name, data=data, model=model)
        for folder, content, name, model in zip(shards, contents, names, given, strict=True)
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return a different name for each folder: the end of its path, with a number if needed."""
    short = [folder.resolve().name for folder in folders]
    if len(set(short)) == len(short):
        return short
    longer = ["-".join(folder.resolve().parts[-2:]) for folder in folders]
    if len(set(longer)) == len(longer):
        return longer
    return [f"{number}-{name}" for number, name in enumerate(short)]


def _check_controls(subjects: Sequence[Subject], controls: Sequence[str] | None) -> None:
    known = list(dict.fromkeys(name for s in subjects for name in s.variants if name != CODE))
    for name in controls or ():
        if name not in known:
            kinds = " and ".join(dict.fromkeys(subject.kind for subject in subjects))
            raise UserError(
                f"there is no control '{name}' for {kinds}. The controls are {', '.join(known)}."
            )


def _identity(subjects: Sequence[Subject], settings: ProofSettings) -> dict[str, Any]:
    """Return the settings, and what identifies the codes, as JSON values."""
    return {
        "format": FORMAT,
        "settings": settings.protocol(),
        "shards": {
            subject.name: {
                "kind": subject.kind,
                "model": subject.content.model_sha256,
                "data": subject.content.data_sha256,
                "flip": subject.content.flip,
                "items": [table.identity() for table in subject.tables],
            }
            for subject in subjects
        },
    }


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Create the folder, and record in `settings.json` the data and settings of the proof.

    Raises:
        UserError: the folder holds another proof or other files.
    """
    path = out / "settings.json"
    if path.is_file():
        found = json.loads(read_text(path))
        if found.get("settings") != identity["settings"]:
            ours, theirs = identity["settings"], found.get("settings", {})
            name = next(n for n in ours if theirs.get(n) != ours[n])
            raise UserError(
                f"'{out}' holds a proof with {name} {theirs.get(name)} (now {ours[name]}). Give "
                "another folder, or the same settings."
            )
        if found != identity:
            raise UserError(f"'{out}' has a proof of other latents or tokens. Give another folder.")
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"'{out}' holds other files. Give a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    _write(path, identity)


class _Proof:
    """The trainings and measures of one folder of codes (latents or tokens).

    Finished trainings and measures are kept on the disk.

    Args:
        subject: the codes and their controls (changed copies).
        folder: folder of the trainings.
        features: object that computes the features of pictures.
        say: function that prints a line.
    """

    def __init__(
        self,
        subject: Subject,
        folder: Path,
        features: PictureFeatures,
        *,
        say: Callable[[str], None],
    ) -> None:
        self.subject, self.folder, self.features, self.say = subject, folder, features, say
        self.settings, self.shifts = subject.settings, dict[str, float]()
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, controls: Sequence[str] | None) -> dict[str, dict[str, Any]]:
        """Return a dict of measures: of the codes, their changed copies, and reference pictures."""
        subject, found = self.subject, {"floors": self._floors()}
        for variant in subject.variants:
            asked = variant == CODE or controls is None or variant in controls
            if asked and not (variant == "labels" and subject.num_classes < 2):
                found[variant] = self._variant(variant)
                subject.forget(variant)
        return found

    def _variant(self, variant: str) -> dict[str, Any]:
        """Return the measures for the codes or a changed copy: means and spreads over the seeds."""
        subject, seeds = self.subject, self.settings.seeds
        if not subject.tunes_shift:
            self.shifts[variant] = 1.0
        elif variant in (CODE, "noise", "blocks"):
            self.shifts[variant] = self._best_shift(variant)
        else:
            self.shifts[variant] = self.shifts[CODE]  # the same latents in another order
        shift = self.shifts[variant]
        result = _summary([self._measured(variant, seed=s, shift=shift) for s in seeds], seeds)
        if subject.tunes_shift:
            result["shift"] = shift

        line = f"{subject.name}, {variant}: kernel distance {result['kd']['mean']:.4f}"
        if "class_accuracy" in result:
            line += f", class {result['class_accuracy']:.3f}"
        self.say(line)
        return result

    def _best_shift(self, variant: str) -> float:
        """Return the shift of the noise levels whose samples are nearest to the training pictures.

        The trainings that try the shifts use an extra seed, which no reported result uses.
        """
        if len(self.settings.shifts) == 1:
            return self.settings.shifts[0]
        seed = max(self.settings.seeds) + 1
        found = {
            shift: self._measured(variant, seed=seed, shift=shift)["kd_train"]
            for shift in self.settings.shifts
        }
        return min(found, key=lambda shift: found[shift])

    def _measured(self, variant: str, *, seed: int, shift: float) -> dict[str, Any]:
        """Train a generator, and draw and measure samples.

        If the measures of this generator are already on the disk, read them instead.
        """
        path = self._path(variant, seed=seed, shift=shift)
        if path.is_file():
            return json.loads(read_text(path))
        self.say(f"{self.subject.name}: {variant}, seed {seed}, shift {shift:g}")
        export = self.subject.fit(variant, folder=self.folder, seed=seed, shift=shift)

        # the generator's samples without guidance
        classes = self.subject.own_classes()
        images = self._drawn(variant, export, classes, shift=shift, seed=seed)
        save_grid(images[:SHOWN], path.with_suffix(".png"))
        size = self.settings.batch_size
        found = self.references.measure(self.features.of(images.split(size)), classes)

        # samples with guidance, to measure whether they show their classes
        if self.subject.num_classes:
            guidance, classes = self.settings.guidance, self.subject.even_classes()
            images = self._drawn(
                variant, export, classes, shift=shift, seed=seed, guidance=guidance
            )
            guided = self.features.of(images.split(size))
            found["class_accuracy"] = self.references.class_accuracy(guided, classes)
            save_grid(images[:SHOWN], path.with_name(f"guided-{path.stem}.png"))
        found |= self.subject.facts(export)
        _write(path, found)
        return found

    def _path(self, variant: str, *, seed: int, shift: float) -> Path:
        return self.folder / f"{variant}-seed{seed}" / f"shift{shift:g}.json"

    def _drawn(self, variant: str, export: Path, classes: Tensor, **options: Any) -> Tensor:
        """Return samples (n, C, H, W) of a generator. `options` are those of `Subject.sample`."""
        drawn = self.subject.sample(variant, export, classes, **options)
        total = -(-self.settings.samples // self.settings.batch_size)
        bar = tqdm(drawn, total=total, desc="samples", unit="batch", disable=None, leave=False)
        return torch.cat(list(bar))

    @cached_property
    def references(self) -> References:
        """The features of real pictures and of their reconstructions, computed once."""
        subject, path = self.subject, self.folder / "features.safetensors"
        if not path.is_file():
            self.say(
                f"{subject.name}: measuring features of {len(subject.train):,} training pictures"
            )
            size = self.settings.batch_size
            found = {
                "train": self.features.of(subject.train.images.split(size)),
                "held": self.features.of(subject.held.images.split(size)),
                "train_recon": self.features.of(subject.reconstructed(held=False)),
                "held_recon": self.features.of(subject.reconstructed(held=True)),
            }
            save_file(found, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        return References(**load_file(path), train_classes=subject.train.classes)

    def _floors(self) -> dict[str, Any]:
        """Return the measures of reference pictures, such as real pictures and reconstructions."""
        path = self.folder / "floors.json"
        if path.is_file():
            return json.loads(read_text(path))
        subject, references, classes = self.subject, self.references, self.subject.own_classes()
        untrained = self.features.of(subject.untrained(classes, seed=self.settings.seeds[0]))
        own, train = subject.held.classes, subject.train.classes
        real = references.measure(references.train, train)
        found = {
            "real": {"kd": real["kd"]},
            "reconstruction": {"kd": references.measure(references.train_recon, train)["kd"]},
            "held_out_reconstruction": _recognised(references.measure(references.held_recon, own)),
            "untrained": _recognised(references.measure(untrained, classes), "kd"),
            "chance": {"class_accuracy": 1 / subject.num_classes} if subject.num_classes else {},
        }
        _write(path, found)
        return found

    def draw(self, folder: Path) -> None:
        """Write pictures: samples of the first seed, real pictures, and reconstructions."""
        folder.mkdir(parents=True, exist_ok=True)
        seed = self.settings.seeds[0]
        for variant, shift in self.shifts.items():
            grid = self._path(variant, seed=seed, shift=shift).with_suffix(".png")
            for path in (grid, grid.with_name(f"guided-{grid.name}")):
                if path.is_file():
                    name = variant if path is grid else f"{variant}, guidance"
                    (folder / f"{name}.png").write_bytes(path.read_bytes())
        save_grid(self.subject.held.images[:SHOWN], folder / "real.png")
        recon = next(self.subject.reconstructed(held=True))[:SHOWN]
        save_grid(recon, folder / "reconstruction.png")


def _recognised(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the class accuracy, the share of copies, and the values that `names` lists."""
    known = {"class_accuracy": values.get("class_accuracy_plain"), "copies": values["copies"]}
    known |= {name: values[name] for name in names}
    return {name: value for name, value in known.items() if value is not None}


def _summary(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Return means over seeds.

    For kernel distance and class accuracy, also return the standard deviation over seeds, and the
    value of each seed.
    """
    distances = [row["kd"] for row in rows]
    result: dict[str, Any] = {"kd": _with_spread(distances, seeds)}
    result["kd"]["subsets_std"] = fmean(row["kd_subsets"] for row in rows)
    for name in rows[0]:
        if name not in ("kd", "kd_subsets"):
            result[name] = fmean(row[name] for row in rows)
    if "class_accuracy" in rows[0]:
        spread = _with_spread([row["class_accuracy"] for row in rows], seeds)
        result["class_accuracy_std"] = spread["std"]
        result["class_accuracy_seeds"] = spread["seeds"]
    return result


def _with_spread(values: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    return {
        "mean": fmean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "seeds": {str(seed): value for seed, value in zip(seeds, values, strict=True)},
    }


def _result(
    subjects: Sequence[Subject], found: Sequence[dict[str, Any]], settings: ProofSettings
) -> dict[str, Any]:
    """Return the content of proof.json."""
    latents, controls, floors, checks = {}, {}, {}, {}
    for subject, values in zip(subjects, found, strict=True):
        rest = {n: v for n, v in values.items() if n not in (CODE, "floors")}
        latents[subject.name] = values[CODE]
        controls[subject.name] = rest
        floors[subject.name] = values["floors"]
        checks[subject.name] = _checks(values[CODE], rest, values["floors"])

    first = subjects[0]
    return {
        "protocol": {
            **settings.protocol(),
            "features": FEATURES,
            "kernel": "unbiased MMD^2 of (x . y / D + 1)^3",
            "resolution": first.content.resolution,
            "training_images": len(first.train),
            "held_out_images": len(first.held),
            "classes": first.num_classes,
            "kinds": {subject.name: subject.kind for subject in subjects},
            "variants": {subject.name: dict(subject.variants) for subject in subjects},
        },
        "latents": latents,
        "controls": controls,
        "floors": floors,
        "checks": checks,
    }


def _checks(
    code: dict[str, Any], controls: dict[str, Any], floors: dict[str, Any]
) -> dict[str, bool | None]:
    """Return whether the proof shows each expected result. A result that was not measured is None.

    A difference counts if it is larger than twice its standard deviation over the seeds. With one
    seed there is no standard deviation, so results that need it are None.
    """

    def beyond(worse: dict[str, Any] | None, name: str) -> bool | None:
        if worse is None or name not in code:
            return None
        if name == "kd":
            a, b = code["kd"]["mean"], worse["kd"]["mean"]
            spread = code["kd"]["std"], worse["kd"]["std"]
        else:
            a, b = -code[name], -worse[name]
            spread = code[f"{name}_std"], worse[f"{name}_std"]
        if None in spread:
            return None
        return b - a > 2 * (spread[0] ** 2 + spread[1] ** 2) ** 0.5

    kd, chance = code["kd"]["mean"], floors["chance"].get("class_accuracy")
    floor, untrained = floors["reconstruction"]["kd"], floors["untrained"]["kd"]
    above_chance = None
    if chance is not None and code.get("class_accuracy_std") is not None:
        above_chance = code["class_accuracy"] - chance > 2 * code["class_accuracy_std"]
    return {
        "better_than_noise": beyond(controls.get("noise"), "kd"),
        "better_than_shuffled_labels": beyond(controls.get("labels"), "class_accuracy"),
        "better_than_blocks": beyond(_as_many_values(code, controls.get("blocks")), "kd"),
        "better_than_shuffled_tokens": beyond(controls.get("shuffled"), "kd"),
        "nearer_to_reconstruction_than_to_untrained": kd - floor < untrained - kd,
        "classes_above_chance": above_chance,
        "no_copies": code["copies"] <= 0.02 and code["near_train"] >= 0.9 * code["near_held"],
    }


def _as_many_values(code: dict[str, Any], blocks: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the measures of the control `blocks`, or None if it has too many or too few values.

    The control replaces latents by mean colours. The control is a fair comparison only if it has
    about as many values as the latents.
    """
    if blocks is None or not 2 / 3 <= blocks["values"] / code["values"] <= 1.5:
        return None
    return blocks


def _write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part-{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
