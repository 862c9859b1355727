"""Memory that stays with the process saves page faults, and settings of the user win."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentvae.compute import optimization
from latentvae.compute.memory import keep_freed_memory
from latentvae.engine import loop
from latentvae.tasks.autoencoder import train
from tests.tasks.autoencoder.small import small_config
from tests.tiny import kl

ROUNDS = '''
import resource, torch
from latentvae.compute.memory import keep_freed_memory
def fill(rounds):
    for _ in range(rounds):
        torch.ones(64 << 20, dtype=torch.uint8)
def faults():
    """Return the page faults of five tensors of 64 MiB that follow ten others."""
    fill(10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill(5)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(torch.device("cpu")), faults())
'''


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has the setting")
def test_a_tensor_takes_the_pages_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    command = [sys.executable, "-c", ROUNDS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    default, said, kept = done.stdout.split()
    assert int(default) > 100  # by 4 KiB 81,920, by huge pages 160
    assert said == "True" and int(kept) < int(default) / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has the setting")
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_environment_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert not keep_freed_memory(torch.device("cpu"))


def test_there_is_nothing_to_keep_for_other_devices() -> None:
    assert not keep_freed_memory(torch.device("cuda"))


def test_who_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[str] = []
    for module in (loop, optimization):
        monkeypatch.setattr(
            module, "keep_freed_memory", lambda _device, m=module: called.append(m.__name__)
        )
    optimization.optimize_network(kl(), mode="exact")
    train(small_config(tmp_path, max_train_steps=1))
    assert called == [optimization.__name__, loop.__name__]
