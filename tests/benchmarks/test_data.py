"""The loader's benchmark: a short run, whose pictures are those of the plain folder."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_rows_name_what_was_compared_and_are_of_the_same_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # where it finds timing.py, as when it is run
    spec = importlib.util.spec_from_file_location("benchmark_data", BENCHMARKS / "data.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    file = tmp_path / "data.json"
    command = ["data.py", "--images", "16", "--runs", "1", "--workers", "0", "--json", str(file)]
    monkeypatch.setattr("sys.argv", command)
    script.main()
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    for form in ("folder", "tar shards"):
        for kernel in ("lanczos", "bilinear"):
            row = rows[f"{form}, {kernel}, one core"]
            assert row["runs"] == 1 and row["ours"] > 0
            assert 0 < row["equal_within"] < 1.01 / 127.5  # one level of 255
    assert rows["folder, lanczos, 4 crops of each, one core"]["equal_within"] is None
