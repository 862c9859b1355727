"""Two ranks with two workers each on files of every bad kind: each named once, and no one hangs."""

import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from latentvae.data import ImageFolder
from latentvae.engine.log import read_rows
from latentvae.errors import printable
from tests.data.conftest import tar
from tests.faults.hostile import bad_files, fill, odd_entries, odd_files
from tests.launch import launch, train_flags

LIMIT = 150  # seconds, of which most are the launcher's and the imports'
OPTIONS: dict[str, Any] = {
    "dataloader_num_workers": 2,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "disc_scale": 0.0,
    "max_train_steps": 24,
    "log_steps": 2,
    "checkpointing_steps": 24,
    "validation_steps": 24,
    "validation_data_dir": "samples",
}


@pytest.fixture(params=["folder", "tar"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, set[str]]:
    """The images, and the names of those that cannot be read."""
    bad = {name: content for name, (content, _) in bad_files().items()}
    if request.param == "folder":
        folder = fill(tmp_path / "folder", bad | odd_files())
        return folder, {*bad, *odd_entries(folder)}
    names = sorted(bad | odd_files())
    for shard in range(2):
        files = bad | odd_files()
        tar(tmp_path / "tar" / f"{shard}.tar", {name: files[name] for name in names[shard::2]})
    return tmp_path / "tar", set(bad)


def run(folder: Path, **changes: Any) -> tuple[int, str]:
    """Exit code and output; leaves no process behind."""
    process, start = launch(train_flags(folder, **OPTIONS | changes), processes=2), time.monotonic()
    try:
        text, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
        pytest.fail(f"hung: {process.communicate()[0]}")
    print(f"{time.monotonic() - start:.1f} s")
    return process.returncode, text


@pytest.mark.slow
def test_each_bad_file_is_named_once_over_all_ranks(
    data: tuple[Path, set[str]], tmp_path: Path
) -> None:
    code, text = run(tmp_path / "run", train_data_dir=str(data[0]), max_bad_share=1.0)
    assert code == 0, text
    named = re.findall(r"^cannot read (.*?) \(.*\); another image takes its place$", text, re.M)
    assert sorted(named) == sorted(map(printable, data[1]))
    assert "Traceback" not in text and (tmp_path / "run" / "export" / "config.json").is_file()
    rows = [row for row in read_rows(tmp_path / "run" / "log.jsonl") if "loss/rec" in row]
    assert rows[-1]["data/bad_images"] == len(data[1])


@pytest.mark.slow
def test_too_many_bad_files_stop_all_ranks_with_one_sentence(
    data: tuple[Path, set[str]], tmp_path: Path
) -> None:
    code, text = run(tmp_path / "run", train_data_dir=str(data[0]), max_bad_share=0.05)
    assert code != 0
    errors = re.findall(r"^error: .*$", text, re.M)
    assert len(errors) == 1 and "cannot be read, more than the 5.0% allowed" in errors[0]
    codes = re.findall(r"exitcode *: *(-?\d+) ", text)
    # The launcher ends, by SIGTERM, whoever is still there when the first process has gone.
    assert len(codes) == 2 and "2" in codes and set(codes) <= {"2", "-15"}, text
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.slow
def test_a_folder_of_bad_files_alone_ends_with_one_sentence_a_process(tmp_path: Path) -> None:
    bad = {name: content for name, (content, _) in bad_files().items()}
    folder = fill(tmp_path / "folder", bad)
    assert len(ImageFolder(folder)) == len(bad)
    code, text = run(tmp_path / "run", train_data_dir=str(folder), max_bad_share=1.0)
    errors = re.findall(r"^error: process \d: cannot read image .*19 others.*$", text, re.M)
    assert code != 0 and errors, text
