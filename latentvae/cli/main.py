"""The command `latentvae` and its subcommands. Each subcommand has a class with its options."""

import inspect
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from latentvae.cli.anomaly_commands import AnomalyFit, AnomalyScore
from latentvae.cli.flags import exit_with, parse_known, parse_options, say_once, settled_output
from latentvae.cli.flow_commands import Prove, train_flow_command
from latentvae.cli.latents_command import Latents
from latentvae.cli.prior_commands import Sample, train_prior_command
from latentvae.cli.tiny_commands import train_tiny_command
from latentvae.cli.trainings import training_of
from latentvae.cli.vae_commands import Likelihood, train_vae_command
from latentvae.errors import UserError, nearest

if TYPE_CHECKING:
    from latentvae.engine.task import Task


@dataclass(frozen=True)
class Reconstruct:
    """Run images through an autoencoder and write side-by-side pictures and a table."""

    model: Positional[str]
    """Folder or Hub id of a diffusers autoencoder, such as a run's export."""

    inputs: Annotated[tuple[str, ...], Positional]
    """Image files, and folders of images. The images may have different sizes."""

    out: Path
    """Folder for table.csv and the pictures. Each picture shows an original, its reconstruction and
    their difference."""

    max_side: int | None = None
    """Shrink each image until its longer side has at most this many pixels, to save memory. By
    default, no image is shrunk."""

    strips: bool = False
    """Compute each image strip by strip (in bands of rows). The result is the same as for the whole
    image. This needs little memory but takes longer. For large images, the command prints an
    estimate of the time."""

    value_range: tuple[float, float] | None = None
    """The two pixel values that mean black and white in the files. Give the same values as in
    training. Files with floating-point values may need this option."""

    ignore_icc: bool = False
    """Ignore embedded colour profiles (ICC) and use the pixel values that the file stores. By
    default, images with such a profile are converted to sRGB."""

    max_pixels: int | None = None
    """Largest number of pixels (width times height) that an image may have. Larger images are not
    read. The default is Pillow's limit, 89 million. Even a small file can fill the memory when it
    is decoded, so raise this limit only for files that you trust."""

    optimize: Literal["exact", "fast", "openvino"] | None = None
    """Compute faster. `exact` gives the same numbers up to rounding. `fast` computes in bfloat16 if
    bfloat16 is faster than float32 on this machine. `openvino` runs the network in OpenVINO on the
    CPU. By default, the network computes in float32 without these changes."""

    variant: str | None = None
    """Variant of the model's weights, such as fp16. By default, weights without a variant name are
    loaded. If the weights exist only in a single variant, this variant is loaded."""

    def run(self) -> None:
        """Reconstruct the images, and write the pictures and the table."""
        from latentvae.reconstruct import reconstruct

        reconstruct(**vars(self))


