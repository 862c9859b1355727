"""The commands of networks with a likelihood: `latentvae train-vae` and `latentvae likelihood`."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional


@dataclass(frozen=True)
class Likelihood:
    """Measure the likelihood of images under a variational autoencoder.

        latentvae likelihood runs/vae --data mnist/test.parquet --samples 5000 --json nats.json

    The command prints two lower bounds of ln p(x): the ELBO, and the importance-weighted bound,
    which comes closer to ln p(x) with more samples. The command also prints the KL of each group of
    latents. If the model was trained with a preset that repeats the training of a paper, the
    command also prints the likelihood that the paper reports.
    """

    model: Annotated[Path, Positional]
    """Folder of a finished run of `latentvae train-vae`, or the folder `export` in it."""

    data: str
    """Images to measure, in any form that --train_data_dir takes, such as a folder, a tar file or a
    parquet file."""

    samples: int = 100
    """Number of latent samples for each image. More samples bring the importance-weighted bound
    closer to ln p(x), the log-likelihood of an image. Papers use 5,000 for images of digits."""

    max_images: int | None = None
    """Largest number of images to measure. If there are more images, this many are chosen at equal
    distances in the list of all images. By default, all images are measured."""

    batch_size: int = 20
    """Number of images per forward pass."""

    binarize: Literal["static", "threshold"] | None = None
    """How grey pixels become black or white. `static` draws each pixel once at random, with its
    grey value as the probability of white. `threshold` makes pixels above mid-grey white. By
    default, the pixels become black or white as in training, but a model trained with `dynamic` is
    measured with `static`. Leave out --binarize for a model of grey values."""

    seed: int = 0
    """Seed of the latent samples, and of the random choice of black or white (see binarize). The
    same seed gives the same numbers."""

    json: Path | None = None
    """JSON file to write the results to."""

    device: str | None = None
    """Torch device for the computation. The default is the GPU if there is one."""

    def run(self) -> None:
        """Measure the images, print the results, and write them if `json` is given."""
        from latentvae.tasks.likelihood.measure import measure_folder

        measure_folder(
            self.model,
            self.data,
            samples=self.samples,
            max_images=self.max_images,
            batch_size=self.batch_size,
            binarize=self.binarize,
            seed=self.seed,
            json=self.json,
            device=self.device,
        )


def train_vae_command(arguments: Sequence[str]) -> None:
    """Train a variational autoencoder by its likelihood: VAE, IWAE, hierarchical VAEs.

        latentvae train-vae --config vae_mnist --train_data_dir mnist/train.parquet \\
            --output_dir runs/vae
        latentvae likelihood runs/vae --data mnist/test.parquet --samples 5000

    To train with several processes, start the command with `accelerate launch`. `--config` takes a
    YAML file or the name of a preset. Every flag below overrides a value of this config. To resume
    a training that was interrupted, run the same command again. `--preflight` trains a few updates
    to check the training, and then exits.
    """
    from latentvae.cli.train import run_task
    from latentvae.proofs.likelihood_preflight import likelihood_preflight
    from latentvae.tasks.likelihood.task import LikelihoodTask

    run_task(
        LikelihoodTask,
        arguments,
        description=inspect.cleandoc(train_vae_command.__doc__ or ""),
        default_config="vae_mnist",
        preflight=likelihood_preflight,
    )
