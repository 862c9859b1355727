"""Define the types from which option classes are built: sections, ranges and marks.

A mark is an object that states a fact about one option. The mark is part of the type annotation of
the option:

    cache_dir: Annotated[str | None, MayChange(), Private()] = Field(default=None, ...)

`marked` and `marks` find the marks of all options in a section, which is a class of options. Nested
sections and union types are searched too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
)
from pydantic_core import PydanticCustomError

from latentvae.errors import check_no_password

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A group of options. Unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _without_password(cls, value: Any) -> Any:
        if isinstance(value, str):
            check_no_password(value)
        return value


@dataclass(frozen=True)
class Mark:
    """Base class of marks. A mark states a fact about one option."""


@dataclass(frozen=True)
class MayChange(Mark):
    """The option may have another value when a run is resumed.

    Options without the mark `MayChange` must keep their values.
    """


@dataclass(frozen=True)
class DecidesTheWatch(Mark):
    """The option affects when the setting `disc_watch disable` switches the discriminator off.

    With this setting, the option must therefore have the same value when a run is resumed.
    """


@dataclass(frozen=True)
class Private(Mark):
    """The option concerns files or accounts, not the training. Model cards do not show it."""


@dataclass(frozen=True)
class ChosenByPreset(Mark):
    """The option decides which other options exist.

    The option has no command-line flag, so only a config (YAML file or preset) can set it.
    """


@dataclass(frozen=True)
class OfTheRun(Mark):
    """The option belongs to the training run, so networks and quantisers are built without it."""


@dataclass(frozen=True)
class Elsewhere(Mark):
    """Names that other training programs use for the option, separated by spaces."""

    names: str


@dataclass(frozen=True)
class ShareOfRun(Mark):
    """A value of the option between 0 and 1 is a fraction of max_train_steps.

    `JobConfig` replaces such a fraction by a number of updates (optimizer steps).
    """


def _whole(value: float) -> float:
    if value >= 1 and value % 1:
        raise PydanticCustomError(
            "updates",
            "should be a whole number of updates (optimizer steps), or a fraction of "
            "max_train_steps below 1. The nearest whole number is {near}.",
            {"near": round(value)},
        )
    return value if 0 < value < 1 else int(value)


# `JobConfig` replaces each fraction by a number of updates, so other code sees only whole numbers.
if TYPE_CHECKING:
    UpdatesOrShare = int
else:
    UpdatesOrShare = Annotated[
        float,
        Field(ge=0.0, allow_inf_nan=False),
        AfterValidator(_whole),
        PlainSerializer(lambda value: value),  # config.yaml has 1000, not 1000.0
        ShareOfRun(),
    ]


M = TypeVar("M", bound=Mark)


def marked(section: type[BaseModel], kind: type[Mark]) -> list[str]:
    """Return the names of the options that have a mark of class `kind`, in field order."""
    return list(marks(section, kind))


def marks(section: type[BaseModel], kind: type[M]) -> dict[str, M]:
    """Return a dict from the name of an option to its mark of class `kind`.

    Options of nested sections are included, also if a section is one member of a union type. A mark
    in a base class also holds for the field of the same name in a subclass.
    """
    found: dict[str, M] = {}
    for name, field in section.model_fields.items():
        for mark in _own_marks(section, name):
            if isinstance(mark, kind):
                found[name] = mark
        for nested in sections_in(field.annotation):
            found |= marks(nested, kind)
    return found


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the option classes in the type of a field. A union type may contain several classes."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)


def _own_marks(section: type[BaseModel], name: str) -> Iterator[Any]:
    for base in section.__mro__:
        if issubclass(base, BaseModel) and name in base.model_fields:
            yield from base.model_fields[name].metadata


def tag_in(name: str, default: str) -> Callable[[Any], str]:
    """Return a function that reads the option `name` from the values of a section.

    From the option's value, pydantic chooses which class of a union type parses the section. If the
    section does not set the option, the function returns `default`.
    """

    def tag(values: Any) -> str:
        if isinstance(values, dict):
            return str(values.get(name, default))
        return str(getattr(values, name, default))  # if `values` is no section, pydantic reports it

    return tag
