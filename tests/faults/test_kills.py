"""SIGKILL at random moments and at every point of a save: nothing is lost, nothing half-written is
read, and the run ends as if it had never been killed."""

import os
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from latentvae.engine import loop
from latentvae.engine.checkpoint_files import (
    Snapshot,
    checkpoints,
    half_written,
    load_checkpoint,
    newest_usable,
    save_checkpoint,
    sweep_temporary,
    update_of,
)
from latentvae.tasks.autoencoder import train
from tests.faults.kills import OPTIONS, KillAt, assert_same, kill_at_random, straight_run
from tests.forks import forked
from tests.tasks.autoencoder.small import small_config

SIGKILLED = -9


def test_a_process_killed_within_a_progress_bar_blocks_no_other(tmp_path: Path) -> None:
    def killed() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    tqdm.get_lock()  # of this process, which its forks inherit
    output = tmp_path / "output.txt"
    assert forked(killed, output=output) == SIGKILLED
    assert forked(lambda: list(tqdm(range(2))), output=output, kill_after=20) == 0


@pytest.mark.timeout(1800)  # minutes on an idle core, and as many times more as others use it
@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_random_kills_change_nothing(tmp_path: Path, kills: int) -> None:
    seconds = straight_run(tmp_path / "straight")
    killed = kill_at_random(
        tmp_path / "straight", folder=tmp_path / "killed", kills=kills, seconds=seconds, seed=1
    )
    print(f"{kills} kills over {killed.runs} runs of {seconds:.2f} s: {dict(killed.hits)}")
    assert killed.hits.total() == kills
    if kills > 100:
        assert killed.hits["in a save"] >= 3 and killed.runs >= 10


def saved(value: float) -> Snapshot:
    tensors = {name: {"w": torch.full((30,), value)} for name in ("model", "ema")}
    return Snapshot(tensors=tensors, values={"update": value})


@pytest.mark.parametrize("keep", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path, keep: int) -> None:
    """Of the update before or of its own, and never none, also where one alone is kept."""
    last = keep + 1  # the first save that deletes one
    for point in count(1):
        run, done = tmp_path / f"run-{point}", tmp_path / f"done-{point}"

        def saves(point: int = point, run: Path = run, done: Path = done) -> None:
            KillAt(point).arm()
            for update in range(1, last + 1):
                save_checkpoint(run, saved(update), update=update, keep=keep)
                os.close(os.open(f"{done}-{update}", os.O_CREAT))

        run.mkdir()
        code = forked(saves, output=tmp_path / "output.txt")
        if code == 0:
            break
        assert code == SIGKILLED, (tmp_path / "output.txt").read_text()
        finished = max((u for u in range(1, last + 1) if Path(f"{done}-{u}").exists()), default=0)
        newest, _ = newest_usable(run)
        update = update_of(newest) if newest else 0
        assert finished <= update <= finished + 1, point
        if newest:
            loaded = load_checkpoint(newest)
            assert loaded.values["update"] == update
            assert all(
                torch.equal(t["w"], torch.full((30,), update)) for t in loaded.tensors.values()
            )
        sweep_temporary(run)
        assert not half_written(run)
        for missing in range(update + 1, last + 1):
            save_checkpoint(run, saved(missing), update=missing, keep=keep)
        assert [update_of(path) for path in checkpoints(run)][-keep:] == list(range(2, last + 1))
        assert newest_usable(run) == (run / f"checkpoint-{last}", [])
    assert point > 20 * last


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("keep", [1, 2])
def test_a_training_killed_at_every_point_of_a_save_ends_as_if_it_had_not_been(
    tmp_path: Path, keep: int
) -> None:
    """One run, killed at each point from the last to the first; every launch goes on from the
    checkpoint that the one before left."""
    options: dict[str, Any] = {
        **OPTIONS,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": keep,
        "max_train_steps": 24,
        "validation_steps": 24,
    }
    straight, run, output = tmp_path / "straight", tmp_path / "run", tmp_path / "output.txt"
    straight_run(straight, **options)
    kept = 0
    for point in range(points_of_a_save(tmp_path, options) + 4, 0, -1):

        def killed(point: int = point) -> None:
            kill = KillAt(point)
            save = loop.save_checkpoint

            def saving(*args: Any, **kwargs: Any) -> Path:
                kill.arm()
                try:
                    return save(*args, **kwargs)
                finally:
                    kill.disarm()

            loop.save_checkpoint = saving
            train(small_config(run, **options))

        assert forked(killed, output=output) == SIGKILLED, output.read_text()
        assert len(half_written(run)) <= 1  # those of earlier launches are swept
        newest, _ = newest_usable(run)
        assert newest is not None and update_of(newest) >= kept, point
        kept = update_of(newest)
    assert kept < 24
    code = forked(lambda: train(small_config(run, **options)), output=output)
    assert code == 0, output.read_text()
    assert_same(straight, run, update=24)


def points_of_a_save(tmp_path: Path, options: dict[str, Any]) -> int:
    """As many as the second save of a run has."""
    counted = tmp_path / "counted"

    def counting() -> None:
        save, number = loop.save_checkpoint, iter(count(1))

        def saving(*args: Any, **kwargs: Any) -> Path:
            kill = KillAt(0)
            kill.arm()
            path = save(*args, **kwargs)
            kill.disarm()
            counted.with_name(f"points-{next(number)}").write_text(str(kill.passed))
            return path

        loop.save_checkpoint = saving
        train(small_config(counted, **options | {"max_train_steps": 2}))

    assert forked(counting, output=tmp_path / "output.txt") == 0
    return int((tmp_path / "points-2").read_text())
