"""Good folders, made once and copied; and the file that a payload would write."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.damage import RAN
from tests.faults.places import PLACES


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "the_payload_ran"
    monkeypatch.setenv(RAN, str(path))
    return path


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[object, Path] = {}

    def folder_of(name: str) -> Path:
        make = PLACES[name].make
        key = (make, PLACES[name].file) if make.__name__ == "<lambda>" else make
        if key not in made:
            made[key] = tmp_path_factory.mktemp("place")
            make(made[key])
        return made[key]

    return folder_of


@pytest.fixture
def place_folder(_made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a place's good folder, made anew each time."""

    def copied(name: str) -> Path:
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(_made(name), folder)

    return copied