@dataclass(frozen=True)
class Evaluate:
    """Measure autoencoders on images: distortion, perception, bit rate, latents, precision, speed.

    The command measures any image autoencoder of diffusers. For comparison, it also measures JPEG,
    WebP and AVIF on the same images. The command writes report.json, per_image.csv, rate.png and
    sheet.png, and prints tables. After an interruption, run the same command again to continue.
    """

    models: Annotated[tuple[str, ...], Positional]
    """Autoencoders to measure: folders, such as exports of runs, or Hub ids (owner/name/folder)."""

    data: str
    """Folder of images that none of the models was trained on. `samples` means two photos from
    scikit-image, which `latentvae train --train_data_dir samples` does not train on."""

    out: Path
    """Folder for the report. The folder is created if it does not exist."""

    quick: bool = False
    """Make a short evaluation of only 8 images, with fewer points on the rate-distortion curves.
    Speed is measured at 256 px only. Metrics that use VGG (LPIPS with VGG, distribution metrics)
    are not measured."""

    max_images: int | None = None
    """Largest number of images to measure. If there are more images, this many are chosen at equal
    distances in the sorted list of names. By default, all images are measured."""

    resolution: tuple[int, ...] | None = None
    """Size in pixels: one number for a square, or height and width. Each image is resized to cover
    this size, and the centre is cropped. By default, each image keeps its own size."""

    aspect_ratio_buckets: int = 0
    """Resize and crop each image to the nearest of this many aspect ratios, as `latentvae train`
    does with the same option. All cropped images have about as many pixels as an image of the size
    that the option `resolution` gives. With 0, all images have the same shape."""

    ignore_icc: bool = False
    """Ignore embedded colour profiles (ICC) and use the pixel values that the file stores. By
    default, images with such a profile are converted to sRGB."""

    max_pixels: int | None = None
    """Largest number of pixels (width times height) that an image may have. Larger images are not
    read. The default is Pillow's limit, 89 million."""

    sections: str = "distortion,rate,latent,passport,tiling,speed"
    """Parts of the report to measure, separated by commas. By default, all parts are measured.
    `distortion` measures the quality of reconstructions. `rate` measures bit rates. `latent`
    measures statistics of latents or tokens. `passport` measures errors in half precision. `tiling`
    measures errors when an image is decoded in tiles. `speed` measures time and memory."""

    all_pages: bool = False
    """Use every page of a TIFF file as a separate image. By default, only the first page is
    used."""

    latent: Literal["mode", "sample"] = "mode"
    """Latent that is decoded: the mode of the posterior, or a sample of the posterior. Bit rates
    are always measured with the mode."""

    rfid: bool = False
    """Measure rFID and KID with the original Inception weights. This needs the package
    torch-fidelity (`pip install latentvae[fid]`)."""

    inception_weights: Path | None = None
    """File with the Inception weights for rFID and KID:
    weights-inception-2015-12-05-6726825d.pth of torch-fidelity. If you give this file, rFID and KID
    are measured, also without `--rfid`."""

    allow_download: bool = False
    """Download the weights of Inception and LPIPS if this machine does not have them."""

    sheet_images: int = 4
    """Number of images that sheet.png shows, each with the reconstructions of all models beside
    it."""

    overwrite: bool = False
    """Delete the earlier evaluation in the folder `out`, and start again."""

    device: str | None = None
    """Torch device of models and metrics. The default is the GPU if there is one."""

    variant: str | None = None
    """Variant of the models' weights, such as fp16. By default, weights without a variant name are
    loaded. If the weights exist only in a single variant, this variant is loaded."""

    def run(self) -> None:
        """Measure the models, write the report and print its tables."""
        from latentvae.cli.evaluate_command import evaluate_command

        sections = [name.strip() for name in self.sections.split(",") if name.strip()]
        evaluate_command(**{**vars(self), "sections": sections})


@dataclass(frozen=True)
class Compare:
    """Compare the models of one or more reports: print their values and paired differences."""

    reports: Annotated[tuple[Path, ...], Positional]
    """report.json files, or the folders that contain them."""

    force: bool = False
    """Compare reports even if they were measured on different images or with different settings. In
    this case, the output has no table of paired differences (differences between models on the same
    images)."""

    markdown: bool = False
    """Print the tables as Markdown, for a model card."""

    def run(self) -> None:
        """Compare the models of the reports, and print the tables."""
        from rich.console import Console

        from latentvae.report import compare, markdown

        tables = compare(self.reports, force=self.force)
        if self.markdown:
            print("\n\n".join(map(markdown, tables)))
        else:
            Console().print(*tables)


