"""Two ranks with two workers each on files of every bad kind: each named once, and no one hangs."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from latentvae.cli.train import run_training
from latentvae.data import ImageFolder
from latentvae.engine.log import read_rows
from latentvae.errors import printable
from tests.data.conftest import tar
from tests.faults.hostile import bad_files, fill, odd_entries, odd_files
from tests.forks import ended_ranks, ranks
from tests.launch import launch, train_flags
from tests.tasks.autoencoder.small import as_flags, small_config

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


def flags(folder: Path, **changes: Any) -> list[str]:
    return as_flags(small_config(folder, **OPTIONS | changes))


@pytest.mark.slow
def test_each_bad_file_is_named_once_over_all_ranks(
    data: tuple[Path, set[str]], tmp_path: Path
) -> None:
    arguments = flags(tmp_path / "run", train_data_dir=str(data[0]), max_bad_share=1.0)
    text = ranks(lambda: run_training(arguments, description=""), output=tmp_path / "output.txt")
    named = re.findall(
        r"^cannot read (.*?) \(.*\)\. Another image replaces this file\.$", text, re.M
    )
    assert sorted(named) == sorted(map(printable, data[1]))
    assert "Traceback" not in text and (tmp_path / "run" / "export" / "config.json").is_file()
    rows = [row for row in read_rows(tmp_path / "run" / "log.jsonl") if "loss/rec" in row]
    assert rows[-1]["data/bad_images"] == len(data[1])


@pytest.mark.slow
def test_too_many_bad_files_stop_all_ranks_with_one_sentence(tmp_path: Path) -> None:
    """Under the launcher, which ends, by SIGTERM, whoever is still there when one has gone."""
    bad = {name: content for name, (content, _) in bad_files().items()}
    folder = fill(tmp_path / "folder", bad | odd_files())
    options = OPTIONS | {"train_data_dir": str(folder), "max_bad_share": 0.05}
    process = launch(train_flags(tmp_path / "run", **options), processes=2)
    try:
        text, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
        pytest.fail(f"hung: {process.communicate()[0]}")
    assert process.returncode != 0
    errors = re.findall(r"^error: .*$", text, re.M)
    assert len(errors) == 1 and "cannot be read. At most 5.0% of the images may" in errors[0]
    codes = re.findall(r"exitcode *: *(-?\d+) ", text)
    assert len(codes) == 2 and "2" in codes and set(codes) <= {"2", "-15"}, text
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.slow
def test_a_folder_of_bad_files_alone_ends_with_one_sentence_a_process(tmp_path: Path) -> None:
    bad = {name: content for name, (content, _) in bad_files().items()}
    folder = fill(tmp_path / "folder", bad)
    assert len(ImageFolder(folder)) == len(bad)
    arguments = flags(tmp_path / "run", train_data_dir=str(folder), max_bad_share=1.0)
    codes, text = ended_ranks(
        lambda: run_training(arguments, description=""), output=tmp_path / "output.txt"
    )
    errors = re.findall(r"^error: process \d: cannot read image .*19 other images.*$", text, re.M)
    assert 0 not in codes and errors, text
