"""Shared by all tests: one thread, so that results do not depend on the machine's load, and no
network."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import constants

from latentvae.evaluation import speed
from tests.export.hub_stand_in import TOKEN, HubStandIn, hub_stand_in

# Before any fixture of any scope: sums depend on the number of threads.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Take the imported modules out of garbage collection: a training collects twice at its end,
    which costs a second where it walks through all of torch and diffusers."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def own_accelerate() -> Iterator[None]:
    """Accelerate as in a new process, for a module of tests and after it: it keeps the precision of
    the first run in a process for good."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def quick_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations time each call a few times, not for a second."""
    monkeypatch.setattr(speed, "ENOUGH", 0.02)


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Caches of tar indices and of `datasets` in a folder of the test's own."""
    import datasets

    caches = tmp_path / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(caches / "datasets"))
    # What `datasets` sleeps when a stream is dropped, for pyarrow's threads to end.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    datasets.disable_progress_bars()
    yield caches
    gc.collect()  # streams that are dropped later would sleep in another test


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """A stand-in as the Hub of this process, which reads HF_ENDPOINT and its like only once."""
    with hub_stand_in() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
