"""The commands of generators: `latentvae train-prior` and `latentvae sample`."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from latentvae.errors import UserError


@dataclass(frozen=True)
class Sample:
    """Draw pictures from a generator: one PNG for each picture, and one grid of the first 64.

    A generator is a prior on tokens (`latentvae train-prior`), a flow matching model on latents
    (`latentvae train-flow`), or a variational autoencoder (`latentvae train-vae`). The exported
    folder of a prior or flow matching model also contains the autoencoder, which decodes the tokens
    or latents.

        latentvae sample runs/prior --num 16 --class church --guidance 2 --out pictures
    """

    prior: Annotated[Path, Positional, arg(name="model")]
    """Folder of a finished run of `latentvae train-prior`, `latentvae train-flow` or `latentvae
    train-vae`, or the folder `export` in it."""

    out: Path
    """Folder for the pictures. This folder must be new or empty."""

    num: int = 16
    """Number of pictures."""

    class_name: Annotated[str | None, arg(name="class")] = None
    """Class of the pictures: name or number of the class. By default, the first picture has the
    first class, the second picture the second class, and so on. After the last class, the first
    class follows again. For a variational autoencoder, the default is a random class for each
    picture."""

    prompt: str | None = None
    """Text that describes the pictures, for a prior or a flow matching model that was trained with
    captions. A flow matching model that was trained with captions always needs a prompt."""

    guidance: float = 1.0
    """Weight of classifier-free guidance. 1 is no guidance. Higher values, such as 2, give pictures
    that fit their class or text better, but are less varied."""

    temperature: float | None = None
    """For a prior: divide the logits by this number. Values below 1 prefer likely tokens, and
    values above 1 give more variety. For a variational autoencoder: multiply the standard
    deviations of its prior by this number. The default is 1."""

    top_k: int | None = None
    """For a prior: number of most likely codes from which each token is drawn. By default, each
    token is drawn from all codes."""

    top_p: float | None = None
    """For a prior: draw each token only from the most likely codes whose probabilities add up to
    this value (0 to 1). By default, each token is drawn from all codes."""

    steps: int | None = None
    """For a flow matching model: number of solver steps from noise to latent. The default is 25."""

    solver: Literal["euler", "heun"] | None = None
    """For a flow matching model: solver of the differential equation that turns noise into latents.
    `heun` evaluates the network twice in a step and is more exact than `euler`. The default is
    euler."""

    seed: int = 0
    """Seed of the random numbers. The same seed gives the same pictures."""

    batch_size: int = 32
    """Number of pictures that are drawn at once."""

    tokens: bool = False
    """For a prior: also write the sampled tokens, to the folder `tokens` in the folder `out`. You
    can decode these tokens with `latentvae decode`."""

    device: str | None = None
    """Torch device for the computation. The default is the GPU if there is one."""

    def run(self) -> None:
        """Draw the pictures and write them."""
        from latentvae.models.likelihood_models import find_likelihood_export
        from latentvae.priors.flow_sample import flow_export

        if (folder := find_likelihood_export(self.prior)) is not None:
            pictures = self._from_vae(folder)
        elif (folder := flow_export(self.prior)) is not None:
            pictures = self._from_flow(folder)
        else:
            pictures = self._from_prior()
        print(f"{len(pictures)} pictures and grid.png in {self.out}")

    def _from_prior(self) -> list[Path]:
        from latentvae.priors.sample import sample_folder
        from latentvae.priors.sampling import Sampling

        names = {"temperature", "top_k", "top_p"}
        given = self._given(names, {"steps", "solver"}, kind="a prior on tokens")
        return sample_folder(
            self.prior,
            self.out,
            num=self.num,
            class_name=self.class_name,
            prompt=self.prompt,
            options=Sampling(self.guidance, **given),
            seed=self.seed,
            batch_size=self.batch_size,
            tokens=self.tokens,
            device=self.device,
        )

    def _from_flow(self, folder: Path) -> list[Path]:
        from latentvae.priors.flow_matching import FlowSampling
        from latentvae.priors.flow_sample import sample_flow_folder

        others = {"temperature", "top_k", "top_p", "tokens"}
        given = self._given({"steps", "solver"}, others, kind="a flow matching model")
        return sample_flow_folder(
            folder,
            self.out,
            num=self.num,
            class_name=self.class_name,
            prompt=self.prompt,
            options=FlowSampling(self.guidance, **given),
            seed=self.seed,
            batch_size=self.batch_size,
            device=self.device,
        )

    def _from_vae(self, folder: Path) -> list[Path]:
        from latentvae.priors.vae_sample import sample_vae_folder

        others = {"prompt", "top_k", "top_p", "steps", "solver", "tokens"}
        if self.guidance != 1:
            raise UserError(
                f"--guidance {self.guidance:g} has no meaning for '{self.prior}', which is a "
                "variational autoencoder. Leave it out."
            )
        return sample_vae_folder(
            folder,
            self.out,
            num=self.num,
            seed=self.seed,
            device=self.device,
            **self._given({"temperature", "class_name"}, others, kind="a variational autoencoder"),
        )

    def _given(self, names: set[str], others: set[str], *, kind: str) -> dict[str, Any]:
        """Return the options in `names` that are set.

        Raises:
            UserError: an option in `others` is set.
        """
        for name in sorted(others):
            if getattr(self, name) not in (None, False):
                flag = name.removesuffix("_name")
                raise UserError(
                    f"--{flag} {getattr(self, name)} has no meaning for '{self.prior}', which is "
                    f"{kind}. Leave it out."
                )
        return {name: v for name in names if (v := getattr(self, name)) is not None}


def train_prior_command(arguments: Sequence[str]) -> None:
    """Train a prior on tokens: a transformer that generates the tokens of new images.

        latentvae encode runs/tokens/export --data photos --resolution 64 --out tokens
        latentvae train-prior --tokens tokens --output_dir runs/prior
        latentvae sample runs/prior --num 16 --out pictures

    To train with several processes, start the command with `accelerate launch`. `--config` takes a
    YAML file or the name of a preset. Every flag below overrides a value of this config. To resume
    a training that was interrupted, run the same command again. `--preflight` trains a few updates
    to check the training, and then exits.
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
