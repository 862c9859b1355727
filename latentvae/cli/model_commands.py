"""The commands that apply and convert models: `export`, `convert`, `encode` and `decode`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from latentvae.cli.flags import say_once
from latentvae.cli.trainings import training_of
from latentvae.errors import UserError

if TYPE_CHECKING:
    from latentvae.engine.task import Task


@dataclass(frozen=True)
class Export:
    """Write a run's newest checkpoint as a diffusers folder.

    A run of any of the commands `latentvae train...` can be exported, even while it is still
    training. For an autoencoder, the command measures the scaling and the shift of the latents. The
    training data of the run (images, latents or tokens) must still exist, because the command reads
    them.
    """

    folder: Annotated[Path, Positional]
    """Folder of a training run."""

    out: Path
    """Folder to write to. You can load this folder with `from_pretrained` of the model's class."""

    overwrite: bool = False
    """Replace an earlier export in the folder `out`."""

    lookup_from_codebook: bool = False
    """Write a tokenizer as a VQModel for aMUSEd, a text-to-image pipeline of diffusers. This
    pipeline passes indices of codes to the decoder, and expects pixels in [0, 1]."""

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
        from latentvae.cli.trainings import TRAININGS
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
    tar file or table. You may also give `samples` (21 photos that are installed with latentvae),
    or owner/name of a data set on the Hub."""

    out: Path
    """Folder for the shards and manifest.json. The folder is created if it does not exist."""

    resolution: Annotated[tuple[int, ...], arg(metavar="PIXELS|HEIGHT WIDTH")]
    """Size in pixels: one number for a square, or height and width. Each image is resized to cover
    this size, and the centre is cropped. Height and width must be multiples of the model's
    downsampling factor f."""

    aspect_ratio_buckets: int = 0
    """Number of image shapes (height and width). Each image is resized and cropped to the nearest
    of these shapes, as `latentvae train` does with the same option. The images of each shape are
    written to their own folder in `out`, such as out/192x320. With 0, all images get the same
    shape."""

    batch_size: int = 16
    """Number of images per forward pass."""

    num_workers: int = 0
    """Number of extra processes that read images. With 0, the encoding process itself reads the
    images."""

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
    options. Without this option, such shards are an error. To detect other data, the command
    compares the names, labels and captions of the images, but not their pixels."""

    optimize: Literal["exact", "fast", "openvino"] | None = None
    """Compute faster. `exact` gives the same numbers as the default, up to rounding. `fast`
    computes those parts of the network in bfloat16 for which bfloat16 is faster on this machine.
    `openvino` runs the network in OpenVINO on the CPU. By default, the network computes in float32,
    without these optimizations. The file manifest.json records the value of this option."""

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
    """Decode shards of tokens or latents into pictures, one 8-bit PNG per image.

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
    """Compute faster. `exact` gives the same numbers as the default, up to rounding. `fast`
    computes those parts of the network in bfloat16 for which bfloat16 is faster on this machine.
    `openvino` runs the network in OpenVINO on the CPU. By default, the network computes in float32,
    without these optimizations."""

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
    """Write an AutoencoderKL or a VQModel with the weight names of its original code.

    Programs that use the original code of CompVis or taming-transformers can load the result, a
    single .safetensors file. The command prints the `ddconfig` (the network's options in the
    original code) and stores it in the file's metadata. The metadata also holds the network's
    config of diffusers, so `latentvae.load` can read the .safetensors file too.

    The original classes always have the layers quant_conv and post_quant_conv. If the network does
    not have these two layers, as in SD3 and FLUX, the command writes identity layers, which change
    no values.
    """

    model: Positional[str]
    """Folder or Hub id of the autoencoder, such as a run's export."""

    out: Path
    """The .safetensors file to write."""

    overwrite: bool = False
    """Replace the file `out` if it exists."""

    variant: str | None = None
    """Variant of the model's weights, such as fp16. By default, weights without a variant name are
    loaded. If the weights exist only in a single variant, this variant is loaded."""

    def run(self) -> None:
        """Write the .safetensors file and print the `ddconfig`."""
        from latentvae.export.original import convert

        convert(**vars(self))
