"""Feature maps that are written and read a strip of rows at a time, in memory or in a file.

    strips -> fill -> rows (H, W, C) and the statistics of every channel
    rows top - 1 .. bottom + 1 -> read -> (1, C, rows, W) -> norm, activation, convolution -> strip

Rows lie one after the other with their channels last, so that a strip is one piece of memory or of
a file. Deviations are taken from each strip's own mean, so that a large mean costs no digits.

`C` channels, `H W` space.
"""

import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from latentvae.errors import UserError
from latentvae.moments import RunningMoments

CPU_STRIP, GPU_STRIP = 4 * 2**20, 64 * 2**20  # bytes; a GPU has launches to save
SMALL_MAP = 16 * 2**20  # bytes of a map that stays in memory


@dataclass(frozen=True)
class Strips:
    """How large images are computed in strips; the result is that of the whole image, to rounding.

    Args:
        rows: of a feature map, computed at a time; None takes what fills 4 MiB (64 on a GPU).
        storage: where maps above 16 MiB are: `"memory"`, of which two are held at a time, or
            `"disk"`, with which memory stays nearly flat. None is the disk for a network on the
            CPU, and the memory of any other device.
        folder: for their files, which have no name and are gone with the process; None is that of
            temporary files (TMPDIR), which should be on a disk, not in memory.
    """

    rows: int | None = None
    storage: Literal["memory", "disk"] | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise UserError(f"strips have 1 row or more, not {self.rows}")
        if self.storage not in (None, "memory", "disk"):
            raise UserError(f"maps are stored in 'memory' or on 'disk', not '{self.storage}'")


def moments_of_rows(rows: Tensor) -> RunningMoments:
    """The moments of each channel over rows (n, W, C), exact enough for float32 rows whose mean is
    thousands of times their deviation, without a copy of them in float64."""
    values = rows.flatten(0, 1)
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    near = values.mean(0)
    deviations = values - near
    rest = deviations.mean(0).cpu().double()  # the rounding of `near`
    squares = deviations.square_().sum(0).cpu().double() - len(values) * rest.square()
    return RunningMoments.known(len(values), near.cpu().double() + rest, squares)


class FeatureMap(ABC):
    """(C, H, W) of one image.

    Attributes:
        statistics: of each channel, over what `fill` has written last.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.channels, self.height, self.width = channels, height, width
        self.statistics = RunningMoments(channels)

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows, (1, C, bottom - top, W), channels last; not to be changed."""
        return rearrange(self._load(top, bottom), "h w c -> 1 c h w")

    def fill(self, strips: Iterable[tuple[int, Tensor]], *, measure: bool = True) -> None:
        """Write strips, each with its first row, from top to bottom.

        Each is written when the next has been computed: a map may be filled from its own strips,
        if these read but one row above their own.
        """
        statistics, last = RunningMoments(self.channels), None
        for strip in strips:
            if last is not None:
                self._write(*last, statistics if measure else None)
            last = strip
        assert last is not None
        self._write(*last, statistics if measure else None)
        self.statistics = statistics

    def _write(self, top: int, strip: Tensor, statistics: RunningMoments | None) -> None:
        rows = rearrange(strip, "1 c h w -> h w c")
        self._store(top, rows)
        if statistics is not None:
            statistics.join(moments_of_rows(rows))

    @abstractmethod
    def _load(self, top: int, bottom: int) -> Tensor:
        """(bottom - top, W, C)."""

    @abstractmethod
    def _store(self, top: int, rows: Tensor) -> None: ...


class MemoryMap(FeatureMap):
    """In a tensor (C, H, W), which may be an image that was given or is asked for."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(*values.shape)
        self._rows = rearrange(values, "c h w -> h w c")  # a view

    def _load(self, top: int, bottom: int) -> Tensor:
        return self._rows[top:bottom]

    def _store(self, top: int, rows: Tensor) -> None:
        self._rows[top : top + len(rows)] = rows


class FileMap(FeatureMap):
    """In a temporary file without a name, which the kernel may write out whenever memory is short.

    Raises:
        UserError: the folder's disk has not the room.
    """

    def __init__(
        self, channels: int, height: int, width: int, *, like: Tensor, folder: Path | None
    ) -> None:
        super().__init__(channels, height, width)
        self._like, self._row = like, channels * width * like.element_size()
        where = folder or Path(tempfile.gettempdir())
        if (free := shutil.disk_usage(where).free) < (size := self._row * height):
            raise UserError(
                f"'{where}' has {free / 2**30:.1f} GiB free, and a feature map takes "
                f"{size / 2**30:.1f} GiB: name a folder on another disk (TMPDIR)"
            )
        self._file = tempfile.TemporaryFile(dir=where)  # open as long as the map is
        weakref.finalize(self, self._file.close)

    def _load(self, top: int, bottom: int) -> Tensor:
        shape = (bottom - top, self.width, self.channels)
        rows = torch.empty(shape, dtype=self._like.dtype)
        self._file.seek(top * self._row)
        read = self._file.readinto(_bytes(rows))
        assert read == len(rows) * self._row, "rows are written before they are read"
        return rows.to(self._like.device)

    def _store(self, top: int, rows: Tensor) -> None:
        self._file.seek(top * self._row)
        self._file.write(_bytes(rows.cpu().contiguous()))


def _bytes(rows: Tensor) -> memoryview:
    return rows.view(torch.uint8).numpy().data


class Workspace:
    """Makes the maps of one call, and cuts them into strips.

    Args:
        like: a tensor of the network's device and dtype.
    """

    def __init__(self, strips: Strips, *, like: Tensor) -> None:
        on_cpu = like.device.type == "cpu"
        self._strips, self._like = strips, like[:0]
        self.on_disk = (strips.storage or ("disk" if on_cpu else "memory")) == "disk"
        self.strip_bytes = CPU_STRIP if on_cpu else GPU_STRIP

    def make(self, channels: int, height: int, width: int) -> FeatureMap:
        size = channels * height * width * self._like.element_size()
        if self.on_disk and size > SMALL_MAP:
            folder = self._strips.folder
            return FileMap(channels, height, width, like=self._like, folder=folder)
        # Channels last: `MemoryMap` wants rows of one piece.
        rows = self._like.new_empty(height, width, channels)
        return MemoryMap(rearrange(rows, "h w c -> c h w"))

    def slices(self, height: int, row_elements: int) -> Iterator[tuple[int, int]]:
        """First row and end of strips whose rows have so many elements."""
        fitting = self.strip_bytes // (row_elements * self._like.element_size())
        rows = self._strips.rows or max(fitting, 1)
        for top in range(0, height, rows):
            yield top, min(top + rows, height)
