"""Two ranks are one process with the joined batch, and kills of real processes change nothing."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentvae.losses.objective.kl_target import BitsTarget
from latentvae.tasks.autoencoder import train
from tests.forks import end_of_ranks, forked, ranks, start_ranks
from tests.launch import LAUNCHER, launch, start, train_flags, wait_for
from tests.tasks.autoencoder.ranks import save_gradients
from tests.tasks.autoencoder.small import small_config
from tests.tasks.autoencoder.test_resume import tensors

SLOW = ("adaptive", "held", "flow")


@pytest.mark.parametrize(
    "weight", ["fixed", *(pytest.param(w, marks=pytest.mark.slow) for w in SLOW)]
)
def test_gradients_of_two_ranks_equal_one_process_with_the_joined_batch(
    tmp_path: Path, weight: str
) -> None:
    one = of_one_and_of_two(tmp_path, weight=weight)
    assert {
        "model/output_logvar",
        "model/net.decoder.conv_out.weight",
        "discriminator/layers.0.weight",
    } <= one.keys()
    flows = [name for name in one if name.startswith("model/bottleneck.flow.")]
    assert bool(flows) == (weight == "flow")
    assert weight != "flow" or one["model/bottleneck.flow.layers.3.last.weight"].any()
    log_factor = one["progress/kl_log_factor"].item()
    # After one update by the rate, 1, and the damping; as much as that if the error is clipped.
    if weight == "held":
        assert 0.1 < abs(log_factor) < 0.9 * (1.0 + BitsTarget.damping)
    else:
        assert log_factor == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["average", "entropy", "lfq", "levels"])
def test_a_codebook_of_two_ranks_is_that_of_one_process_with_the_joined_batch(
    tmp_path: Path, quantizer: str
) -> None:
    levels = quantizer == "levels"
    # VQ-VAE-2 has ReLUs. Rounding puts single values on the other side of their kink.
    one = of_one_and_of_two(tmp_path, quantizer=quantizer, atol=2e-2 if levels else 1e-4)
    expected = {"average": "buffer/embed_sum", "entropy": "model/net.quantize.weight", "lfq": ""}
    expected["levels"] = "buffer/1.embed_sum"
    assert not expected[quantizer] or expected[quantizer] in one


def of_one_and_of_two(
    folder: Path, *, atol: float = 1e-4, **options: Any
) -> dict[str, torch.Tensor]:
    """What one process saved; two ranks saved the same, to rounding, and equal to each other."""
    output = folder / "output.txt"
    ranks(lambda: save_gradients(folder / "two", 3, **options), output=output)
    code = forked(lambda: save_gradients(folder / "one", 6, **options), output=output)
    assert code == 0, output.read_text()
    one = load_file(folder / "one-0.safetensors")
    first, second = (load_file(folder / f"two-{rank}.safetensors") for rank in (0, 1))
    assert one.keys() == first.keys() == second.keys()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        scale = (
            value.abs().max().clamp(min=1e-4)
        )  # the discriminator's last bias has a gradient of zero
        torch.testing.assert_close(first[name] / scale, value / scale, rtol=0, atol=atol, msg=name)
    return one


@pytest.mark.slow
def test_two_killed_ranks_go_on_to_the_bit(tmp_path: Path) -> None:
    """For one process see tests/faults/test_kills.py."""
    options = {
        "train_batch_size": 2,
        "max_train_steps": 24,
        "checkpointing_steps": 5,
        "validation_steps": 12,
    }

    # a run without kills
    output = tmp_path / "output.txt"
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    ranks(lambda: train(small_config(straight, **options)), output=output)

    # a run that is killed twice
    for update, delay in ((5, 0.9), (15, 0.1)):
        pids = start_ranks(lambda: train(small_config(killed, **options)), output=output)
        while not (killed / f"checkpoint-{update}" / "manifest.json").exists():
            time.sleep(0.01)
        time.sleep(delay)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        codes, text = end_of_ranks(pids, output=output)
        assert codes == [-signal.SIGKILL] * 2 and not (killed / "export").exists(), text
    ranks(lambda: train(small_config(killed, **options)), output=output)

    # compare exports and checkpoints
    left, right = tensors(straight / "export"), tensors(killed / "export")
    assert left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )
    left, right = tensors(straight / "checkpoint-24"), tensors(killed / "checkpoint-24")
    assert left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "to"), [(1, "launcher"), (1, "group"), (2, "launcher")])
def test_sigterm_finishes_the_update_saves_and_ends(
    tmp_path: Path, processes: int, to: str
) -> None:
    options = {
        "train_batch_size": 4 // processes,
        "max_train_steps": 400,
        "checkpointing_steps": 400,
        "validation_steps": 400,
        "log_steps": 1,
        "dataloader_num_workers": 1 if to == "group" else 0,
    }

    # start the run and send SIGTERM
    process = launch(train_flags(tmp_path, **options), processes=processes)
    wait_for(process, tmp_path / "log.jsonl")
    deadline = time.monotonic() + 240
    if to == "launcher":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGTERM)

    # wait for the checkpoint
    while not list(tmp_path.glob("checkpoint-*/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    # wait until all processes have ended
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "The same command resumes from this checkpoint" in text
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_launch_that_starts_fewer_ranks_than_asked_is_an_error(tmp_path: Path) -> None:
    flags = ["--cpu", "--num_processes", "2", *train_flags(tmp_path)]
    process = start([*LAUNCHER, *flags])
    text, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "asked for several processes and started one" in text
    assert not list(tmp_path.iterdir())
