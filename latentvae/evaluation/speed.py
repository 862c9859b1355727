"""Measure the speed and the peak memory of a network that encodes and decodes single images.

On CUDA, the peak is the memory that torch allocated, without the memory that was allocated before
the call (such as the weights). On other devices, the peak is the rise of the process's resident
memory during the call, sampled every few milliseconds.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from threading import Event, Thread
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from latentvae.compute.memory import release_freed_memory
from latentvae.models import Network
from latentvae.models.calls import decode, encode

INTERVAL = 0.002  # seconds between two samples of the memory
MIN_REPEATS, MAX_REPEATS, ENOUGH = 3, 20, 1.0  # timed calls: as many as fit into ENOUGH seconds
MIB = 2**20


@dataclass(frozen=True)
class SpeedPoint:
    """The speed and the peak memory of encoding or decoding one image of one size.

    Args:
        call: `"encode"` or `"decode"`.
        size: pixels on a side of the image.
        images_per_second: speed of the median call. None if the size was skipped.
        peak_mib: peak memory in MiB, without the memory that was used before the call. None if the
            size was skipped.
        runs: number of timed calls after the first.
        skipped: reason why this size was not measured, or None.
    """

    call: str
    size: int
    images_per_second: float | None = None
    peak_mib: float | None = None
    runs: int = 0
    skipped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name as plain values. Attributes that are None are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@torch.inference_mode()
def measure_speed(
    net: Network,
    *,
    sizes: Sequence[int] = (256, 512, 1024),
    f: int,
    in_channels: int = 3,
    budget_s: float = 60.0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Time `encode` and `decode` of `net` on noise, from the smallest image size to the largest.

    Args:
        net: the network in eval mode, on `device`.
        sizes: pixels on a side, rounded to multiples of `f`. A network that supports only one size
            needs exactly this size.
        budget_s: largest time in seconds of encoding or decoding one image. The time of an image
            size is predicted from the next smaller size. Image sizes that would need more time than
            `budget_s` are skipped. The smallest size is always measured.

    Returns:
        Plain values: `device`, `dtype`, `num_threads` (of torch, on the CPU), `memory` (what
        `peak_mib` counts), and `points`, each with the values of a `SpeedPoint` by name.
    """
    # inputs of the smallest size
    device, dtype = torch.device(device), net.dtype
    rounded = sorted({max(round(size / f), 1) * f for size in sizes})
    generator = torch.Generator().manual_seed(0)
    smallest = torch.rand(1, in_channels, rounded[0], rounded[0], generator=generator) * 2 - 1
    smallest = smallest.to(device, dtype)
    z = encode(net, smallest)
    decode(net, z)  # a first call, so that one-time setup does not count as memory

    # larger inputs are made by enlarging these inputs
    calls = {"encode": (encode, smallest), "decode": (decode, z)}
    points = [
        point
        for name, (call, inputs) in calls.items()
        for point in _measure_sizes(name, partial(call, net), inputs, rounded, budget_s)
    ]

    return {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "memory": "torch on the device" if device.type == "cuda" else "the process",
        "points": [point.to_dict() for point in points],
    }


def _measure_sizes(
    name: str, call: Callable[[Tensor], Any], smallest: Tensor, sizes: Sequence[int], budget: float
) -> Iterator[SpeedPoint]:
    """Yield a `SpeedPoint` of `call` for each of `sizes`. `smallest` is the first size's input."""
    last: SpeedPoint | None = None
    for size in sizes:
        reason = None if last is None else _reason_to_skip(last, size, budget, smallest.device)
        if reason is None:
            side = smallest.shape[3] * size // sizes[0]
            inputs = F.interpolate(smallest.float(), size=(side, side)).to(smallest.dtype)
            try:
                last = measure_call(name, size, partial(call, inputs), smallest.device, budget)
                yield last
                continue
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                reason = "out of memory"
        yield SpeedPoint(name, size, skipped=reason)


def _reason_to_skip(last: SpeedPoint, size: int, budget: float, device: torch.device) -> str | None:
    """Return a reason if images of this size would take too much time or memory, else None.

    Time and memory grow at least in proportion to the number of pixels.
    """
    assert last.images_per_second is not None and last.peak_mib is not None
    ratio = (size / last.size) ** 2
    seconds, mib = ratio / last.images_per_second, ratio * last.peak_mib
    if seconds > budget:
        return f"would take about {seconds:.0f} s"
    # Linux allocates more memory than exists and then kills the process, so no error is raised.
    if device.type != "cuda" and mib * MIB > psutil.virtual_memory().available:
        return f"would need about {mib / 1024:.1f} GiB of memory"
    return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means out of memory.

    On the CPU, torch raises a plain RuntimeError if there is no memory left.
    """
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def measure_call(
    name: str, size: int, call: Callable[[], Any], device: torch.device, budget: float
) -> SpeedPoint:
    """Return the speed and the peak memory of a call without arguments.

    Args:
        name: `"encode"` or `"decode"`.
        size: pixels on a side of the image.
        call: function to measure, whose inputs are already on `device`.
        device: device of the computation.
        budget: seconds for the timed calls. If the first call takes longer than a third of
            `budget`, only one more call is timed, else several.
    """
    with peak_memory(device) as peak:  # first call only: later calls may fragment the heap
        first = _time(call, device)
    repeats = _clamp(int(ENOUGH / first), MIN_REPEATS, MAX_REPEATS)
    if first * MIN_REPEATS > budget:
        repeats = 1
    seconds = statistics.median(_time(call, device) for _ in range(repeats))
    return SpeedPoint(name, size, 1 / seconds, peak[0] / MIB, repeats)


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds from the start of `call` until its result is computed."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # sync point: calls return before the GPU is done
    return time.perf_counter() - start


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Measure the largest rise of memory during a `with` block.

    The yielded list contains the largest rise, in bytes, after the block has ended.
    """
    gc.collect()
    with _peak_on_cuda(device) if device.type == "cuda" else _peak_of_process() as peak:
        yield peak


@contextmanager
def _peak_on_cuda(device: torch.device) -> Iterator[list[int]]:
    peak: list[int] = []
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield peak
    peak.append(torch.cuda.max_memory_allocated(device) - before)


@contextmanager
def _peak_of_process() -> Iterator[list[int]]:
    release_freed_memory()  # otherwise a call that reuses this memory would show no rise
    process, done = psutil.Process(), Event()
    before = process.memory_info().rss
    peak = [0]

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
