"""Read options from YAML files and nested dicts. Report each wrong value in one sentence.

The options are grouped in sections, such as `model` and `run`.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from latentvae.config.run_config import JobConfig, kinds, option_names
from latentvae.errors import UserError, nearest
from latentvae.files import read_yaml

Config = TypeVar("Config", bound=JobConfig)

# For each command, the section that only the presets of this command have. Presets of `train` have
# none of these sections.
COMMANDS = {
    "train-prior": "prior",
    "train-flow": "flow",
    "train-tiny": "student",
    "train-vae": "vae",
}


def presets_folder() -> Path:
    """Return the folder of presets.

    This is `presets` in an installed package, and `train/configs` in a copy of the repository.
    """
    installed = Path(__file__).parents[1] / "presets"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "train" / "configs"


def preset_names(schema: type[JobConfig]) -> list[str]:
    """Return the sorted names of the presets that have only sections of the class `schema`."""
    found = _preset_sections(presets_folder())
    return sorted(name for name, keys in found.items() if keys <= schema.model_fields.keys())


def belongs_to(name_or_path: str, schema: type[JobConfig]) -> bool:
    """Return whether a preset or YAML file has only sections of the option class `schema`."""
    path = Path(name_or_path)
    path = path if path.is_file() else presets_folder() / f"{name_or_path}.yaml"
    if not path.is_file():
        return False
    values = read_yaml(path) or {}
    return isinstance(values, dict) and values.keys() <= schema.model_fields.keys()


@cache
def _preset_sections(folder: Path) -> dict[str, frozenset[str]]:
    """Return the sections in each preset. The result is cached, because reading files is slow."""
    return {path.stem: frozenset(read_yaml(path) or {}) for path in folder.glob("*.yaml")}


def load_preset(
    name_or_path: str, schema: type[Config], *, max_train_steps: int | None = None
) -> Config:
    """Return the options in a YAML file, or in the preset with the given name.

    Args:
        name_or_path: name of the preset, or path of the file.
        schema: class of the options, a subclass of `JobConfig`.
        max_train_steps: length of the run in updates, which replaces the length in the file.
            Options that are a fraction of the run's length are then fractions of this number.

    Raises:
        UserError: the file or preset does not exist, the YAML is unreadable, or an option is
            unknown or out of range.
    """
    # If there is a file and a preset of this name, the file is used.
    path = Path(name_or_path)
    if not path.is_file():
        path = presets_folder() / f"{name_or_path}.yaml"
        if name_or_path not in preset_names(schema):
            raise unknown_config(name_or_path, preset_names(schema))

    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise UserError(
            f"config '{path}' must hold sections ({', '.join(sections(schema))}), not a "
            f"{type(values).__name__}"
        )
    if max_train_steps is not None and isinstance(values.get("run", {}), dict):
        values["run"] = values.get("run", {}) | {"max_train_steps": max_train_steps}
    return parse(values | {"config": name_or_path}, schema, source=str(path))


def unknown_config(name_or_path: str, presets: Iterable[str]) -> UserError:
    """Return the error about a config that is neither a file nor one of the presets."""
    names = sorted(presets)
    if name_or_path in (found := _preset_sections(presets_folder())):
        command = next((c for c, key in COMMANDS.items() if key in found[name_or_path]), "train")
        return UserError(
            f"the preset '{name_or_path}' is for another command, `latentvae {command}`. The "
            f"presets of your command are {', '.join(names)}."
        )
    return UserError(
        f"config '{name_or_path}' is neither a file nor a preset ({', '.join(names)})"
        f"{nearest(Path(name_or_path).stem, names)}"
    )


def sections(schema: type[JobConfig]) -> list[str]:
    return [name for name in schema.model_fields if name != "config"]


def parse(values: dict[str, Any], schema: type[Config], *, source: str) -> Config:
    """Return the options after a check of all names and values.

    Args:
        values: the options by section.
        schema: class of the options, a subclass of `JobConfig`.
        source: the file or command line that the options come from, for error messages.

    Raises:
        UserError: an option is unknown or has a wrong value. The message has one sentence for each
            wrong option.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(
            f"{source}: {'; '.join(_sentence(fault, schema) for fault in error.errors())}"
        ) from error


def checked(config: Config) -> Config:
    """Return the same options after a check of their values.

    The check is needed because an assignment to an option does not check the value.

    Raises:
        UserError: an option has a value that is not allowed.
    """
    return parse(config.model_dump(warnings=False), type(config), source="config")


def _sentence(fault: Any, schema: type[JobConfig]) -> str:
    """Return a sentence for the user that reports one of pydantic's errors."""
    # Name the option as the user wrote it. pydantic adds the tag of the chosen option class.
    chosen = [part for part in fault["loc"] if part in kinds(schema)]
    loc = [part for part in fault["loc"] if part not in chosen]
    where = ".".join(str(part) for part in loc)

    # unknown options
    if fault["type"] == "extra_forbidden":
        return _unknown_option(loc, schema, section=chosen[-1] if chosen else "this section")

    # whole sections
    if fault["type"] == "union_tag_invalid":
        choices = fault["ctx"]["expected_tags"]
        hint = nearest(fault["ctx"]["tag"], choices.replace("'", "").split(", "))
        return f"{where} must be one of {choices} (got '{fault['ctx']['tag']}'){hint}"
    if fault["type"] == "model_type":
        given = _shown(fault["input"])
        return f"{where} is {given}, but should be a section (options with their values)"

    # values
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    close = ""
    if fault["type"] == "literal_error":
        close = nearest(str(fault["input"]), fault["ctx"]["expected"].split("'"))
    names = [part for part in loc if isinstance(part, str)]  # without list indices
    return (
        f"{names[-1] if names else where} is {_shown(fault['input'])}, but "
        f"{fault['msg'].removeprefix('Input ')}{close}"
    )


def _unknown_option(loc: list[Any], schema: type[JobConfig], *, section: str) -> str:
    where = ".".join(str(part) for part in loc)
    if loc[-1] == "quantizer":
        return (
            f"'{where}' is in the wrong place: the section quantizer must be under model, with "
            "architecture: vq"
        )
    names = option_names(schema)
    if loc[-1] in names:
        return f"'{where}' is no option of {section}"
    return f"unknown option '{where}'{nearest(str(loc[-1]), [*names, *sections(schema)])}"


def _shown(value: Any) -> str:
    """Return a value as text. Long text is cut, because a value may be a whole file."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
