"""The run's folder becomes read-only, or its disk goes away, in the middle of a run."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentvae.cli import train as command_line
from latentvae.engine.checkpoint_files import newest_usable
from latentvae.tasks.autoencoder import train
from tests.tasks.autoencoder.small import as_flags, small_config

pytestmark = pytest.mark.usefixtures("own_accelerate")
_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}
_judge: list[Callable[[str], bool]] = []  # a hook of Python's stays for good; this is its switch


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _judge or not (event in _WRITES or event == "open"):
        return
    flags = arguments[2] if event == "open" else os.O_WRONLY
    if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if isinstance(path := arguments[0], str | os.PathLike) and _judge[0](os.fspath(path)):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """From the first write of what is named so, after the first checkpoint, all writes to the run
    fail; root, to whom modes say nothing, meets it too."""

    def arm(name: str) -> None:
        state = {"on": False}

        def fails(path: str) -> bool:
            if not path.startswith(str(tmp_path / "run")):
                return False
            if not state["on"] and name in path:
                state["on"] = (tmp_path / "run" / "checkpoint-2").is_dir()
            return state["on"]

        _judge[:] = [fails]

    sys.addaudithook(_hook)
    yield arm
    _judge.clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "samples", "checkpoint-4", "log.jsonl", "export"])
def test_one_sentence_and_the_last_checkpoint_stays(
    name: str,
    read_only: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small_config(tmp_path / "run", report_to="tensorboard")
    read_only(name)
    with pytest.raises(SystemExit) as ended:
        command_line.run_training(as_flags(config), description="")
    _judge.clear()
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 1 and "Traceback" not in error
    assert "cannot be read or written any more (EROFS)" in line and name in line
    found, faults = newest_usable(tmp_path / "run")
    last = "checkpoint-6" if name == "export" else "checkpoint-2"
    assert found is not None and found.name == last and not faults
    assert train(config).is_dir()
