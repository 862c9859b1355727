"""The commands `latentvae train-flow` and `latentvae prove`."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional


def train_flow_command(arguments: Sequence[str]) -> None:
    """Train a flow matching model on latents: a network that turns noise into new images.

        latentvae encode runs/kl/export --data photos --resolution 64 --out latents
        latentvae train-flow --latents latents --output_dir runs/flow
        latentvae sample runs/flow --num 16 --out pictures

    With `--text_encoder`, the network is trained with the captions of the images, and `latentvae
    sample` takes a `--prompt`.

    To train with several processes, start the command with `accelerate launch`. `--config` takes a
    YAML file or the name of a preset. Every flag below overrides a value of this config. To resume
    a training that was interrupted, run the same command again. `--preflight` trains a few updates
    to check the training, and then exits.
    """
    from latentvae.cli.train import run_task
    from latentvae.proofs.flow_preflight import flow_preflight
    from latentvae.tasks.flow.task import FlowTask

    run_task(
        FlowTask,
        arguments,
        description=inspect.cleandoc(train_flow_command.__doc__ or ""),
        default_config="flow_small",
        preflight=flow_preflight,
    )


@dataclass(frozen=True)
class Prove:
    """Measure how good latents or tokens are: train the same small generator on each folder.

    For comparison, the same generator is also trained equally long on control data, such as the
    same latents with noise or with shuffled classes. The generated pictures are compared with real
    pictures, with reconstructions and with pictures of an untrained generator. OUT/proof.html shows
    the result.

        latentvae encode runs/kl/export --data photos --resolution 64 --out latents
        latentvae prove latents --out proof

    If you give several folders, the latents or tokens in all folders must come from the same
    images, and the results are compared. With the default options, 3,000 images of 64 px take one
    to two hours for each folder on two CPU cores. After an interruption, run the same command again
    to continue. The result says which latents or tokens are better for the small generator and your
    images. For other generators or images, the result may differ.
    """

    shards: Annotated[tuple[Path, ...], Positional]
    """Folders of latents or tokens of the same images, which `latentvae encode` wrote."""

    out: Path
    """Folder for the results: proof.json, proof.html, the pictures and the files of the
    trainings."""

    data: str | None = None
    """The images from which the latents or tokens were encoded. By default, the file manifest.json
    in each folder of latents or tokens says where these images are."""

    models: tuple[str, ...] = ()
    """The autoencoders that made the latents or tokens: one for each folder, in the order of the
    folders. By default, the file manifest.json in each folder names the autoencoder."""

    controls: tuple[str, ...] | None = None
    """Control experiments: for comparison, train the same generator on altered latents, tokens or
    classes. `noise` adds noise to latents, or replaces some tokens by random tokens. `labels`
    shuffles the classes of the training images. `permuted` permutes the positions in a latent or in
    the tokens, for all images in the same way. `blocks` (for latents) trains on mean colours of
    square blocks of pixels instead of latents. `shuffled` (for tokens) gives each image its own
    random order of tokens. By default, all control experiments are made."""

    updates: int = 400
    """Number of updates of each training."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings. Each generator is trained once with each seed. A difference between
    two generators that is smaller than the spread of the results over the seeds may be due to
    chance."""

    shifts: tuple[float, ...] = (1.0, 2.0, 4.0)
    """For latents: shifts of the noise levels to try, in extra trainings with a separate seed. All
    other trainings then use the best shift. 1 is no shift. With larger values, high noise levels
    occur more often."""

    samples: int = 500
    """Number of pictures that each generator draws."""

    guidance: float = 3.0
    """Weight of classifier-free guidance for the pictures on which class_accuracy is measured. 1 is
    no guidance. All other results are measured on pictures without guidance."""

    width: int = 192
    """Number of channels of the generator, a multiple of 32."""

    depth: int = 4
    """Number of transformer blocks of the generator."""

    batch_size: int = 64
    """Number of training images in each update."""

    max_images: int = 10_000
    """Largest number of training images. If there are more images, this many are chosen at equal
    distances in the list of all training images."""

    def run(self) -> None:
        """Train and measure all generators, and write the results."""
        from latentvae.proofs.generator_proof import ProofSettings, prove

        own = {"shards", "out", "data", "models", "controls"}
        settings = ProofSettings(**{n: v for n, v in vars(self).items() if n not in own})
        prove(
            self.shards,
            self.out,
            settings=settings,
            data=self.data,
            models=self.models,
            controls=self.controls,
        )
        print(f"done: {self.out / 'proof.html'}")
