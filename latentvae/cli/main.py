"""The command `latentvae` and its subcommands, one class of options for each."""

import inspect
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from latentvae.cli.flags import exit_with, parse_known, parse_options, say_once, settled_output
from latentvae.errors import UserError, nearest

if TYPE_CHECKING:
    from latentvae.tasks.autoencoder.config import TrainConfig


@dataclass(frozen=True)
class Reconstruct:
    """Run images through an autoencoder and write side-by-side pictures and a table."""

    model: Positional[str]
    """Folder or Hub id of a diffusers autoencoder, such as a run's export."""

    inputs: Annotated[tuple[str, ...], Positional]
    """Images and folders of images. The sizes may differ."""

    out: Path
    """Folder for the pictures (original, reconstruction, difference) and table.csv."""

    max_side: int | None = None
    """Shrink images whose longer side has more pixels than this, to save memory."""

    strips: bool = False
    """Compute each image strip by strip. The result is exact and needs little memory, but takes
    longer. The command prints how much longer."""

    value_range: tuple[float, float] | None = None
    """The stored number that becomes black and the one that becomes white, as in training. Float
    files may need this option."""

    ignore_icc: bool = False
    """Keep the stored numbers of files with an embedded colour profile. By default such files
    are converted to sRGB."""

    max_pixels: int | None = None
    """Read images of up to this many pixels (width times height). Default: Pillow's limit, 89
    million. Small files can fill the memory, so raise the limit only for files that you trust."""

    optimize: Literal["exact", "fast", "openvino"] | None = None
    """Faster computation. exact: the same numbers up to rounding. fast: bfloat16 where it is
    faster. openvino: OpenVINO on the CPU."""

    variant: str | None = None
    """Variant of the model's weights, such as fp16. Default: the weights without a variant name,
    or the only variant that exists."""

    def run(self) -> None:
        """Write the pictures and the table."""
        from latentvae.reconstruct import reconstruct

        reconstruct(**vars(self))


@dataclass(frozen=True)
class Evaluate:
    """Measure autoencoders on images: distortion, perception, bit rate, latents, precision, speed.

    The command takes any autoencoder of images that diffusers knows. JPEG, WebP and AVIF are
    measured on the same images too. The results are report.json, per_image.csv, rate.png, sheet.png
    and the printed tables. If the command was stopped, start it again to continue.
    """

    models: Annotated[tuple[str, ...], Positional]
    """Folders of autoencoders, such as runs' exports, or Hub ids (owner/name/folder)."""

    data: str
    """Folder of images that no model was trained on. `samples` means the two photos that training
    on `samples` holds out."""

    out: Path
    """Folder for the report. The folder is created if it does not exist."""

    quick: bool = False
    """Take a first look: measure 8 images and fewer points. Speed is measured at 256 px only.
    Metrics that use VGG (LPIPS with VGG, distribution metrics) are left out."""

    max_images: int | None = None
    """Measure at most this many images, spread evenly over the sorted names."""

    resolution: tuple[int, ...] | None = None
    """Resize images to cover this side, or this height and width, and crop the centre. By
    default each image keeps its own size."""

    aspect_ratio_buckets: int = 0
    """Resize and crop each image to the nearest of this many shapes, as training with this
    option does. Each shape has about as many pixels as the option resolution gives. By default
    all images get the same shape."""

    ignore_icc: bool = False
    """Keep the stored numbers of files with an embedded colour profile. By default such files
    are converted to sRGB."""

    max_pixels: int | None = None
    """Read images of up to this many pixels (width times height). Default: Pillow's limit, 89
    million."""

    sections: str = "distortion,rate,latent,passport,tiling,speed"
    """Measure only these sections, separated by commas. By default all sections are measured."""

    all_pages: bool = False
    """Use every page of a TIFF as an image of its own. By default only the first page is used."""

    latent: Literal["mode", "sample"] = "mode"
    """Decode the mode of the posterior, or a sample of the posterior. Bitstreams always hold the
    mode."""

    rfid: bool = False
    """Measure rFID and KID with the original Inception weights (`pip install latentvae[fid]`)."""

    inception_weights: Path | None = None
    """File with the Inception weights for rFID and KID:
    weights-inception-2015-12-05-6726825d.pth of torch-fidelity. This option turns rfid on."""

    allow_download: bool = False
    """Download the weights of Inception and LPIPS if this machine does not have them."""

    sheet_images: int = 4
    """Number of images that sheet.png shows."""

    overwrite: bool = False
    """Delete the evaluation that is in the folder `out` and start again."""

    device: str | None = None
    """Torch device of models and metrics. Default: the GPU if there is one."""

    variant: str | None = None
    """Variant of the models' weights, such as fp16. Default: the weights without a variant name,
    or the only variant that exists."""

    def run(self) -> None:
        """Write the report and print its tables."""
        from latentvae.cli.evaluate_command import evaluate_command

        sections = [name.strip() for name in self.sections.split(",") if name.strip()]
        evaluate_command(**{**vars(self), "sections": sections})


