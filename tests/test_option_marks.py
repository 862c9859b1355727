"""Facts about options sit on their fields and are read back from there."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from latentvae.option_marks import (
    ChosenByPreset,
    DecidesTheWatch,
    Elsewhere,
    MayChange,
    Private,
    Section,
    marked,
    marks,
    tag_in,
)
from latentvae.tasks.autoencoder.config import TrainConfig


class Base(Section):
    kind: Annotated[Any, ChosenByPreset()]
    width: Annotated[int, Elsewhere("dim embed_dim")] = 4


class Small(Base):
    kind: Literal["small"] = "small"
    width: int = 2


class Large(Base):
    kind: Literal["large"] = "large"
    depth: Annotated[int, Field(ge=1), Elsewhere("layers")] = Field(default=3, description="Depth.")


AnyKind = Annotated[
    Annotated[Small, Tag("small")] | Annotated[Large, Tag("large")],
    Discriminator(tag_in("kind", "small")),
]


class Whole(Section):
    folder: Annotated[str | None, MayChange(), Private()] = Field(default=None)
    plain: int = 1
    kind_of: AnyKind = Small()


def test_marks_are_found_in_sections_and_all_members_of_unions() -> None:
    assert marked(Whole, Private) == ["folder"]
    elsewhere = {name: mark.names for name, mark in marks(Whole, Elsewhere).items()}
    assert elsewhere == {"width": "dim embed_dim", "depth": "layers"}


def test_a_mark_of_a_base_class_holds_for_the_overridden_field() -> None:
    assert marked(Small, ChosenByPreset) == ["kind"]
    assert marked(Small, Elsewhere) == ["width"]


def test_marks_change_nothing_about_values_and_ranges() -> None:
    assert Whole.model_validate({"kind_of": {"kind": "large", "depth": 5}}).kind_of == Large(
        depth=5
    )
    assert Large.model_json_schema()["properties"]["depth"]["minimum"] == 1


def test_what_a_resumed_run_may_change_and_a_card_leaves_out() -> None:
    may_change = set(marked(TrainConfig, MayChange))
    assert {"output_dir", "max_train_steps", "config", "disc_watch", "winograd"} <= may_change
    assert not may_change & {"seed", "learning_rate", "train_batch_size", "num_codes", "resolution"}
    assert set(marked(TrainConfig, DecidesTheWatch)) < may_change
    assert set(marked(TrainConfig, Private)) < may_change
