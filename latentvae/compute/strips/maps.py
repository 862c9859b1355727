"""Write and read feature maps in strips (several rows), in memory or in a file.

    strips -> fill -> rows (H, W, C) and the statistics of every channel
    rows top - 1 .. bottom -> read -> (1, C, rows, W) -> norm, activation, convolution -> strip

A strip has the rows top .. bottom - 1 of its feature map. Rows are stored one after the other with
channels last. So a strip is one contiguous piece of memory or of a file. Variances are computed
from deviations from each strip's own mean, so they are precise even if the mean is large.

`C` channels, `H W` height and width of a feature map.
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

CPU_STRIP, GPU_STRIP = 4 * 2**20, 64 * 2**20  # Bytes of a strip on a CPU and on a GPU.
SMALL_MAP = 16 * 2**20  # Feature maps of at most this many bytes stay in memory.


@dataclass(frozen=True)
class Strips:
    """Options for computing in strips. Strips change the result only by rounding.

    Args:
        rows: number of rows of a feature map in a strip. None takes as many rows as fit into 4 MiB
            (64 MiB on a GPU).
        storage: where feature maps above 16 MiB are kept. With `"memory"`, up to two feature maps
            are in memory at a time. With `"disk"`, memory use hardly grows with the size of the
            image. None means the disk for a network on the CPU, and memory on other devices.
        folder: folder of the feature maps' files. These files have no name, and are deleted at the
            end of the process. None means the folder of temporary files (TMPDIR). The folder should
            be on a disk, not in memory.
    """

    rows: int | None = None
    storage: Literal["memory", "disk"] | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise UserError(f"strips must have at least 1 row (got {self.rows})")
        if self.storage not in (None, "memory", "disk"):
            raise UserError(f"storage must be 'memory' or 'disk' (got '{self.storage}')")


def moments_of_rows(rows: Tensor) -> RunningMoments:
    """Return mean and variance of each of C channels of n rows (n, W, C), over all positions.

    Mean and variance are accurate even for float32 rows whose mean is thousands of times their
    standard deviation. The computation needs no copy of the rows in float64.
    """
    values = rows.flatten(0, 1)
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    near = values.mean(0)
    deviations = values - near
    rest = deviations.mean(0).cpu().double()  # mean minus `near`, which is a rounded mean
    squares = deviations.square_().sum(0).cpu().double() - len(values) * rest.square()
    return RunningMoments.known(len(values), near.cpu().double() + rest, squares)


class FeatureMap(ABC):
    """A feature map (C, H, W) of one image.

    Attributes:
        statistics: mean and variance of each channel, over the rows that the last `fill` wrote.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.channels, self.height, self.width = channels, height, width
        self.statistics = RunningMoments(channels)

    def read(self, top: int, bottom: int) -> Tensor:
        """Return rows `top` to `bottom - 1`, (1, C, bottom - top, W), in channels-last order.

        Do not change the returned rows in place.
        """
        return rearrange(self._load(top, bottom), "h w c -> 1 c h w")

    def fill(self, strips: Iterable[tuple[int, Tensor]], *, measure: bool = True) -> None:
        """Write strips from top to bottom.

        A strip is written only after the next strip has been computed. So the strips may be
        computed from the same map that is filled, if each strip needs at most one row above its own
        first row.

        Args:
            strips: pairs (number of the first row of a strip, strip), with strips (1, C, rows, W).
            measure: also compute the statistics of the strips.
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
        """Return the map's rows `top` to `bottom - 1`, as (bottom - top, W, C)."""

    @abstractmethod
    def _store(self, top: int, rows: Tensor) -> None: ...


class MemoryMap(FeatureMap):
    """A feature map in a tensor (C, H, W), which may be the input or the output image."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(*values.shape)
        self._rows = rearrange(values, "c h w -> h w c")  # a view of `values`, not a copy

    def _load(self, top: int, bottom: int) -> Tensor:
        return self._rows[top:bottom]

    def _store(self, top: int, rows: Tensor) -> None:
        self._rows[top : top + len(rows)] = rows


class FileMap(FeatureMap):
    """A feature map in an unnamed temporary file, which the system may keep in its cache.

    Raises:
        UserError: the disk of the folder has not enough free space.
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
                f"{size / 2**30:.1f} GiB. Give a folder on another disk (TMPDIR)."
            )
        self._file = tempfile.TemporaryFile(dir=where)  # closed when the map is freed
        weakref.finalize(self, self._file.close)

    def _load(self, top: int, bottom: int) -> Tensor:
        shape = (bottom - top, self.width, self.channels)
        rows = torch.empty(shape, dtype=self._like.dtype)
        self._file.seek(top * self._row)
        read = self._file.readinto(_bytes(rows))
        assert read == len(rows) * self._row, "rows must be written before they are read"
        return rows.to(self._like.device)

    def _store(self, top: int, rows: Tensor) -> None:
        self._file.seek(top * self._row)
        self._file.write(_bytes(rows.cpu().contiguous()))


def _bytes(rows: Tensor) -> memoryview:
    return rows.view(torch.uint8).numpy().data


class Workspace:
    """Creates the feature maps for one run of an encoder or decoder, and divides them into strips.

    Args:
        strips: options of the strips.
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
        # Channels are the last axis, because each row of a `MemoryMap` must be contiguous.
        rows = self._like.new_empty(height, width, channels)
        return MemoryMap(rearrange(rows, "h w c -> c h w"))

    def slices(self, height: int, row_elements: int) -> Iterator[tuple[int, int]]:
        """Yield for each strip the number of its first row and of the row after its last row.

        Args:
            height: number of rows of the feature map.
            row_elements: number of elements in a row, which limits the height of a strip.
        """
        fitting = self.strip_bytes // (row_elements * self._like.element_size())
        rows = self._strips.rows or max(fitting, 1)
        for top in range(0, height, rows):
            yield top, min(top + rows, height)