@dataclass(frozen=True)
class Compare:
    """Compare the models of one or more reports: values, best values and paired differences."""

    reports: Annotated[tuple[Path, ...], Positional]
    """report.json files, or the folders that contain them."""

    force: bool = False
    """Compare reports that were not measured alike. The table then shows what differs."""

    markdown: bool = False
    """Print the table as Markdown, for a model card."""

    def run(self) -> None:
        """Print the table."""
        from rich.console import Console

        from latentvae.report import compare, markdown

        tables = compare(self.reports, force=self.force)
        if self.markdown:
            print("\n\n".join(map(markdown, tables)))
        else:
            Console().print(*tables)


@dataclass(frozen=True)
class Export:
    """Write a run's newest checkpoint as a diffusers folder, and measure scaling and shift."""

    folder: Annotated[Path, Positional]
    """Folder of a training run."""

    out: Path
    """Folder to write. `from_pretrained` of the model's class loads it."""

    overwrite: bool = False
    """Replace the export that is in the folder `out`."""

    lookup_from_codebook: bool = False
    """Write a tokenizer as a VQModel for aMUSEd, which looks up codes by index and has pixels in
    [0, 1]."""

    push_to_hub: bool = False
    """Upload the export to the Hugging Face Hub, with the account of `hf auth login` or of the
    token in HF_TOKEN."""

    hub_model_id: str | None = None
    """Hub repository to upload the export to, as owner/name. Default: the run's name in your own
    account."""

    hub_private_repo: bool = False
    """Make the Hub repository of the export private if the repository is new."""

    def run(self) -> None:
        """Write the folder, and upload it if `push_to_hub` is set."""
        from latentvae.engine.publishing import UploadError
        from latentvae.tasks.autoencoder.run_export import export_folder

        try:
            export_folder(**vars(self))
        except UploadError as error:
            say_once(f"error: {error}")
            raise SystemExit(1) from None


