"""Describe the options of a preset as plain data, from which flags and help are made.

Importing the classes of the options also imports torch and diffusers, which takes seconds. So the
file options.json holds the options of the autoencoders' presets as plain data. With options.json,
help and messages about wrong flags do not need these slow imports. If a file that defines options
has changed, options.json is out of date and is ignored. Without options.json, help is slow, but
correct. `python -m latentvae.cli.option_list` writes options.json again.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin

import tyro

from latentvae.config.presets import load_preset, preset_names, presets_folder

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from latentvae.config.run_config import JobConfig

FILE = Path(__file__).with_name("options.json")
_PACKAGE = Path(__file__).resolve().parents[1]

# The types that tyro parses, by their spelling in `Option.kind`. Any other type is read as text.
KINDS: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "int | None": int | None,
    "float | None": float | None,
    "str | None": str | None,
    "int | float": int | float,
    "int | float | None": int | float | None,
    "int | tuple[int, int]": int | tuple[int, int],
    "tuple[int, int] | None": tuple[int, int] | None,
    "tuple[float, float] | None": tuple[float, float] | None,
    "tuple[int, ...]": tuple[int, ...],
    "tuple[float, ...]": tuple[float, ...],
    "tuple[str, ...]": tuple[str, ...],
    "choice": str | None,
    "choices": tuple[str, ...],
}
HIDDEN = "hidden"  # kind of an option that only a preset sets


class Option(NamedTuple):
    """One option: its name, type, help text, choices (if it has any) and value."""

    name: str
    kind: str
    text: str
    choices: tuple[str, ...]
    value: Any


class Group(NamedTuple):
    """A section of options.

    Attributes:
        name: name of the section in the config.
        title: name of the section's class.
        doc: docstring of the section's class.
        members: the options of the section, and the sections in it.
    """

    name: str
    title: str
    doc: str
    members: "tuple[Option | Group, ...]"

    def options(self) -> Iterator[Option]:
        """Yield all options of the group and of the groups in it."""
        for member in self.members:
            yield from member.options() if isinstance(member, Group) else (member,)


@dataclasses.dataclass(frozen=True)
class OptionList:
    """The options of all presets for one kind of training.

    Attributes:
        presets: the options of each preset, by the preset's name.
        elsewhere: maps an option's name in other training programs to its name in this project.
    """

    presets: dict[str, Group]
    elsewhere: dict[str, str]


def describe(section: "BaseModel", name: str = "") -> Group:
    """Return the options in a section, with their current values."""
    from pydantic import BaseModel

    from latentvae.config.run_config import JobConfig
    from latentvae.option_marks import ChosenByPreset, marked

    chosen = marked(type(section), ChosenByPreset)
    members: list[Option | Group] = []
    for inner, info in type(section).model_fields.items():
        value, text = getattr(section, inner), info.description or ""
        if inner in chosen:
            members.append(Option(inner, HIDDEN, "", (), value))
        elif isinstance(value, BaseModel):
            members.append(describe(value, inner))
        else:
            if isinstance(section, JobConfig) and inner == "config":
                text = f"{text} Presets: {', '.join(preset_names(type(section))) or 'none'}."
            members.append(Option(inner, *_type_of(info, text), value))
    return Group(name, type(section).__name__, type(section).__doc__ or "", tuple(members))


def describe_presets(schema: "type[JobConfig]") -> dict[str, Group]:
    """Return the options of every preset whose options have the class `schema`."""
    return {name: describe(load_preset(name, schema)) for name in preset_names(schema)}


def names_elsewhere(schema: "type[JobConfig]") -> dict[str, str]:
    """Map the names of options in other training programs to their names in this project."""
    from latentvae.option_marks import Elsewhere, marks

    found = marks(schema, Elsewhere).items()
    return {other: name for name, mark in found for other in mark.names.split()}


def flags_class(group: Group) -> type:
    """Return a dataclass for tyro whose fields are the options of a group.

    The help lists the choices of an option, but tyro does not check a value against the choices.
    pydantic checks each value later, and its error message names the wrong value.
    """
    fields: list[Any] = []
    for member in group.members:
        if isinstance(member, Group):
            nested = flags_class(member)
            fields.append((member.name, nested, dataclasses.field(default_factory=nested)))
        elif member.kind == HIDDEN:
            hidden = tyro.conf.Suppress[str]
            fields.append((member.name, hidden, dataclasses.field(default=member.value)))
        else:
            fields.append((member.name, _flag(member), dataclasses.field(default=member.value)))
    flags = dataclasses.make_dataclass(group.title, fields)
    flags.__doc__ = group.doc
    return flags


def read_list() -> OptionList | None:
    """Return the content of options.json, or None if the file is missing or out of date."""
    try:
        content = json.loads(FILE.read_text(encoding="utf-8"))
        fresh = content["sources"] == _hashes(content["sources"])
    except (OSError, ValueError, KeyError):
        return None
    if not fresh or content["presets_sha256"] != _presets():
        return None
    rows = content["options"]
    presets = {name: _group(row, rows) for name, row in content["presets"].items()}
    return OptionList(presets, content["elsewhere"])


def write_list(schema: "type[JobConfig]") -> None:
    """Write options.json. An option that several presets share is written only once."""
    rows: dict[str, int] = {}

    def plain(member: Option | Group) -> Any:
        if isinstance(member, Group):
            return [*member[:3], [plain(inner) for inner in member.members]]
        row = json.dumps(member[:4])
        return [rows.setdefault(row, len(rows)), member.value]

    presets = {name: plain(group) for name, group in describe_presets(schema).items()}
    content = {
        "sources": _hashes(sorted(_source_files(schema))),
        "presets_sha256": _presets(),
        "elsewhere": names_elsewhere(schema),
        "options": [json.loads(row) for row in rows],
        "presets": presets,
    }
    FILE.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")


def _group(row: list[Any], rows: list[list[Any]]) -> Group:
    members: list[Option | Group] = []
    for inner in row[3]:
        if len(inner) == 4:
            members.append(_group(inner, rows))
        else:
            name, kind, text, choices = rows[inner[0]]
            members.append(Option(name, kind, text, tuple(choices), _tuples(inner[1])))
    return Group(row[0], row[1], row[2], tuple(members))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _source_files(schema: "type[JobConfig]") -> set[str]:
    """Return the files of the package that define the options of the class `schema`."""
    from pydantic import BaseModel

    files = {Path(__file__).resolve()}

    def visit(section: BaseModel) -> None:
        for cls in type(section).__mro__:
            if cls.__module__.startswith("latentvae."):
                files.add(Path(str(sys.modules[cls.__module__].__file__)).resolve())
        for name in type(section).model_fields:
            if isinstance(value := getattr(section, name), BaseModel):
                visit(value)

    for name in preset_names(schema):
        visit(load_preset(name, schema))
    return {path.relative_to(_PACKAGE).as_posix() for path in files}


def _hashes(files: Iterable[str]) -> dict[str, str]:
    return {name: hashlib.sha256((_PACKAGE / name).read_bytes()).hexdigest() for name in files}


def _presets() -> str:
    digest = hashlib.sha256()
    for path in sorted(presets_folder().glob("*.yaml")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _flag(option: Option) -> Any:
    kind = KINDS.get(option.kind, str)
    if not option.choices:
        return Annotated[kind, tyro.conf.arg(help=option.text)]
    listed = "|".join(option.choices)
    metavar = f"[{listed} ...]" if option.kind == "choices" else listed
    return Annotated[kind, tyro.conf.arg(help=option.text, metavar=metavar)]


def _type_of(info: "FieldInfo", text: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the type of an option (a key of `KINDS`, if listed), its help and its choices."""
    choices = tuple(_choices(info.annotation))
    if choices:
        many = get_origin(info.annotation) is tuple
        return "choices" if many else "choice", text, choices
    return _written(info.annotation), text, ()


def _written(annotation: Any) -> str:
    """Return a type annotation as text, without the allowed ranges of values."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _written(parts[0])
    if annotation is Ellipsis:
        return "..."
    if annotation is type(None):
        return "None"
    if origin is tuple:
        return f"tuple[{', '.join(map(_written, parts))}]"
    if parts:
        return " | ".join(map(_written, parts))
    return annotation.__name__


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


if __name__ == "__main__":
    from latentvae.tasks.autoencoder.config import TrainConfig

    write_list(TrainConfig)
