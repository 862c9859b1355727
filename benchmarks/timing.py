"""Measure the times of functions that are called in turn. Several benchmarks use this module.

Absolute times depend on the load of the machine. But the load slows two calls about equally if they
run one after the other. So calls are made in rounds, and each round gives the ratio of the times of
two calls. Benchmarks report the median, minimum and maximum of the ratios of all rounds. No
benchmark checks that a time is below a limit.

    seconds = alternate({"ours": ours, "diffusers": plain}, runs=5)
    rows = [row("decode, fp32", "s", seconds["ours"], seconds["diffusers"], equal_within=2e-6)]
    finish(collected(rows), title="decode", json_file=options.json)
"""

import gc
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """A cost (time or memory) of our code and of a reference. A lower cost is better.

    Attributes:
        name: what was measured, with `fp32` or `bf16` if the precision matters.
        unit: unit of `ours` and `reference`.
        ours, reference: the costs, as medians over the rounds.
        ratio_median, ratio_min, ratio_max: median, minimum and maximum over the rounds of the ratio
            reference / ours. A ratio above 1 means that ours is better.
        runs: number of rounds.
        equal_within: the largest difference between our output and the reference's output, as the
            benchmark defines this difference. None if the outputs are not compared.
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
    """Return the comparison of two series of costs (times or memory) as a `Row`.

    The i-th values of both series come from the same round of alternating calls.
    """
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
    """Return the seconds of each call in each round. In a round, every call is made once.

    Args:
        calls: functions by name.
        runs: number of timed rounds.
        warmup: number of untimed rounds before the timed rounds.
        per: number that the seconds are divided by, for example the number of images per call.
        clock: function that returns the seconds of a call. Default: `timed`. For functions from
            `own_process`, which return seconds themselves, pass `lambda call: call()`.
    """
    clock = clock or timed
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    for i in range(warmup + runs):
        # Every second round has the reverse order, so that a drift in speed favours no call.
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            elapsed = clock(calls[name])
            if i >= warmup:
                seconds[name].append(elapsed / per)
    return seconds


def timed(call: Callable[[], object]) -> float:
    """Return the seconds from the start of a call until the device has finished its work."""
    gc.collect()  # so that no garbage collection runs during the call
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


@contextmanager
def own_process(build: Callable[..., Callable[..., object]], *args: Any) -> Iterator[Any]:
    """Build a function in a new process. Yield a second function, which times calls of the first.

    The new process calls `build(*args)` once. The yielded function passes its arguments to the
    built function, and returns the seconds of this one call.

    Use `own_process` for calls that change a setting of the whole process, such as its allocator.

        with own_process(build, 64) as ours, own_process(build_plain, 64) as plain:
            alternate({"ours": ours, "stock": plain}, runs=5, clock=lambda call: call())

    Args:
        build: a function at the top level of a module.
        args: the arguments of `build`, which must be picklable.
    """
    # process
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
            raise RuntimeError(
                f"The process of {build.__name__}{args} has ended with exit code "
                f"{process.exitcode}. The error of this process is printed above."
            ) from error

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
    """Return a description of the machine, for the JSON file."""
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
    """Return the processor's name. On Linux, only /proc/cpuinfo contains the processor's name."""
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def collected(rows: Iterable[Row]) -> list[Row]:
    """Return all rows as a list, and print each row as soon as it is measured."""
    kept: list[Row] = []
    for row in rows:
        kept.append(row)
        print(line(row), flush=True)
    return kept


def line(row: Row) -> str:
    """Return a row as one line of text."""
    ours, reference = (f"{value:.3g} {row.unit}" for value in (row.ours, row.reference))
    ratio = f"{row.ratio_median:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f})"
    return f"{row.name}: ours {ours}, reference {reference}, ratio {ratio}"


def finish(rows: Sequence[Row], *, title: str, json_file: Path | None) -> None:
    """Print the table. If a file is given, write {"machine": ..., "rows": [...]} to it."""
    console = Console()
    if not console.is_terminal:  # the width of a terminal does not apply to files and pipes
        console = Console(width=120)
    console.print(table(rows, title=title))
    if json_file is not None:
        result = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row], *, title: str) -> Table:
    """Return a table to print, with a line for each row."""
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
