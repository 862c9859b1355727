"""The commands that measure models: `latentvae reconstruct`, `evaluate` and `compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional


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
    """Compute each image strip by strip (in bands of rows). The result is the same as if the whole
    image were computed at once. Strips need less memory but more time. For large images, the
    command prints an estimate of the time."""

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
    """Compute faster. `exact` gives the same numbers as the default, up to rounding. `fast`
    computes those parts of the network in bfloat16 for which bfloat16 is faster on this machine.
    `openvino` runs the network in OpenVINO on the CPU. By default, the network computes in float32,
    without these optimizations."""

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
    """Number of aspect ratios. Each image is resized and cropped to the nearest of these aspect
    ratios, as `latentvae train` does with the same option. All cropped images have about as many
    pixels as an image of the size that the option `resolution` gives. With 0, this option has no
    effect."""

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
    """Measure rFID and KID with the original Inception weights. This option needs the package
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
    """Compare the models of one or more reports: print their values and paired differences.

    A paired difference is the mean difference between two models on the same images.
    """

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
