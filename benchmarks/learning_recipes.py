"""The recipes of trainings that learning.py compares, and the time that each recipe needs."""

import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentvae.config.presets import preset_names, presets_folder
from latentvae.errors import UserError, nearest
from latentvae.files import read_yaml
from latentvae.tasks.autoencoder import TrainConfig, load_preset
from latentvae.tasks.autoencoder.config import parse

HERE = Path(__file__).parent
REFERENCE = "reference"


@dataclass(frozen=True)
class Recipe:
    """A recipe: the options of a training, or the plain script reference.py.

    `values` is a dict from sections to options, or None for reference.py.
    """

    name: str
    values: dict[str, Any] | None

    def config(self, updates: int | None = None) -> TrainConfig:
        """Return all options for a training of `updates` updates.

        For the plain script reference.py, the options are those of the preset kl_small.

        Options that are fractions of the training length depend on `updates`. With None, the
        recipe's own number of updates is used.
        """
        if self.values is None:
            return load_preset("kl_small")
        run = self.values.get("run", {}) | ({"max_train_steps": updates} if updates else {})
        return parse(self.values | {"run": run}, source=f"recipe {self.name}")

    def discriminator_start(self, updates: int) -> int:
        """Return the first update in which the discriminator learns.

        If the discriminator never learns, return `updates`.
        """
        if self.values is None:
            return updates
        config = self.config(updates)
        has_one = config.discriminator.disc_scale > 0
        return min(config.discriminator_start, updates) if has_one else updates


@dataclass(frozen=True)
class Speed:
    """The time that a recipe (a set of training options) needs on an idle machine, in seconds."""

    start: float
    """Seconds from the start of the program to the first update."""

    update: float
    """Median seconds per update, while the discriminator does not learn."""

    with_discriminator: float | None = None
    """Median seconds per update, while the discriminator learns."""

    def updates_in(self, minutes: float, recipe: Recipe) -> int:
        """Return the largest number of updates that fit into `minutes`."""
        most = max(int(60 * minutes / self.update), 0)
        return bisect.bisect_right(
            range(1, most + 1), minutes, key=lambda n: self.minutes_of(n, recipe, total=n)
        )

    def minutes_of(self, updates: int, recipe: Recipe, *, total: int) -> float:
        """Return the minutes that the start and the first `updates` of `total` updates take."""
        later = max(updates - recipe.discriminator_start(total), 0)
        cost = self.update if self.with_discriminator is None else self.with_discriminator
        return (self.start + (updates - later) * self.update + later * cost) / 60


def read_recipe(name: str) -> Recipe:
    """Return the recipe of this name.

    Raises:
        UserError: there is no such recipe, or its file has a wrong value.
    """
    if name == REFERENCE:
        return Recipe(name, None)
    places = (Path(name), HERE / "recipes" / f"{name}.yaml", presets_folder() / f"{name}.yaml")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        own = [place.stem for place in (HERE / "recipes").glob("*.yaml")]
        known = sorted([*preset_names(TrainConfig), *own, REFERENCE])
        raise UserError(
            f"recipe '{name}' is neither a YAML file nor one of {', '.join(known)}"
            f"{nearest(name, known)}"
        )

    values = _read_sections(path)
    if (preset := values.pop("preset", None)) is not None:
        load_preset(preset)  # raises an error if there is no such preset
        values = _merged(_read_sections(presets_folder() / f"{preset}.yaml"), values)
    recipe = Recipe(path.stem, values)
    recipe.config()  # raises an error if a value is wrong
    return recipe


def _read_sections(path: Path) -> dict[str, Any]:
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise UserError(
            f"recipe '{path}' must hold sections of options, not a {type(values).__name__}"
        )
    return values


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return nested options, in which the values of `own` replace those of `base`."""
    both = {k: _merged(base[k], v) for k, v in own.items() if _nested(v) and _nested(base.get(k))}
    return base | own | both


def _nested(value: Any) -> bool:
    return isinstance(value, dict)