@dataclass(frozen=True)
class Export:
    """Write a run's newest checkpoint as a diffusers folder.

    The run may come from any of the commands `latentvae train...`, and may still be training. For
    an autoencoder, the command measures the scaling and the shift of the latents. The training
    images of the run must still exist, because the command reads them.
    """

    folder: Annotated[Path, Positional]
    """Folder of a training run."""

    out: Path
    """Folder to write to. You can load this folder with `from_pretrained` of the model's class."""

    overwrite: bool = False
    """Replace an earlier export in the folder `out`."""

    lookup_from_codebook: bool = False
    """Write a tokenizer as a VQModel for aMUSEd, a text-to-image pipeline of diffusers. This
    pipeline gives the decoder indices of codes, and expects pixels in [0, 1]."""

    push_to_hub: bool = False
    """Upload the exported model to the Hugging Face Hub. The upload uses the account that you
    logged in to with `hf auth login`, or the account of the token in the environment variable
    HF_TOKEN."""

    hub_model_id: str | None = None
    """Name of the Hub repository for the exported model, as owner/name. By default, the repository
    is in your account and is named like the folder of the run."""

    hub_private_repo: bool = False
    """If the upload creates a new Hub repository, make this repository private."""

    def run(self) -> None:
        """Write the diffusers folder, and upload it if `push_to_hub` is set."""
        from latentvae.cli.trainings import TRAININGS, training_of
        from latentvae.engine.publishing import UploadError
        from latentvae.tasks.autoencoder.run_export import export_folder

        config = self.folder / "config.yaml"
        training = training_of(str(config)) if config.is_file() else TRAININGS["train"]
        try:
            if training is TRAININGS["train"]:
                export_folder(**vars(self))
            else:
                self._export(training.task())
        except UploadError as error:
            say_once(f"error: {error}")
            raise SystemExit(1) from None

    def _export(self, kind: "type[Task]") -> None:
        """Export a run that did not train an autoencoder, but for example a prior."""
        from latentvae.engine.finished_export import export_checkpoint
        from latentvae.engine.publishing import check_push, push_export, repository
        from latentvae.engine.resume import read_config
        from latentvae.export.export_folder import check_folder

        # checks
        if self.lookup_from_codebook:
            raise UserError(
                f"lookup_from_codebook needs a tokenizer, but '{self.folder}' is a run of another "
                "kind. Leave it out."
            )
        check_folder(self.out, overwrite=self.overwrite)
        name = repository(self.hub_model_id, self.folder) if self.push_to_hub else ""
        if self.push_to_hub:
            check_push(name, private=self.hub_private_repo)

        # export and upload
        task = kind(read_config(self.folder / "config.yaml", kind.config_class))
        update = export_checkpoint(task, self.folder, self.out)
        print(f"exported update {update:,}: {self.out}")
        if self.push_to_hub:
            message = f"{task.title} after update {update:,}"
            push_export(self.out, repo_id=name, private=self.hub_private_repo, message=message)


@dataclass(frozen=True)
class Encode:
    """Encode images into shards (files) of tokens or latents, to train a generator on them.

    A tokenizer encodes images to tokens. Any other image autoencoder of diffusers encodes images to
    latents. After an interruption, run the same command again to continue. Several processes can
    share the work:

        accelerate launch --num_processes 4 -m latentvae.cli encode MODEL --data photos ...
    """

    model: Positional[str]
    """Folder or Hub id of an autoencoder, such as a run's export."""

    data: str
    """Images to encode: a folder of images, of tar files or of tables (parquet, arrow), or a single
    tar file or table. You may also give `samples` (16 photos of scikit-image, scikit-learn and
    matplotlib), or owner/name of a data set on the Hub."""

    out: Path
    """Folder for the shards and manifest.json. The folder is created if it does not exist."""

    resolution: Annotated[tuple[int, ...], arg(metavar="PIXELS|HEIGHT WIDTH")]
    """Size in pixels: one number for a square, or height and width. Each image is resized to cover
    this size, and the centre is cropped. Height and width must be multiples of the model's
    downsampling factor f."""

    aspect_ratio_buckets: int = 0
    """Resize and crop each image to the nearest of this many shapes (height and width), as
    `latentvae train` does with the same option. The images of each shape are written to their own
    folder in `out`, such as out/192x320. With 0, all images get the same shape."""

    batch_size: int = 16
    """Number of images per forward pass."""

    num_workers: int = 0
    """Number of extra processes that read images. With 0, the encoding process itself reads
    them."""

    shard_items: int = 4096
    """Number of images per shard (file). Each process writes complete shards, so a process that is
    killed loses the work on at most one shard."""

    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Data type of stored latents. The default is float16. Tokens are always stored in the smallest
    integer type that is large enough for the number of codes."""

    moments: bool = False
    """Store the mean and the standard deviation of the posterior, instead of the mean alone.
    Training on the latents can then draw samples from the posterior."""

    interpolation: Literal["lanczos", "bicubic", "bilinear"] = "lanczos"
    """Filter for resizing images."""

    value_range: tuple[float, float] | None = None
    """The two pixel values that mean black and white in the files. Give the same values as in
    training. Files with floating-point values may need this option."""

    ignore_icc: bool = False
    """Ignore embedded colour profiles (ICC) and use the pixel values that the file stores. By
    default, images with such a profile are converted to sRGB."""

    max_pixels: int | None = None
    """Largest number of pixels (width times height) that an image may have. Larger images are not
    read. The default is Pillow's limit, 89 million."""

    all_pages: bool = False
    """Use every page of a TIFF file as a separate image. By default, only the first page is
    used."""

    flip: bool = False
    """Mirror every image left to right before it is encoded. To double the training images of a
    generator, encode once without and once with this option, into two folders."""

    label_column: str | None = None
    """For tables: name of the column that holds the class of each image. The default is `label`. In
    folders and tar files, the class of an image is its first-level folder."""

    caption_column: str | None = None
    """For tables: name of the column that holds the caption of each image. The default is `text` or
    `caption`. In folders and tar files, the caption of an image `a.jpg` is the file `a.txt` beside
    the image."""

    overwrite: bool = False
    """Replace shards in the folder `out` that were made with another model, other data or other
    options. Without this option, such shards are an error. The command finds out whether the data
    are other data by the names, labels and captions of the images, not by their pixels."""

    optimize: Literal["exact", "fast", "openvino"] | None = None
    """Compute faster. `exact` gives the same numbers up to rounding. `fast` computes in bfloat16 if
    bfloat16 is faster than float32 on this machine. `openvino` runs the network in OpenVINO on the
    CPU. By default, the network computes in float32 without these changes. The file manifest.json
    records which choice was made."""

    device: str | None = None
    """Torch device for the computation. The default is the GPU of this process if there is one."""

    variant: str | None = None
    """Variant of the model's weights, such as fp16. By default, weights without a variant name are
    loaded. If the weights exist only in a single variant, this variant is loaded."""

    def run(self) -> None:
        """Encode the images and write the shards."""
        from latentvae.cli.encode_decode import encode_command

        encode_command(**vars(self))


