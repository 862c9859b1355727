"""The table of everything that latentvae trains.

A new kind of training needs a new row in the table `TRAININGS`. The classes of the tasks are
imported only when they are needed, because the import of torch and diffusers takes seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentvae.engine.task import Task


@dataclass(frozen=True)
class Training:
    """A kind of training.

    Attributes:
        task: function that imports and returns the class of the task (`engine.task.Task`), which
            defines what a run trains.
        preflight: function that checks a run before it starts. The function takes the options of
            the run and the keyword argument `json`, and returns the exit code.
    """

    task: "Callable[[], type[Task]]"
    preflight: Callable[..., int]


def _autoencoder() -> "type[Task]":
    from latentvae.tasks.autoencoder.task import AutoencoderTask

    return AutoencoderTask


def _check_autoencoder(config: Any, **options: Any) -> int:
    from latentvae.proofs.preflight import preflight

    return preflight(config, **options)


def _prior() -> "type[Task]":
    from latentvae.tasks.prior.task import PriorTask

    return PriorTask


def _check_prior(config: Any, **options: Any) -> int:
    from latentvae.proofs.prior_preflight import prior_preflight

    return prior_preflight(config, **options)


def _flow() -> "type[Task]":
    from latentvae.tasks.flow.task import FlowTask

    return FlowTask


def _check_flow(config: Any, **options: Any) -> int:
    from latentvae.proofs.flow_preflight import flow_preflight

    return flow_preflight(config, **options)


def _tiny() -> "type[Task]":
    from latentvae.tasks.distill.task import DistillTask

    return DistillTask


def _check_tiny(config: Any, **options: Any) -> int:
    from latentvae.proofs.distill_preflight import distill_preflight

    return distill_preflight(config, **options)


def _vae() -> "type[Task]":
    from latentvae.tasks.likelihood.task import LikelihoodTask

    return LikelihoodTask


def _check_vae(config: Any, **options: Any) -> int:
    from latentvae.proofs.likelihood_preflight import likelihood_preflight

    return likelihood_preflight(config, **options)


# The keys are names of commands. A config that fits several kinds of training belongs to the first
# of them.
TRAININGS = {
    "train": Training(_autoencoder, _check_autoencoder),
    "train-prior": Training(_prior, _check_prior),
    "train-flow": Training(_flow, _check_flow),
    "train-tiny": Training(_tiny, _check_tiny),
    "train-vae": Training(_vae, _check_vae),
}


def training_of(config: str) -> Training:
    """Return the kind of training whose options include all sections of a preset or YAML file.

    A section is a group of options. If several kinds fit, the first of them in `TRAININGS` is
    returned. If none fits, the training of an autoencoder is returned.
    """
    from latentvae.config.presets import belongs_to

    fits = (t for t in TRAININGS.values() if belongs_to(config, t.task().config_class))
    return next(fits, TRAININGS["train"])
