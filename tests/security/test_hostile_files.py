"""In every place where a file is read: a clear sentence that names it, no code run, no wait."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentvae.errors import UserError
from tests.security import damage
from tests.security.places import PLACES, Place, values_of

pytestmark = [pytest.mark.usefixtures("own_caches"), pytest.mark.timeout(60)]
Folders = Callable[[str], Path]


def refusal(place: Place, folder: Path) -> str | None:
    """The one sentence of the refusal; None if it is read. Anything else raises."""
    try:
        place.read(folder)
    except UserError as error:
        text = str(error)
        assert text.isprintable() and text.encode() and 0 < len(text) < 1500, text
        return text
    return None


def names(text: str, place: Place, folder: Path) -> bool:
    """Whether a sentence says which file or folder it is about."""
    own = Path(place.file)
    return any(part in text for part in (own.name, str(folder)))


@pytest.mark.parametrize("name", [name for name, place in PLACES.items() if place.made_good])
def test_the_good_file_is_read(name: str, place_folder: Folders) -> None:
    assert refusal(PLACES[name], place_folder(name)) is None


@pytest.mark.parametrize("name", PLACES)
def test_bytes_of_every_wrong_kind(name: str, place_folder: Folders, ran: Path) -> None:
    place, texts = PLACES[name], {"": {}, "json": damage.JSON, "yaml": damage.YAML}
    for kind, change in (damage.BYTES | {
        kind: lambda _, content=content: content for kind, content in texts[PLACES[name].text].items()
    }).items():
        folder = place_folder(name)
        file = folder / place.file
        file.write_bytes(change(file.read_bytes()))
        text = refusal(place, folder)
        print(name, "|", kind, "|", text)
        assert not ran.exists(), kind
