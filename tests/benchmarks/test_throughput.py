"""The benchmark of encode and decode: its rows, what they are compared with, and its errors."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from latentvae.compute import optimization
from tests.benchmarks.processes import this_process

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--channels", "32", "32", "--sizes", "64", "--runs", "1", "--threads", "1"]
TINY += ["--updates", "2"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))  # where it and its processes find the modules beside it
    module = importlib.import_module("throughput")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCHMARKS))


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(script, "own_process", this_process)
    monkeypatch.setattr(sys, "argv", ["throughput.py", *TINY, *options])
    script.main()


@pytest.mark.slow
def test_rows_and_their_equality(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ways = ["exact", "cast", "tiled", "strips"]
    file = tmp_path / "rows.json"
    run(script, monkeypatch, "--ways", *ways, "--json", str(file), "--no-memory")
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    precisions = {"exact": "fp32", "cast": "bf16", "tiled": "fp32", "strips": "fp32"}
    assert list(rows) == [
        f"{call}, 64 px, {way}, {precisions[way]}"
        for call in ("encode", "decode", "round trip")
        for way in ways
    ]
    for name, row in rows.items():
        assert row["unit"] == "s/image" and row["runs"] == 1
        assert row["ratio_median"] == pytest.approx(row["reference"] / row["ours"])
        if "cast" in name:
            assert 1e-5 < row["equal_within"] < 0.2
        else:
            assert row["equal_within"] <= 1e-4


def test_memory_is_measured_in_other_processes(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, int]] = []

    def stand_in(name: str, side: int, _options: object) -> dict[str, float]:
        asked.append((name, side))
        return {"stock": {"encode": 60.0, "decode": 80.0}, "exact": {"encode": 30, "decode": 20}}[
            name
        ]

    monkeypatch.setattr(script, "peak_of", stand_in)
    file = tmp_path / "rows.json"
    run(script, monkeypatch, "--ways", "exact", "--json", str(file))
    rows = [row for row in json.loads(file.read_text())["rows"] if row["unit"] == "MiB"]
    assert [(row["name"], row["ratio_median"]) for row in rows] == [
        ("peak memory, encode, 64 px, exact, fp32", 2.0),
        ("peak memory, decode, 64 px, exact, fp32", 4.0),
    ]
    assert asked == [("stock", 64), ("exact", 64)]


@pytest.mark.slow
def test_peak_of_a_call(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = script.trained((32, 32, 32, 32), updates=0, images=script._photos(), device="cpu")
    net.save_pretrained(tmp_path)
    options = script.Options(model=str(tmp_path), threads=1)
    kept = script.peak_of("exact", 512, options)["decode"]
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # as glibc does by default
    found = {name: script.peak_of(name, 512, options)["decode"] for name in ("stock", "exact")}
    one_map = 32 * 512 * 512 * 4 / 2**20
    assert 2 * one_map < found["stock"] < 12 * one_map
    tiles = 4 * one_map  # of NNPACK: 64 numbers for 36, of what goes in and out
    assert 2 * one_map < found["exact"] <= found["stock"] + tiles + 2 * one_map
    assert kept <= found["exact"] + 8 * one_map  # holes that do not fit


@pytest.mark.slow
def test_ways_in_processes_of_their_own(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    given = [*TINY, "--ways", "exact", "--json", str(file), "--no-memory"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *given])
    script.main()
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 3 and all(row["ours"] > 0 and row["reference"] > 0 for row in rows)


def test_what_a_way_fell_back_to_is_in_its_rows(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(optimization, "multiplies_bfloat16", lambda device: False)
    file = tmp_path / "rows.json"
    run(script, monkeypatch, "--ways", "fast", "--json", str(file), "--no-memory")
    names = [row["name"] for row in json.loads(file.read_text())["rows"]]
    assert names[0] == "encode, 64 px, fast (fell back to exact), fp32"
    said = "fast: falls back to exact (this machine does not multiply in bfloat16)"
    assert said in capsys.readouterr().out


def test_the_default_network_is_trained(script: ModuleType) -> None:
    photos = script._photos()
    losses = []
    for updates in (0, 8):
        net = script.trained((32, 32), updates=updates, images=photos, device="cpu")
        losses.append(
            (script.Way(net, "fp32").decode(net.encode(photos).latent_dist.mode()) - photos)
            .abs()
            .mean()
        )
    assert losses[1] < 0.9 * losses[0]


def test_a_wrong_way_is_told(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(script, monkeypatch, "--ways", "exakt")
    assert exit_.value.code == 2
    assert "`ways` must be one of" in (said := capsys.readouterr().err) and "'exact'" in said