@dataclass(frozen=True)
class Encode:
    """Encode images once, into shards of tokens or latents to train a generator on.

    A tokenizer makes tokens. Any other autoencoder that diffusers knows makes latents. If the
    command was stopped, start it again to continue. Several processes share the work:

        accelerate launch --num_processes 4 -m latentvae.cli encode MODEL --data photos ...
    """

    model: Positional[str]
    """Folder or Hub id of an autoencoder, such as a run's export."""

    data: str
    """Images: a folder of images, of tar files or of tables, or one such file. Also `samples`,
    or owner/name of a data set on the Hub."""

    out: Path
    """Folder for the shards and manifest.json. The folder is created if it does not exist."""

    resolution: Annotated[tuple[int, ...], arg(metavar="PIXELS|HEIGHT WIDTH")]
    """Pixels per side, or height and width. Each image is resized to cover this size, and the
    centre is cropped. Both sides must be multiples of the model's downsampling factor f."""

    aspect_ratio_buckets: int = 0
    """Resize and crop each image to the nearest of this many shapes, as training with this
    option does. Each shape gets its own folder of shards in the folder `out`, such as
    out/192x320. By default all images get the same shape."""

    batch_size: int = 16
    """Number of images per forward pass."""

    num_workers: int = 0
    """Number of extra processes that read images."""

    shard_items: int = 4096
    """Number of images per shard. A killed process loses at most one shard. Each process writes
    complete shards."""

    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Data type of the latents. Default: float16. Tokens get the smallest integer type that
    holds K codes."""

    moments: bool = False
    """Store the mean and the standard deviation of the posterior, so that latents can be
    sampled."""

    interpolation: Literal["lanczos", "bicubic", "bilinear"] = "lanczos"
    """Filter that resizes images."""

    value_range: tuple[float, float] | None = None
    """The stored number that becomes black and the one that becomes white, as in training. Float
    files may need this option."""

    ignore_icc: bool = False
    """Keep the stored numbers of files with an embedded colour profile. By default such files
    are converted to sRGB."""

    max_pixels: int | None = None
    """Read images of up to this many pixels (width times height). Default: Pillow's limit, 89
    million."""

    all_pages: bool = False
    """Use every page of a TIFF as an image of its own. By default only the first page is used."""

    label_column: str | None = None
    """Column of a table that holds the classes. Default: `label`. For other data, each
    first-level folder is a class."""

    overwrite: bool = False
    """Replace shards in the folder `out` that were made with another model, other data or other
    options. Data is compared by names and labels, not by the content of the images."""

    optimize: Literal["exact", "fast", "openvino"] | None = None
    """Faster computation. `exact` differs only by rounding. The manifest records this option.
    Default: off."""

    device: str | None = None
    """Torch device that computes. Default: the GPU of this process if there is one."""

    variant: str | None = None
    """Variant of the model's weights, such as fp16. Default: the weights without a variant name,
    or the only variant that exists."""

    def run(self) -> None:
        """Write the shards."""
        from latentvae.cli.encode_decode import encode_command

        encode_command(**vars(self))


@dataclass(frozen=True)
class Decode:
    """Turn shards of tokens or latents back into pictures, one 8-bit PNG per image name.

    The command checks three things first. Each file must have the sha256 that was recorded. Indices
    must be below the number of codes. The model must be the one that encoded.
    """

    shards: Annotated[Path, Positional]
    """Folder that `latentvae encode` wrote."""

    out: Path
    """Folder for the pictures. The folder is created if it does not exist."""

    model: str | None = None
    """Folder or Hub id of the autoencoder. Default: the autoencoder that manifest.json names."""

    limit: int | None = None
    """Decode only this many images, starting with the first."""

    batch_size: int = 16
    """Number of images per forward pass."""

    optimize: Literal["exact", "fast", "openvino"] | None = None
    """Faster computation. exact: the same numbers up to rounding. fast: bfloat16 where it is
    faster. openvino: OpenVINO on the CPU."""

    device: str | None = None
    """Torch device that computes. Default: the GPU of this process if there is one."""

    variant: str | None = None
    """Variant of the model's weights, such as fp16. Default: the weights without a variant name,
    or the only variant that exists."""

    def run(self) -> None:
        """Write the pictures."""
        from latentvae.cli.encode_decode import decode_command

        decode_command(**vars(self))


@dataclass(frozen=True)
class Convert:
    """Write an AutoencoderKL or a VQModel with the weight names of CompVis and taming.

    The command prints the matching `ddconfig` of the original code and stores it in the file's
    metadata. Other programs load the result as a single file. `latentvae.load` reads it back if it
    is an AutoencoderKL with the shape of Stable Diffusion (4 latent channels), SD3 or FLUX (16),
    without attention in its levels. For other networks, `latentvae.load` needs the folder.

    The original classes always have the layers quant_conv and post_quant_conv. If the network does
    not have these layers, as in SD3 and FLUX, identity layers are written.
    """

    model: Positional[str]
    """Folder or Hub id of the autoencoder, such as a run's export."""

    out: Path
    """The .safetensors file to write."""

    overwrite: bool = False
    """Replace the file if it exists."""

    variant: str | None = None
    """Variant of the model's weights, such as fp16. Default: the weights without a variant name,
    or the only variant that exists."""

    def run(self) -> None:
        """Write the file and print the `ddconfig`."""
        from latentvae.export.original import convert

        convert(**vars(self))


@dataclass(frozen=True)
class VerifyResume:
    """Check that a killed run resumes exactly: train a little, kill, resume and compare.

    A short version of your run (your model, images, precision and processes) is trained twice with
    `accelerate launch`. The first training runs without interruption. In the second training, all
    processes get SIGKILL at random moments of updates and saves, and the same command starts them
    again.

    The results of both trainings must be equal, bit by bit on the CPU. The results are weights,
    optimizers, averages, discriminator, counters, log rows and export.

        latentvae verify-resume kl_f8 --train_data_dir photos --mixed_precision bf16 --processes 8

    The command also takes all flags of training (latentvae train --config CONFIG --help lists
    them). The exit code is 0 if all checks pass, 1 if a check failed, and 2 if the command was used
    wrongly.
    """

    config: Positional[str]
    """Preset or YAML file of the run."""

    updates: int = 12
    """Number of updates of each of the two trainings."""

    kills: int = 3
    """Number of kills. Every second kill happens during a save."""

    processes: int = 1
    """Number of processes of each launch, as in `accelerate launch --num_processes`."""

    kill_seed: int = 0
    """Seed of the random moments at which processes are killed."""

    work_dir: Path | None = None
    """New folder for both trainings, which is kept. Default: a temporary folder that is deleted
    if all checks pass."""

    json: Path | None = None
    """JSON file to write the results of the checks to."""

    launch_timeout: int = 3600
    """Number of seconds after which a launch counts as hung."""

    def run(self, flags: Sequence[str]) -> None:
        """Check the run that the training scripts' `flags` describe, and exit."""
        from latentvae.proofs.verify_resume import verify_resume
        from latentvae.tasks.autoencoder.task import AutoencoderTask

        # SIGTERM does not reach the launches, because they have their own sessions. An exception
        # ends them.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        options = dict(vars(self))
        config = training_config(options.pop("config"), flags, also=list(options))
        raise SystemExit(verify_resume(AutoencoderTask, config, **options))


