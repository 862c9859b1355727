"""What every group of options is made of."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from latentvae.errors import check_no_password

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A group of options; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _without_password(cls, value: Any) -> Any:
        if isinstance(value, str):
            check_no_password(value)
        return value


def tag_in(name: str, default: str) -> Callable[[Any], str]:
    """How a preset chooses between classes of options: by the value of `name`."""

    def tag(values: Any) -> str:
        if isinstance(values, dict):
            return str(values.get(name, default))
        return str(getattr(values, name, default))  # what is no section is told as such

    return tag