@dataclass(frozen=True)
class Decode:
    """Decode shards of tokens or latents into pictures, one 8-bit PNG per image name.

    Before decoding, the command makes three checks. Each file must have the sha256 that the file
    manifest.json records. Indices of tokens must be below the number of codes. The model must be
    the one that encoded the images.
    """

    shards: Annotated[Path, Positional]
    """Folder that `latentvae encode` wrote."""

    out: Path
    """Folder for the pictures. The folder is created if it does not exist."""

    model: str | None = None
    """Folder or Hub id of the autoencoder. The default is the autoencoder that encoded the images,
    as manifest.json records it."""

    limit: int | None = None
    """Number of images to decode, starting with the first image. By default, all images are
    decoded."""

    batch_size: int = 16
    """Number of images per forward pass."""

    optimize: Literal["exact", "fast", "openvino"] | None = None
    """Compute faster. `exact` gives the same numbers up to rounding. `fast` computes in bfloat16 if
    bfloat16 is faster than float32 on this machine. `openvino` runs the network in OpenVINO on the
    CPU. By default, the network computes in float32 without these changes."""

    device: str | None = None
    """Torch device for the computation. The default is the GPU of this process if there is one."""

    variant: str | None = None
    """Variant of the model's weights, such as fp16. By default, weights without a variant name are
    loaded. If the weights exist only in a single variant, this variant is loaded."""

    def run(self) -> None:
        """Decode the shards and write the pictures."""
        from latentvae.cli.encode_decode import decode_command

        decode_command(**vars(self))


@dataclass(frozen=True)
class Convert:
    """Write an AutoencoderKL or a VQModel with the weight names of CompVis and taming.

    Programs that use the original code of CompVis or taming-transformers can load the result, a
    single .safetensors file. The command prints the `ddconfig` (the network's options in the
    original code) and stores it in the file's metadata. `latentvae.load` also reads such a file,
    but only for some networks. The network must be an AutoencoderKL without attention in its
    levels, and must have the shape of the autoencoder of Stable Diffusion, SD3 or FLUX. Load all
    other networks from their diffusers folder.

    The original classes always have the layers quant_conv and post_quant_conv. Some networks, such
    as those of SD3 and FLUX, do not have these layers. For them, the command writes identity
    layers, which change no values.
    """

    model: Positional[str]
    """Folder or Hub id of the autoencoder, such as a run's export."""

    out: Path
    """The .safetensors file to write."""

    overwrite: bool = False
    """Replace the file if it exists."""

    variant: str | None = None
    """Variant of the model's weights, such as fp16. By default, weights without a variant name are
    loaded. If the weights exist only in a single variant, this variant is loaded."""

    def run(self) -> None:
        """Write the .safetensors file and print the `ddconfig`."""
        from latentvae.export.original import convert

        convert(**vars(self))


