"""Compare time and peak memory of quantising 16,384 vectors with this package and with others.

    python benchmarks/quantizers.py --json quantizers.json

The script prints a table and writes JSON. Each ratio is the cost of another package divided by the
cost of this package. There are three codebooks: 16384 codes of 256 channels, 8192 codes of 32
channels on the unit sphere, and 65536 codes of 8 channels. With each codebook, these quantisers are
compared:

- this package's `VectorQuantizer`, with the computation of its losses but without gradients
- diffusers' `VectorQuantizer`, which uses torch.cdist and argmin
- the formulas of taming-transformers' VectorQuantizer2, which expand the squared distance
- vector-quantize-pytorch's `VectorQuantize`

The script counts the vectors for which this package and another package choose the same code. If
the two chosen codes of a vector differ, the script checks whether they are almost equally near to
the vector: their squared distances in float64 differ by at most a factor of 1 + 1e-5. The
quantisers are timed alternately. Peak memory is the rise of the resident memory of a new process
during one call of a quantiser.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from latentvae.bottlenecks.vector import VectorQuantizer
from latentvae.cli.flags import exit_with, parse_options
from latentvae.errors import UserError

MIB = 2**20
VECTORS = 16_384
SIZES = {  # number of codes, number of channels, whether the codes lie on the unit sphere
    "16384 x 256": (16_384, 256, False),
    "8192 x 32 normalised": (8192, 32, True),
    "65536 x 8": (65_536, 8, False),
}
# Peak memory, as a multiple of the size of a matrix of all distances. A quantiser that needs more
# memory than the machine has is not measured, because the system would kill its process.
MATRICES = {"latentvae": 0.1, "diffusers": 1.1, "taming-style": 3.1, "vector-quantize-pytorch": 4.1}
Quantise = Callable[[Tensor], Tensor]  # features (1, D, 128, 128) -> indices (N,)


@dataclass(frozen=True)
class Options:
    """Options: how to measure, and where to write the results."""

    json: Path | None = None
    """JSON file to write the results to."""

    runs: int = 5
    """Number of timed runs of each quantiser, after one untimed run. The runs of different
    quantisers alternate."""

    threads: int = 2
    """Number of CPU threads."""


def ours(codebook: Tensor, l2: bool) -> Quantise:
    K, D = codebook.shape
    quantiser = VectorQuantizer(num_codes=K, code_channels=D, l2_normalize=l2).eval()
    quantiser.weight.copy_(codebook)
    return lambda features: quantiser(features).indices.flatten()


def with_diffusers(codebook: Tensor, l2: bool) -> Quantise:
    quantiser = DiffusersQuantizer(*codebook.shape, beta=0.25, legacy=False)
    quantiser.embedding.weight.copy_(codebook)
    return lambda features: quantiser(placed(features, l2))[2][2]


def as_taming(codebook: Tensor, l2: bool) -> Quantise:
    """Return a function that finds the indices of features as taming-transformers does.

    The function repeats the formulas of VectorQuantizer2 (taming/modules/vqvae/quantize.py).
    """

    def quantise(features: Tensor) -> Tensor:
        z = placed(features, l2).permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, z.shape[3])
        d = (
            torch.sum(flat**2, dim=1, keepdim=True)
            + torch.sum(codebook**2, dim=1)
            - 2 * torch.einsum("bd,dn->bn", flat, codebook.T)
        )
        indices = torch.argmin(d, dim=1)
        z_q = F.embedding(indices, codebook).view(z.shape)
        _ = torch.mean((z_q - z) ** 2) + 0.25 * torch.mean((z_q - z) ** 2)
        (z + (z_q - z)).permute(0, 3, 1, 2).contiguous()
        return indices

    return quantise


def with_vector_quantize_pytorch(codebook: Tensor, l2: bool) -> Quantise:
    K, D = codebook.shape
    quantiser = VectorQuantize(D, K, use_cosine_sim=l2, accept_image_fmap=True).eval()
    quantiser.codebook = codebook
    return lambda features: quantiser(features)[1].flatten()


QUANTISERS: dict[str, Callable[[Tensor, bool], Quantise]] = {
    "latentvae": ours,
    "diffusers": with_diffusers,
    "taming-style": as_taming,
    "vector-quantize-pytorch": with_vector_quantize_pytorch,
}


def placed(features: Tensor, l2: bool) -> Tensor:
    return F.normalize(features, dim=1) if l2 else features


def inputs(size: str) -> tuple[Tensor, Tensor, bool]:
    """Return features (1, D, 128, 128), a codebook (K, D), and whether to normalise features."""
    K, D, l2 = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(K, D, generator=generator)
    features = torch.randn(1, D, 128, VECTORS // 128, generator=generator)
    return features, F.normalize(codebook, dim=1) if l2 else codebook, l2


@torch.no_grad()
def peak(size: str, name: str) -> int:
    """Return the bytes that one quantiser call needs beyond the memory in use before the call."""
    features, codebook, l2 = inputs(size)
    quantise = QUANTISERS[name](codebook, l2)
    quantise(features[:, :, :1, :1].contiguous())  # so that one-time allocations do not count
    Path("/proc/self/clear_refs").write_text("5")  # resets the system's peak
    before = psutil.Process().memory_info().rss
    quantise(features)
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return max(int(status.split()[0]) * 1024 - before, 0)


def peak_in_a_fresh_process(size: str, name: str, *, threads: int) -> int:
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        executor.submit(torch.set_num_threads, threads).result()
        return executor.submit(peak, size, name).result()


def times(quantisers: dict[str, Quantise], features: Tensor, runs: int) -> dict[str, list[float]]:
    """Return for each quantiser the seconds of its timed runs. The quantisers run alternately."""
    seconds: dict[str, list[float]] = {name: [] for name in quantisers}
    for run in range(runs + 1):
        for name, quantise in quantisers.items():
            start = time.perf_counter()
            quantise(features)
            if run > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def agreement(found: Tensor, reference: Tensor, size: str) -> tuple[float, bool]:
    """Return the share of equal indices, and whether all unequal indices are ties.

    Two indices are a tie if their codes are almost equally near to the vector.
    """
    features, codebook, l2 = inputs(size)
    differs = found != reference
    vectors = placed(features, l2).flatten(2)[0].T[differs].double()
    one, other = ((vectors - codebook[i[differs]]).square().sum(1) for i in (found, reference))
    ties = bool(((one - other).abs() <= 1e-5 * other).all())
    return 1 - differs.float().mean().item(), ties


def measure(size: str, options: Options) -> Iterator[dict[str, Any]]:
    """Yield two rows for each quantiser of another package: one of time, one of peak memory.

    Quantisers that need more memory than is free are left out.
    """
    # quantisers that fit into memory
    features, codebook, l2 = inputs(size)
    full = 4 * VECTORS * len(codebook)
    room = psutil.virtual_memory().available
    fitting = [name for name in QUANTISERS if MATRICES[name] * full < room]
    if left_out := QUANTISERS.keys() - fitting:
        print(f"{size}: not enough memory for the quantisers of {', '.join(sorted(left_out))}")

    # results, times and peaks
    quantisers = {name: QUANTISERS[name](codebook, l2) for name in fitting}
    indices = {name: quantise(features) for name, quantise in quantisers.items()}
    seconds = times(quantisers, features, options.runs)
    peaks = {
        name: peak_in_a_fresh_process(size, name, threads=options.threads) for name in quantisers
    }

    # rows
    own, own_peak = seconds["latentvae"], peaks["latentvae"]
    for name in list(quantisers)[1:]:
        equal, ties = agreement(indices["latentvae"], indices[name], size)
        ratios = [b / a for a, b in zip(own, seconds[name], strict=True)]
        checked: dict[str, Any] = {"runs": len(ratios), "equal_share": equal, "rest_are_ties": ties}
        checked["equal_within"] = 1 - equal if ties else None

        row = _row(f"time, {size}, {name}", "s", median(own), median(seconds[name]), ratios)
        yield _printed(row | {"ours_spread": [min(own), max(own)]} | checked)

        ratio = peaks[name] / max(own_peak, 1)
        row = _row(f"peak, {size}, {name}", "MiB", own_peak / MIB, peaks[name] / MIB, [ratio])
        share = {"ours_share_of_full_matrix": own_peak / full}
        yield _printed(row | share | checked | {"runs": 1})


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row as soon as it is measured, and return it."""
    values = ", ".join(f"{side} {row[side]:.3g} {row['unit']}" for side in ("ours", "reference"))
    print(f"{row['name']}: {values}, ratio {row['ratio_median']:.2f}", flush=True)
    return row


def _row(name: str, unit: str, own: float, reference: float, ratios: list[float]) -> dict[str, Any]:
    return {
        "name": name,
        "unit": unit,
        "ours": own,
        "reference": reference,
        "ratio_median": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def machine(threads: int) -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
    }


def run(options: Options) -> None:
    """Measure all codebook sizes, and print the table of results."""
    torch.set_num_threads(options.threads)
    rows = [row for size in SIZES for row in measure(size, options)]
    Console().print(_table(rows))
    if options.json is not None:
        result = {"machine": machine(options.threads), "vectors": VECTORS, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{VECTORS} vectors; ratio = reference / ours")
    for column in ("", "ours", "reference", "ratio (min to max)", "equal indices"):
        table.add_column(column)
    for row in rows:
        spread = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        ties = "" if row["rest_are_ties"] else ", NOT all ties"
        unit = row["unit"]
        values = [f"{row[side]:.3g} {unit}" for side in ("ours", "reference")]
        table.add_row(row["name"], *values, spread, f"{row['equal_share']:.3%}{ties}")
    return table


def main() -> None:
    try:
        options = parse_options(Options, sys.argv[1:], prog="quantizers.py", description=__doc__)
        with torch.no_grad():
            run(options)
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