@dataclass(frozen=True)
class Preflight:
    """Check a run before it starts: train a few updates and print a line per check.

    The command uses your own model, images, precision and processes. The checks are that

    - every loss reaches the weights that it should train, and no others,
    - the weights and the average of the weights change,
    - all processes have the same model, and each reads different images,
    - a run that resumes from a checkpoint repeats the next update.

    The command estimates the time, memory and disk space of the complete run. The folder of the run
    is neither read nor written.

        latentvae preflight kl_f8 --train_data_dir photos --output_dir runs/first
        accelerate launch --num_processes 8 -m latentvae.cli preflight kl_f8 --train_data_dir ...

    The command also takes all flags of training (latentvae train --config CONFIG --help lists
    them). The exit code is 0 if all checks pass, 1 if a check failed, and 2 if the command was used
    wrongly.
    """

    config: Positional[str]
    """Preset or YAML file of the run."""

    json: Path | None = None
    """JSON file to write the results of the checks to."""

    def run(self, flags: Sequence[str]) -> None:
        """Check the run that the training scripts' `flags` describe, and exit."""
        from latentvae.proofs.preflight import preflight

        config = training_config(self.config, flags, also=["json"])
        raise SystemExit(preflight(config, json=self.json))


def training_config(config: str, flags: Sequence[str], *, also: Sequence[str]) -> "TrainConfig":
    """Return the options of a run, for a command that also takes the training scripts' flags.

    Args:
        config: preset or YAML file.
        flags: flags of the training scripts.
        also: names of the command's own options. The error about a wrong flag may suggest one of
            them.
    """
    from latentvae.cli.train import config_from_arguments

    if any(flag.split("=")[0] == "--config" for flag in flags):
        raise UserError(f"--config is not allowed here: '{config}' is the config already")
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


TRAIN = "train"
SCRIPTS = """\
Scripts of the repository:
  train/train_kl.py        Train an autoencoder: `latentvae train` as a script.
  train/train_vq.py        The same for tokenizers: its preset without --config is vq_small.
  train/demo_pipeline.py   Run an export inside diffusers' Stable Diffusion pipelines.

Several processes: accelerate launch --num_processes 8 -m latentvae.cli train ..."""
# These commands also take the flags of training.
COMMANDS_OF_RUNS: dict[str, type[Preflight] | type[VerifyResume]] = {
    "preflight": Preflight,
    "verify-resume": VerifyResume,
}


def train_command(arguments: Sequence[str]) -> None:
    """Train an autoencoder or a tokenizer on your images, and export it for diffusers.

        latentvae train --config kl_f8 --train_data_dir photos --output_dir runs/first
        accelerate launch --num_processes 8 -m latentvae.cli train --config kl_f8 ...

    A single process needs no launcher. `--config` takes a YAML file or the name of any preset.
    Every flag below overrides a value of the config. If the run was stopped, the same command
    continues it. `--preflight` trains a few updates to check the run, and exits. `--train_data_dir
    samples` trains on the photos that come with scikit-image.
    """
    from latentvae.cli.train import run_training

    if arguments and not arguments[0].startswith("-"):
        raise UserError(f"'{arguments[0]}' is not a flag; did you mean '--config {arguments[0]}'?")
    run_training(arguments, description=inspect.cleandoc(train_command.__doc__ or ""))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. A wrong argument prints one sentence and exits with 2."""
    with settled_output():
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0)
    try:
        name = _name(arguments)
        prog = f"latentvae {name}"
        if name == TRAIN:
            train_command(arguments[1:])
        elif name in COMMANDS_OF_RUNS:
            options, flags = parse_known(COMMANDS_OF_RUNS[name], arguments[1:], prog=prog)
            options.run(flags)
        else:
            parse_options(COMMANDS[name], arguments[1:], prog=prog).run()
    except UserError as error:
        exit_with(error)


def _name(arguments: Sequence[str]) -> str:
    known = [TRAIN, *COMMANDS, *COMMANDS_OF_RUNS]
    if not arguments:
        raise UserError(
            f"a command is missing. `latentvae --help` explains them: {', '.join(known)}"
        )
    if arguments[0] not in known:
        close = nearest(arguments[0], known)
        raise UserError(f"there is no command '{arguments[0]}', only {', '.join(known)}{close}")
    return arguments[0]


def _overview() -> str:
    commands = {TRAIN: train_command, **COMMANDS, **COMMANDS_OF_RUNS}
    first = {name: (command.__doc__ or "").splitlines()[0] for name, command in commands.items()}
    lines = [f"  latentvae {name:<13} {text}" for name, text in first.items()]
    return "\n".join(["Commands (each has --help):", *lines, "", SCRIPTS])