@dataclass(frozen=True)
class VerifyResume:
    """Check that a killed run resumes exactly: train a little, kill, resume and compare.

    The command makes a short version of your training twice, with `accelerate launch` and with your
    model, images and precision. The first training is not interrupted. In the second training, all
    processes are killed (SIGKILL) several times, at random moments during updates and saves. After
    each kill, the training is resumed.

    At the end, both trainings must have equal weights, optimizer states, moving averages,
    discriminators, counters, log rows and exported models. On the CPU, all of these must be equal
    bit by bit.

        latentvae verify-resume kl_f8 --train_data_dir photos --mixed_precision bf16 --processes 8

    The command also takes all flags of training, which `latentvae train --config CONFIG --help`
    lists. The exit code is 0 if all checks pass, 1 if a check failed, and 2 if an argument is
    wrong.
    """

    config: Positional[str]
    """Configuration of the training: the name of a preset, or a YAML file."""

    updates: int = 12
    """Number of updates of each of the two trainings (one without interruptions, one that is killed
    and resumed)."""

    kills: int = 3
    """Number of times that the second training is killed and resumed. The first training is not
    killed. Every second kill happens while a checkpoint is saved."""

    processes: int = 1
    """Number of processes of each training, as in `accelerate launch --num_processes`."""

    kill_seed: int = 0
    """Seed of the random moments at which processes are killed."""

    work_dir: Path | None = None
    """New folder for the files of both trainings. This folder is kept after the command. By
    default, the command uses a temporary folder, and deletes this folder if all checks pass."""

    json: Path | None = None
    """JSON file to write the results of the checks to."""

    launch_timeout: int = 3600
    """Longest time in seconds for one call of `accelerate launch`. After this time, the call counts
    as hung."""

    def run(self, flags: Sequence[str]) -> None:
        """Check the run that the flags of training describe, and exit."""
        from latentvae.proofs.verify_resume import verify_resume

        # Each launched training is in a process session of its own, so SIGTERM to this process does
        # not reach it. sys.exit raises an exception in this process, and `verify_resume` then ends
        # the trainings.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        options = dict(vars(self))
        name = options.pop("config")
        task, config = run_of(name, flags, also=list(options))
        raise SystemExit(verify_resume(task, config, **options))


@dataclass(frozen=True)
class Preflight:
    """Check a run before it starts: train a few updates and print a line per check.

    The command trains with the model, images, precision and number of processes of your run. The
    command checks that

    - the gradient of every loss reaches the weights that this loss should train, and no others,
    - the weights and their moving average change,
    - all processes have the same model, and each process reads different images,
    - a training that resumes from a checkpoint computes exactly the same next update.

    The command also estimates the time, memory and disk space of the complete run. The command
    neither reads nor writes the folder `output_dir` of the run.

        latentvae preflight kl_f8 --train_data_dir photos --output_dir runs/first
        accelerate launch --num_processes 8 -m latentvae.cli preflight kl_f8 --train_data_dir ...

    The command also takes all flags of training, which `latentvae train --config CONFIG --help`
    lists. The exit code is 0 if all checks pass, 1 if a check failed, and 2 if an argument is
    wrong.
    """

    config: Positional[str]
    """Configuration of the training: the name of a preset, or a YAML file."""

    json: Path | None = None
    """JSON file to write the results of the checks to."""

    def run(self, flags: Sequence[str]) -> None:
        """Check the run that the flags of training describe, and exit."""
        _, config = run_of(self.config, flags, also=["json"])
        raise SystemExit(training_of(self.config).preflight(config, json=self.json))


def run_of(config: str, flags: Sequence[str], *, also: Sequence[str]) -> "tuple[type[Task], Any]":
    """Return the task and the options of a run, for a command that takes the flags of training.

    The sections of the config decide which kind of training it is.

    Args:
        config: preset or YAML file.
        flags: flags of training.
        also: names of the command's own options. The error about an unknown flag may suggest one of
            these names.
    """
    from latentvae.cli.train import config_from_arguments

    if any(flag.split("=")[0] == "--config" for flag in flags):
        raise UserError(f"--config is not allowed here, because '{config}' is already the config")
    task = training_of(config).task()
    arguments = ["--config", config, *flags]
    schema = task.config_class
    return task, config_from_arguments(arguments, description="", schema=schema, also=also)


Command = (
    type[Reconstruct]
    | type[Evaluate]
    | type[Compare]
    | type[Export]
    | type[Convert]
    | type[Encode]
    | type[Decode]
    | type[Latents]
    | type[Sample]
    | type[Prove]
    | type[Likelihood]
    | type[AnomalyFit]
    | type[AnomalyScore]
)

