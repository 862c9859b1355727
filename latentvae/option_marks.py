"""The building blocks of options: sections, ranges and marks.

A mark is a fact about one option. The annotation of the option's field contains the mark:

    cache_dir: Annotated[str | None, MayChange(), Private()] = Field(default=None, ...)

`marked` and `marks` also read the marks of nested sections and of all members of a union.
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
    """Base class of marks. A mark is a fact about an option."""


@dataclass(frozen=True)
class MayChange(Mark):
    """The option may have another value on resume. All other options change the result."""


@dataclass(frozen=True)
class DecidesTheWatch(Mark):
    """The option decides when `disc_watch disable` switches the discriminator off.

    With `disc_watch disable`, this option must not change on resume.
    """


@dataclass(frozen=True)
class Private(Mark):
    """The option is a path or an account, not a setting of training. Model cards leave it out."""


@dataclass(frozen=True)
class ChosenByPreset(Mark):
    """The option decides which other options exist. Only the config sets it, not a flag."""


@dataclass(frozen=True)
class OfTheRun(Mark):
    """The training reads the option. The object built from the section does not take the option."""


@dataclass(frozen=True)
class Elsewhere(Mark):
    """Names of the option in other training programs, separated by spaces."""

    names: str


@dataclass(frozen=True)
class ShareOfRun(Mark):
    """A value below 1 is a share of max_train_steps. It is converted to a number of updates."""


def _whole(value: float) -> float:
    if value >= 1 and value % 1:
        raise PydanticCustomError(
            "updates",
            "should be a whole number of updates, or a share of the training below 1. The nearest "
            "whole number is {near}.",
            {"near": round(value)},
        )
    return value if 0 < value < 1 else int(value)


# The validation of options replaces each share by a number of updates. So the type for type
# checkers is int.
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
    """Return the names of the options that have a mark of that kind, in order. See `marks`."""
    return list(marks(section, kind))


def marks(section: type[BaseModel], kind: type[M]) -> dict[str, M]:
    """Return the marks of one kind, by the names of their options.

    Options of nested sections and of all members of a union of sections are included. A mark in a
    base class also holds for a subclass's field of the same name.
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
    """Yield the section classes in a field's type: one class, or all members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)


def _own_marks(section: type[BaseModel], name: str) -> Iterator[Any]:
    for base in section.__mro__:
        if issubclass(base, BaseModel) and name in base.model_fields:
            yield from base.model_fields[name].metadata


def tag_in(name: str, default: str) -> Callable[[Any], str]:
    """Return a function that chooses a class of options by the value of the option `name`."""

    def tag(values: Any) -> str:
        if isinstance(values, dict):
            return str(values.get(name, default))
        return str(getattr(values, name, default))  # pydantic reports values that are no section

    return tag
