"""The mechanism that the benchmarks share: rounds, ratios and the JSON."""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def timing() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))  # where processes that it starts find it too
    yield importlib.import_module("timing")
    sys.path.remove(str(BENCHMARKS))


def test_ratios_are_taken_within_each_round(timing: ModuleType) -> None:
    row = timing.row("decode, fp32", "s", [1.0, 2.0, 4.0], [3.0, 4.0, 6.0], equal_within=1e-6)
    assert (row.ours, row.reference) == (2.0, 4.0)
    assert (row.ratio_median, row.ratio_min, row.ratio_max) == (2.0, 1.5, 3.0)
    assert (row.runs, row.equal_within) == (3, 1e-6)
    with pytest.raises(ValueError, match="zip"):
        timing.row("decode", "s", [1.0], [1.0, 2.0], equal_within=None)


def test_calls_take_turns_and_the_first_changes(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    clock = iter(float(i * i) for i in range(100))  # runs of 1, 5, 9, ... seconds
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = {name: lambda name=name: called.append(name) for name in ("ours", "theirs")}
    seconds = timing.alternate(calls, runs=2, warmup=1, per=2.0)
    assert called == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert seconds == {"ours": [13 / 2, 17 / 2], "theirs": [9 / 2, 21 / 2]}


def sleeper(seconds: float) -> Callable[[], object]:
    """Sleeps, and longer each time, as what keeps its state does."""
    slept: list[float] = []

    def sleep() -> None:
        slept.append(seconds)
        time.sleep(sum(slept))

    return sleep


def failing() -> Callable[[], object]:
    return lambda: 1 / 0


@pytest.mark.slow
def test_a_process_of_its_own_tells_its_seconds(timing: ModuleType) -> None:
    with timing.own_process(sleeper, 0.2) as call:
        first, second = call(), call()
    assert 0.2 <= first and 0.4 <= second
    with timing.own_process(failing) as call, pytest.raises(RuntimeError, match="has ended"):
        call()


def test_each_row_is_printed_when_it_is_measured(
    timing: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []

    def measured() -> Iterator[object]:
        for name in ("encode", "decode"):
            printed.append(capsys.readouterr().out)
            yield timing.row(name, "s", [0.5], [1.0], equal_within=None)

    rows = timing.collected(measured())
    assert [row.name for row in rows] == ["encode", "decode"]
    line = "encode: ours 0.5 s, reference 1 s, ratio 2.00 (2.00 to 2.00)\n"
    assert printed == ["", line]


def test_json_holds_the_machine_and_the_rows(
    timing: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = timing.row("update, bf16", "s", [0.5], [1.0], equal_within=None)
    timing.finish([row], title="update", json_file=tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == [
        {
            "name": "update, bf16",
            "unit": "s",
            "ours": 0.5,
            "reference": 1.0,
            "ratio_median": 2.0,
            "ratio_min": 2.0,
            "ratio_max": 2.0,
            "runs": 1,
            "equal_within": None,
        }
    ]
    assert {"processor", "cores", "threads", "torch"} <= written["machine"].keys()
    assert "2.00 (2.00 to 2.00)" in capsys.readouterr().out
