"""The commands of priors: `latentvae train-prior` and `latentvae sample`."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Sample:
    """Draw pictures from a prior: one PNG for each picture, and a grid of them.

    A prior is a generator of tokens that `latentvae train-prior` has trained. Its export holds the
    tokenizer too, which decodes the tokens.

        latentvae sample runs/prior --num 16 --class church --guidance 2 --out pictures
    """

    prior: Annotated[Path, Positional]
    """Folder of a finished run of `latentvae train-prior`, or the folder `export` in it."""

    out: Path
    """Folder for the pictures. It must be new or empty."""

    num: int = 16
    """Number of pictures."""

    class_name: Annotated[str | None, arg(name="class")] = None
    """Class of the pictures: its name or its number. By default, the pictures take all classes in
    turn."""

    prompt: str | None = None
    """Text that describes the pictures, for a prior with a text encoder."""

    guidance: float = 1.0
    """Weight of classifier-free guidance. 1 is no guidance. Higher values, such as 2, give pictures
    that fit their class or text better, but are less varied."""

    temperature: float = 1.0
    """Divide the logits by this number. Values below 1 prefer likely tokens, and values above 1
    give more variety."""

    top_k: int = 0
    """Draw each token from this many most likely codes only. 0 draws from all codes."""

    top_p: float = 1.0
    """Keep the most likely codes until their probabilities add up to this share, and draw from
    these only. 1 keeps all codes."""

    seed: int = 0
    """Seed of the random numbers. The same seed gives the same pictures."""

    batch_size: int = 32
    """Number of pictures that are drawn at once."""

    tokens: bool = False
    """Also write the sampled tokens, to the folder `tokens` in `out`. `latentvae decode` reads
    them."""

    device: str | None = None
    """Torch device for the computation. The default is the GPU if there is one."""

    def run(self) -> None:
        """Draw the pictures and write them."""
        from latentvae.priors.sample import sample_folder
        from latentvae.priors.sampling import Sampling

        options = Sampling(self.guidance, self.temperature, self.top_k, self.top_p)
        pictures = sample_folder(
            self.prior,
            self.out,
            num=self.num,
            class_name=self.class_name,
            prompt=self.prompt,
            options=options,
            seed=self.seed,
            batch_size=self.batch_size,
            tokens=self.tokens,
            device=self.device,
        )
        print(f"{len(pictures)} pictures and grid.png in {self.out}")


def train_prior_command(arguments: Sequence[str]) -> None:
    """Train a prior on tokens: a transformer that generates the tokens of new images.

        latentvae encode runs/tokens/export --data photos --resolution 64 --out tokens
        latentvae train-prior --tokens tokens --output_dir runs/prior
        latentvae sample runs/prior --num 16 --out pictures

    A single process does not need `accelerate launch`. `--config` takes a YAML file or the name of
    a preset. Every flag below overrides a value of this config. To resume a run that was
    interrupted, run the same command again. `--preflight` trains a few updates to check the run,
    and then exits.
    """
    from latentvae.cli.train import run_task
    from latentvae.proofs.prior_preflight import prior_preflight
    from latentvae.tasks.prior.task import PriorTask

    run_task(
        PriorTask,
        arguments,
        description=inspect.cleandoc(train_prior_command.__doc__ or ""),
        default_config="prior_small",
        preflight=prior_preflight,
    )