COMMANDS: dict[str, Command] = {
    "reconstruct": Reconstruct,
    "evaluate": Evaluate,
    "compare": Compare,
    "export": Export,
    "convert": Convert,
    "encode": Encode,
    "decode": Decode,
    "latents": Latents,
    "sample": Sample,
    "prove": Prove,
    "likelihood": Likelihood,
    "anomaly fit": AnomalyFit,
    "anomaly score": AnomalyScore,
}


SCRIPTS = """\
Scripts of the repository:
  train/train_kl.py        Train an autoencoder: `latentvae train` as a script.
  train/train_vq.py        Train a tokenizer: `latentvae train` with the default preset vq_small.
  train/train_prior.py     Train a prior on tokens: `latentvae train-prior` as a script.
  train/train_flow.py      Train a flow matching model: `latentvae train-flow` as a script.
  train/train_tiny.py      Distil a small autoencoder: `latentvae train-tiny` as a script.
  train/train_vae.py       Train a VAE by its likelihood: `latentvae train-vae` as a script.
  train/demo_pipeline.py   Run an export inside diffusers' Stable Diffusion pipelines.

To use several processes: accelerate launch --num_processes 8 -m latentvae.cli train ..."""
# These commands also take the flags of training.
COMMANDS_OF_RUNS: dict[str, type[Preflight] | type[VerifyResume]] = {
    "preflight": Preflight,
    "verify-resume": VerifyResume,
}


def train_command(arguments: Sequence[str]) -> None:
    """Train an autoencoder or a tokenizer on your images, and export it for diffusers.

        latentvae train --config kl_f8 --train_data_dir photos --output_dir runs/first
        accelerate launch --num_processes 8 -m latentvae.cli train --config kl_f8 ...

    To train with a single process, leave out `accelerate launch`. `--config` takes a YAML file or
    the name of a preset. Every flag below overrides a value of this config. To resume a training
    that was interrupted, run the same command again. `--preflight` trains a few updates to check
    the training, and then exits. `--recipe fast` means `--init auto --optimizer muon`: the initial
    weights compute a PCA of image patches, and the optimizer is Muon. `--recipe published` means
    random initial weights and AdamW. `--train_data_dir samples` trains on 16 photos that come with
    scikit-image, scikit-learn and matplotlib.
    """
    from latentvae.cli.train import run_training

    if arguments and not arguments[0].startswith("-"):
        raise UserError(f"'{arguments[0]}' is not a flag; did you mean '--config {arguments[0]}'?")
    run_training(arguments, description=inspect.cleandoc(train_command.__doc__ or ""))


TRAINING: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train_command,
    "train-prior": train_prior_command,
    "train-flow": train_flow_command,
    "train-tiny": train_tiny_command,
    "train-vae": train_vae_command,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. After a wrong argument, print one sentence and exit with code 2."""
    with settled_output():
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments[:2]) and " ".join(arguments[:1]) not in _one_word_names():
        print(_overview())
        raise SystemExit(0)
    try:
        name, others = _name(arguments)
        prog = f"latentvae {name}"
        if name in TRAINING:
            TRAINING[name](others)
        elif name in COMMANDS_OF_RUNS:
            options, flags = parse_known(COMMANDS_OF_RUNS[name], others, prog=prog)
            options.run(flags)
        else:
            parse_options(COMMANDS[name], others, prog=prog).run()
    except UserError as error:
        exit_with(error)


def _name(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the name of the command, of one or two words, and the arguments after it."""
    known = [*TRAINING, *COMMANDS, *COMMANDS_OF_RUNS]
    if not arguments:
        raise UserError(
            f"a command is missing. Give one of {', '.join(known)}. `latentvae --help` explains "
            "the commands."
        )
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in known:
            return name, arguments[words:]

    inside = any(command.startswith(f"{arguments[0]} ") for command in known)
    name = " ".join(arguments[: 2 if inside else 1])
    raise UserError(f"there is no command '{name}', only {', '.join(known)}{nearest(name, known)}")


def _one_word_names() -> set[str]:
    """Return the commands of one word. `anomaly` alone is not a command."""
    return {name for name in [*TRAINING, *COMMANDS, *COMMANDS_OF_RUNS] if " " not in name}


def _overview() -> str:
    commands = {**TRAINING, **COMMANDS, **COMMANDS_OF_RUNS}
    first = {name: (command.__doc__ or "").splitlines()[0] for name, command in commands.items()}
    lines = [f"  latentvae {name:<13} {text}" for name, text in first.items()]
    return "\n".join(["Commands (each has --help):", *lines, "", SCRIPTS])
