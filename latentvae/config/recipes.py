"""Recipes for the flag `--recipe`. A recipe is a named set of options for how a new model learns.

A recipe changes the defaults of other flags. The file config.yaml of a run holds the changed
options, not the name of the recipe.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from latentvae.errors import UserError, nearest

if TYPE_CHECKING:
    from latentvae.config.run_config import JobConfig

Config = TypeVar("Config", bound="JobConfig")

FLAG = "--recipe"
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "published": {"model": {"init": "random"}, "optimizer": {"optimizer": "adamw"}},
    "fast": {"model": {"init": "auto"}, "optimizer": {"optimizer": "muon"}},
}


def take_recipe(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the arguments without `--recipe NAME`, and the recipe's name.

    Without the flag, the name is None.

    Raises:
        UserError: the name is missing, or there is no such recipe.
    """
    rest, name, given = [], None, iter(arguments)
    for argument in given:
        if argument.partition("=")[0] != FLAG:
            rest.append(argument)
            continue
        name = argument.partition("=")[2] or next(given, "")
        if name not in RECIPES:
            raise UserError(
                f"recipe must be {' or '.join(RECIPES)} (got '{name}'){nearest(name, RECIPES)}"
            )
    return rest, name


def with_recipe(config: Config, name: str) -> Config:
    """Return a copy of `config` with the recipe's options, except options that `config` lacks."""
    changes = {}
    for section, values in RECIPES[name].items():
        options = getattr(config, section, None)
        known = {option: value for option, value in values.items() if hasattr(options, option)}
        changes |= {section: known} if known else {}
    return config.with_changes(changes)
