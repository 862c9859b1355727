"""A run that ends anywhere and starts again equals one that never ended: every tensor, every logged
number."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentvae.engine.checkpoint_content import restore
from latentvae.engine.checkpoint_files import checkpoints, load_checkpoint
from latentvae.engine.loop import Stopped, _Loop
from latentvae.engine.resume import check_same_config
from latentvae.engine.updates import Updates
from latentvae.errors import UserError
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.task import AutoencoderTask
from tests.tasks.autoencoder.small import built, small_config


class Killed(BaseException):
    """Stands in for SIGKILL: nothing may catch it."""


def kill_in_update(monkeypatch: pytest.MonkeyPatch, update: int, *, micro_step: int = 0) -> None:
    """End the process's work inside update ``update`` (from 1), before its micro-step
    ``micro_step``."""
    original, calls = Updates.micro_step, {"now": -1, "micro": 0}

    def killing(self: Updates, *args: Any) -> Any:
        number = self.progress.update + 1
        calls["micro"] = calls["micro"] + 1 if number == calls["now"] else 0
        calls["now"] = number
        if (number, calls["micro"]) == (update, micro_step):
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(Updates, "micro_step", killing)


def run_to_the_end(folder: Path, **changes: Any) -> Path:
    return train(small_config(folder, **changes))


def killed_and_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, update: int, micro_step: int, **changes: Any
) -> Path:
    with monkeypatch.context() as patch:
        kill_in_update(patch, update, micro_step=micro_step)
        with pytest.raises(Killed):
            run_to_the_end(folder, **changes)
    return run_to_the_end(folder, **changes)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}/{name}": value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def rows(folder: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")} for row in read
    ]


def assert_same_run(straight: Path, resumed: Path) -> None:
    for part in ("export", "checkpoint-6"):
        left, right = tensors(straight / part), tensors(resumed / part)
        assert left.keys() == right.keys() and left
        for name in left:
            assert torch.equal(left[name], right[name]), name
    assert rows(straight) == rows(resumed)
    states = [
        json.loads((run / "checkpoint-6" / "state.json").read_text()) for run in (straight, resumed)
    ]
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run_to_the_end(folder)
    return folder


# After the save of update 2: at the next update's start, inside its accumulation, at the
# discriminator's start, past an epoch's edge.
@pytest.mark.parametrize(
    ("update", "micro_step"),
    [
        (3, 0),
        (6, 1),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int, micro_step: int
) -> None:
    resumed = tmp_path / "resumed"
    killed_and_resumed(resumed, monkeypatch, update=update, micro_step=micro_step)
    assert_same_run(straight, resumed)


@pytest.mark.slow
def test_with_workers_reading_the_images(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = tmp_path / "resumed"
    killed_and_resumed(resumed, monkeypatch, update=5, micro_step=1, dataloader_num_workers=2)
    assert_same_run(straight, resumed)


@pytest.mark.slow
def test_with_gradient_checkpointing(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointed, resumed = tmp_path / "checkpointed", tmp_path / "resumed"
    run_to_the_end(checkpointed, gradient_checkpointing=True)
    killed_and_resumed(resumed, monkeypatch, update=4, micro_step=0, gradient_checkpointing=True)
    assert_same_run(checkpointed, resumed)
    for name, value in tensors(straight / "export").items():
        torch.testing.assert_close(
            tensors(checkpointed / "export")[name], value, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    "signal_name", ["SIGTERM", "SIGINT", pytest.param("SIGUSR1", marks=pytest.mark.slow)]
)
def test_a_signal_finishes_the_update_and_saves(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_name: str
) -> None:
    import os
    import signal

    number = getattr(signal, signal_name)
    original = Updates.micro_step

    def signalling(self: Updates, *args: Any) -> Any:
        if self.progress.micro_step == 5:  # in the middle of update 3
            os.kill(os.getpid(), number)
        return original(self, *args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Updates, "micro_step", signalling)
        with pytest.raises(Stopped, match="checkpoint-3") as stopped:
            run_to_the_end(tmp_path)
    assert stopped.value.signal == number and signal.getsignal(number) is before
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    run_to_the_end(tmp_path)
    assert_same_run(straight, tmp_path)


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        kill_in_update(patch, 6)
        with pytest.raises(Killed):
            run_to_the_end(tmp_path)
    damaged = tmp_path / "checkpoint-4" / "discriminator_optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    run_to_the_end(tmp_path)
    assert "checkpoint-4 is skipped: discriminator_optimizer.safetensors" in capsys.readouterr().out
    assert_same_run(straight, tmp_path)


def test_a_finished_run_says_so_and_changes_nothing(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in straight.rglob("*")
        if path.is_file() and path.name != "config.yaml"
    }
    assert run_to_the_end(straight) == straight / "export"
    assert "has made all its 6 updates" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_finished_run_is_exported_again_with_another_profile(
    straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    assert run_to_the_end(run, export_profile="sdxl") == run / "export"
    config = json.loads((run / "export" / "config.json").read_text())
    assert len(config["latents_mean"]) == 4 and config["scaling_factor"] == 1.0
    made = (run / "export" / "config.json").stat().st_mtime_ns
    run_to_the_end(run, export_profile="sdxl")
    assert (run / "export" / "config.json").stat().st_mtime_ns == made


def test_more_updates_go_on_from_the_end(straight: Path, tmp_path: Path) -> None:
    longer = tmp_path / "longer"
    shutil.copytree(straight, longer)
    run_to_the_end(longer, max_train_steps=7)
    assert rows(longer)[-1]["update"] == 7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"learning_rate": 5e-4, "train_batch_size": 2},
            "learning_rate (0.001 then, 0.0005 now), train_batch_size (4 then, 2 now)",
        ),
        ({"resolution": 64}, "resolution (32 then, 64 now)"),
        (
            {"resume_from_checkpoint": "checkpoint-5"},
            "which has checkpoint-2, checkpoint-4, checkpoint-6; did you mean",
        ),
        ({"resume_from_checkpoint": "/elsewhere/checkpoint-4"}, "is not a checkpoint of"),
    ],
)
def test_what_would_change_the_result_is_refused(
    straight: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as error:
        run_to_the_end(straight, **changes)
    assert said in str(error.value)


def test_a_refused_resume_says_how_to_train_the_model_further(tmp_path: Path) -> None:
    run = tmp_path / "run"
    then = small_config(run)
    (run / "export").mkdir(parents=True)
    for changes in ({"learning_rate": 5e-4}, {"resolution": 64}):
        with pytest.raises(UserError) as error:
            check_same_config(small_config(run, **changes), then)
        route = f"--pretrained_model_name_or_path {run}/export --discriminator_from {run}."
        assert str(error.value).endswith(route)
    (run / "export").rmdir()
    with pytest.raises(UserError, match=f"`latentvae export {run} --out {run}/export`, then --pre"):
        check_same_config(small_config(run, seed=1), then)
    with pytest.raises(UserError) as error:
        check_same_config(small_config(run, layers_per_block=2), then)
    assert str(error.value).endswith("to delete the run and start from scratch.")


def test_other_images_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 90, 10)).save(images / f"{i}.png")
    options = {
        "train_data_dir": str(images),
        "validation_data_dir": "samples",
        "max_train_steps": 2,
        "validation_steps": 2,
    }
    run_to_the_end(tmp_path / "run", **options)
    (images / "3.png").unlink()
    with pytest.raises(UserError, match="images: 6 then, 5 now"):
        run_to_the_end(tmp_path / "run", **(options | {"max_train_steps": 3}))


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_to_the_end(run, max_train_steps=1)
    (run / "notes.txt").write_text("keep")
    run_to_the_end(run, max_train_steps=1, seed=1, overwrite_output_dir=True)
    assert (run / "notes.txt").read_text() == "keep" and len(rows(run)) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"overwrite_output_dir": True, "resume_from_checkpoint": "checkpoint-2"},
            "resume_from_checkpoint 'checkpoint-2' resumes a run that overwrite_output_dir",
        ),
        ({"overwrite_output_dir": True, "lpips_weights": "nowhere.pth"}, "LPIPS weights must be a"),
        ({"lpips_weights": "nowhere.pth", "export_profile": "sdxl"}, "LPIPS weights must be a"),
        (
            {"train_data_dir": "{photos}", "resume_from_checkpoint": "checkpoint-2"},
            "frozen networks are not the same as at the start of the run",
        ),
        (
            {"overwrite_output_dir": True, "validation_data_dir": "{bad}"},
            "none of the 1 validation images can be read",
        ),
        (
            {"resume_from_checkpoint": "checkpoint-2", "validation_data_dir": "{bad}"},
            "none of the 1 validation images can be read",
        ),
    ],
)
def test_what_is_refused_has_touched_nothing(
    straight: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    run, photos = tmp_path / "run", tmp_path / "photos"
    shutil.copytree(straight, run)
    photos.mkdir()
    for i in range(20):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(photos / f"{i}.png")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "page.jpg").write_bytes(b"<html>")
    folders = {"{photos}": str(photos), "{bad}": str(bad)}
    changes = {name: folders.get(value, value) for name, value in changes.items()}
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=said):
        run_to_the_end(run, **changes)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_overwriting_that_is_killed_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_to_the_end(tmp_path / "run", max_train_steps=2, checkpointing_steps=1)
    delete = shutil.rmtree

    def killed(path: Path) -> None:
        delete(path)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("latentvae.engine.resume.shutil.rmtree", killed)
        with pytest.raises(Killed):
            run_to_the_end(tmp_path / "run", max_train_steps=1, overwrite_output_dir=True)
    run_to_the_end(tmp_path / "run", max_train_steps=1, overwrite_output_dir=True)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


@pytest.mark.parametrize("config", [None, "name: my photos", "a: b: c"])
def test_overwriting_refuses_a_folder_that_is_no_run(tmp_path: Path, config: str | None) -> None:
    (tmp_path / "dear.txt").write_text("keep")
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=r"is not (a run|the configuration of a run|valid YAML)"):
        run_to_the_end(tmp_path, overwrite_output_dir=True)
    assert (tmp_path / "dear.txt").read_text() == "keep"


def kill(folder: Path, monkeypatch: pytest.MonkeyPatch, *, update: int, **changes: Any) -> None:
    with monkeypatch.context() as patch:
        kill_in_update(patch, update)
        with pytest.raises(Killed):
            run_to_the_end(folder, **changes)


def test_a_damaged_newer_checkpoint_never_costs_the_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(tmp_path, monkeypatch, update=5, checkpoints_total_limit=2)
    (tmp_path / "checkpoint-4" / "state.json").write_text("{}")
    kill(tmp_path, monkeypatch, update=4, checkpoints_total_limit=1)
    kill(tmp_path, monkeypatch, update=6, checkpoints_total_limit=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]
    assert (tmp_path / "aside-checkpoint-4").is_dir()
    run_to_the_end(tmp_path, checkpoints_total_limit=1)


def test_going_on_from_an_older_checkpoint_leaves_the_newer_branch(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_to_the_end(tmp_path, checkpoints_total_limit=3)
    kill(
        tmp_path,
        monkeypatch,
        update=5,
        checkpoints_total_limit=1,
        resume_from_checkpoint="checkpoint-2",
    )
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]
    run_to_the_end(tmp_path)
    assert_same_run(straight, tmp_path)


def test_a_longer_run_never_hands_out_the_old_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_to_the_end(tmp_path, max_train_steps=2)
    old = tensors(tmp_path / "export")
    with monkeypatch.context() as patch:

        def killed(*_: Any, **__: Any) -> None:
            raise Killed

        patch.setattr("latentvae.engine.loop.export", killed)
        with pytest.raises(Killed):
            run_to_the_end(tmp_path, max_train_steps=4)
    new = tensors(run_to_the_end(tmp_path, max_train_steps=4))
    assert any(not torch.equal(new[name], old[name]) for name in new)


def test_a_running_discriminator_goes_on_in_a_longer_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []
    original = AutoencoderTask.micro_step

    def noting(self: AutoencoderTask, *args: Any) -> Any:
        starts.append(self.progress.discriminator_start)
        return original(self, *args)

    monkeypatch.setattr(AutoencoderTask, "micro_step", noting)
    run_to_the_end(tmp_path, max_train_steps=4, disc_start=0.5)
    run_to_the_end(tmp_path, max_train_steps=8, disc_start=0.5)
    assert starts == [2] * 16


def test_a_validation_that_a_signal_came_before_is_made_up_for(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        original = _Loop._validate

        def killed(loop: _Loop) -> None:
            if loop.training.progress.update:
                raise Killed
            original(loop)

        patch.setattr(_Loop, "_validate", killed)
        with pytest.raises(Killed):
            run_to_the_end(tmp_path, checkpointing_steps=3)
    run_to_the_end(tmp_path, checkpointing_steps=3)
    assert rows(straight) == rows(tmp_path)


def test_other_images_are_told_by_number_and_names(straight: Path) -> None:
    training = built(small_config(straight), straight)
    snapshot = load_checkpoint(straight / "checkpoint-4")
    restore(training, snapshot)
    assert training.progress.update == 4
    snapshot.values["identity"] = {"images": 21, "names_sha256": "0"}
    with pytest.raises(UserError, match=r"\(21 with other names\)"):
        restore(training, snapshot)
    snapshot.values["identity"] = {"images": 16, "names_sha256": "0"}
    with pytest.raises(UserError, match=r"\(images: 16 then, 21 now\)"):
        restore(training, snapshot)


def test_another_precision_is_refused(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = json.loads((straight / "checkpoint-6" / "state.json").read_text())
    assert state["mixed_precision"] == "no"
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "bf16")
    with pytest.raises(UserError, match="started in mixed precision no and cannot resume in bf16"):
        run_to_the_end(straight)


def test_a_changed_batch_is_welcome_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(tmp_path, monkeypatch, update=1)
    run_to_the_end(tmp_path, train_batch_size=2, max_train_steps=1)


def test_unreadable_validation_images_are_found_before_the_first_update(tmp_path: Path) -> None:
    from PIL import Image

    images = tmp_path / "validation"
    images.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (images / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 3 validation images can be read"):
        run_to_the_end(tmp_path / "run", validation_data_dir=str(images))
    assert not (tmp_path / "run" / "log.jsonl").exists()
    Image.new("RGB", (40, 40), (200, 90, 10)).save(images / "d.png")
    run_to_the_end(tmp_path / "run", validation_data_dir=str(images), max_train_steps=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"resolution": 8, "disc_scale": 0.0, "perceptual_scale": 0.0},
            "LPIPS-alex needs at least 31",
        ),
        ({"disc_layers": 4}, "the patch discriminator needs at least 48 px"),
    ],
)
def test_a_resolution_too_small_for_a_part_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run_to_the_end(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
