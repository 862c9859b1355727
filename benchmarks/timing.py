"""Runs in turns, ratios with their spread, and the table and JSON that the benchmarks share.

A benchmark never asserts a time: what else runs on a machine changes seconds, but hits both sides
of a pair that run right after one another. So a ratio is taken within each round, and the median
of the rounds is reported with the least and the greatest.

    seconds = alternate({"ours": ours, "diffusers": plain}, runs=5)
    rows = [row("decode, fp32", "s", seconds["ours"], seconds["diffusers"], equal_within=2e-6)]
    finish(rows, title="decode", json_file=options.json)
"""

import gc
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison; all numbers are costs (seconds, bytes), of which less is better.

    Attributes:
        name: what was measured, with `fp32` or `bf16` where it depends on it.
        unit: of `ours` and `reference`, the medians.
        ratio_median, ratio_min, ratio_max: of reference / ours within each round; above 1 where
            ours is better.
        runs: rounds.
        equal_within: the largest difference of the two results, as the benchmark says; None where
            they are not the same thing.
    """

    name: str
    unit: str
    ours: float
    reference: float
    ratio_median: float
    ratio_min: float
    ratio_max: float
    runs: int
    equal_within: float | None


def row(
    name: str,
    unit: str,
    ours: Sequence[float],
    reference: Sequence[float],
    *,
    equal_within: float | None,
) -> Row:
    """A row of two series whose i-th values were measured in one round."""
    ratios = [b / a for a, b in zip(ours, reference, strict=True)]
    return Row(
        name=name,
        unit=unit,
        ours=median(ours),
        reference=median(reference),
        ratio_median=median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        runs=len(ratios),
        equal_within=equal_within,
    )


def alternate(
    calls: Mapping[str, Callable[[], object]],
    *,
    runs: int,
    warmup: int = 1,
    per: float = 1.0,
    clock: Callable[[Any], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round, all calls once per round.

    Args:
        runs: timed rounds.
        warmup: rounds before, untimed.
        per: seconds are divided by it, such as the images of a call.
        clock: seconds of a call, by default `timed`; calls of `own_process` tell theirs.
    """
    clock = clock or timed
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + runs):
        # Every other round backwards, so that a drift of the machine's speed favours none.
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            elapsed = clock(calls[name])
            if i >= warmup:
                seconds[name].append(elapsed / per)
    return seconds


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, until the device has done what it was given."""
    gc.collect()  # not in the middle of one side's run
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


@contextmanager
def own_process(build: Callable[..., Callable[..., object]], *args: Any) -> Iterator[Any]:
    """What `build(*args)` returns, as a call in a process of its own that returns its seconds: for
    sides that set what holds for a whole process, such as its allocator. Arguments go with it.

        with own_process(build, 64) as ours, own_process(build_plain, 64) as plain:
            alternate({"ours": ours, "stock": plain}, runs=5, clock=lambda call: call())

    Args:
        build: a function of a module, with arguments that can be pickled.
    """
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, build, args), daemon=True)
    process.start()
    there.close()

    def call(*given: Any) -> float:
        try:
            here.send(given)
            return here.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            process.join(1)
            name = f"{build.__name__}{args}"
            raise RuntimeError(f"{name} has ended with {process.exitcode}, see above") from error

    try:
        yield call
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, build: Callable[..., Callable[..., object]], args: Any) -> None:
    call = build(*args)
    while True:
        try:
            given = connection.recv()
        except EOFError:
            return
        connection.send(timed(partial(call, *given)))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    described = {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def _processor() -> str:
    """Its name, which only Linux's own list of processors tells on Linux."""
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def finish(rows: Sequence[Row], *, title: str, json_file: Path | None) -> None:
    """Print the table, and write {"machine": ..., "rows": [...]} where a file is given."""
    console = Console()
    if not console.is_terminal:  # a file may be as wide as the table
        console = Console(width=120)
    console.print(table(rows, title=title))
    if json_file is not None:
        result = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row], *, title: str) -> Table:
    shown = Table(title=f"{title}; ratio = reference / ours")
    shown.add_column(no_wrap=True)
    for column in ("ours", "reference", "ratio (least to greatest)", "runs", "equal within"):
        shown.add_column(column)
    for row in rows:
        equal = "" if row.equal_within is None else f"{row.equal_within:.1e}"
        spread = f"{row.ratio_median:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f})"
        values = [f"{value:.3g} {row.unit}" for value in (row.ours, row.reference)]
        shown.add_row(row.name, *values, spread, str(row.runs), equal)
    return shown
