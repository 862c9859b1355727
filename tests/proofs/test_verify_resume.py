"""`verify-resume`: what it compares, each shown by changing that alone; and the whole command, on a
resume that works and on one that is broken on purpose."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from latentvae.config.presets import preset_names
from latentvae.data import IndexSampler, SamplePhotos
from latentvae.engine.checkpoint_files import (
    Snapshot,
    load_checkpoint,
    newest_usable,
    save_checkpoint,
    update_of,
)
from latentvae.engine.resume import read_config, write_config
from latentvae.errors import UserError
from latentvae.proofs.verify_resume import job, verify_resume
from latentvae.proofs.verify_resume.compare import LEAST, compare, distance, read_results
from latentvae.proofs.verify_resume.job import Job, shortened
from latentvae.proofs.verify_resume.kills import draw_kills
from latentvae.proofs.verify_resume.launch import Hung, Launch, Pace
from latentvae.proofs.verify_resume.order import check_order
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.config import TrainConfig, load_preset
from latentvae.tasks.autoencoder.task import AutoencoderTask
from tests.data.conftest import tar
from tests.tasks.autoencoder.ranks import model
from tests.tasks.autoencoder.small import small_config

UPDATES = 3
OPTIONS: dict[str, Any] = {
    "max_train_steps": UPDATES,
    "checkpointing_steps": 1,
    "validation_steps": UPDATES,
    "log_steps": 1,
    "disc_start": 0,
    "disc_lecam_weight": 0.1,
    "learn_logvar": False,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's run: it has every part that is compared."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train(small_config(folder, model("average"), **OPTIONS))
    return folder


def rewritten(run: Path, change: Callable[[Snapshot], None]) -> None:
    """Change the last checkpoint, whose manifest then fits."""
    folder, _ = newest_usable(run)
    assert folder is not None
    snapshot = load_checkpoint(folder)
    change(snapshot)
    shutil.rmtree(folder)
    save_checkpoint(run, snapshot, update=update_of(folder), keep=9)


def one_tensor(file: str, start: str = "") -> Callable[[Path], None]:
    """Change the last bit of one number."""

    def change(snapshot: Snapshot) -> None:
        tensors = snapshot.tensors[file]
        name = next(n for n, t in tensors.items() if n.startswith(start) and t.is_floating_point())
        flat = tensors[name].reshape(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))

    return lambda run: rewritten(run, change)


def one_row(run: Path) -> None:
    lines = (run / "log.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    row["loss/rec"] *= 1 + 1e-12
    (run / "log.jsonl").write_text("\n".join([lines[0], json.dumps(row), *lines[2:]]) + "\n")


def one_scale(run: Path) -> None:
    config = json.loads((run / "export" / "config.json").read_text())
    config["scaling_factor"] *= 1.5
    (run / "export" / "config.json").write_text(json.dumps(config))


CHANGES: dict[str, Callable[[Path], None]] = {
    "model": one_tensor("model", "net.encoder"),
    "codebook": one_tensor("model", "net.quantize.embed_sum"),
    "model's optimizer": one_tensor("model_optimizer"),
    "model's average": one_tensor("model_average"),
    "discriminator": one_tensor("discriminator"),
    "discriminator's optimizer": one_tensor("discriminator_optimizer"),
    "lecam": one_tensor("lecam"),
    "export": one_scale,
    "data position, randomness, counters": lambda run: rewritten(
        run, lambda snapshot: snapshot.values["progress"].update(micro_step=5)
    ),
    "log rows": one_row,
}


def failed(straight: Path, resumed: Path) -> list[str]:
    checks = compare(
        *(
            read_results(run, update=UPDATES, parts=AutoencoderTask.parts)
            for run in (straight, resumed)
        )
    )
    assert {check.name for check in checks} == set(CHANGES)
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("name", [None, *CHANGES])
def test_each_part_is_compared_to_the_bit(straight: Path, tmp_path: Path, name: str | None) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    if name is not None:
        CHANGES[name](resumed)
    assert failed(straight, resumed) == ([] if name is None else [name])


def test_a_part_that_only_one_run_has_is_a_difference(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "resumed")
    rewritten(tmp_path / "resumed", lambda snapshot: snapshot.tensors["lecam"].clear())
    assert failed(straight, tmp_path / "resumed") == ["lecam"]


def test_distance_is_relative_to_the_norm() -> None:
    left = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    right = {"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([[4.4]])}
    assert distance(left, left) == 0.0
    assert distance(left, right) == pytest.approx(0.5 / 5.0)
    assert distance(left, {"a": left["a"]}) == torch.inf


def test_where_bits_are_not_promised_two_unbroken_runs_say_how_near(
    straight: Path, tmp_path: Path
) -> None:
    """Rounding passes; an average that a resume forgot does not."""

    def noisy(folder: Path, seed: int, *, forget: bool = False) -> Path:
        def change(snapshot: Snapshot) -> None:
            draw = torch.Generator().manual_seed(seed)
            for tensors in snapshot.tensors.values():
                for value in tensors.values():
                    if value.is_floating_point():
                        value *= 1 + 1e-6 * torch.randn(value.shape, generator=draw)
            if forget:
                earlier = load_checkpoint(straight / "checkpoint-1").tensors
                snapshot.tensors["model_average"] = earlier["model_average"]

        shutil.copytree(straight, folder)
        rewritten(folder, change)
        return folder

    again, near, far = (
        read_results(
            noisy(tmp_path / name, seed, forget=name == "far"),
            update=UPDATES,
            parts=AutoencoderTask.parts,
        )
        for seed, name in enumerate(("again", "near", "far"))
    )
    left = read_results(straight, update=UPDATES, parts=AutoencoderTask.parts)
    assert all(check.passed for check in compare(left, near, again=again))
    wrong = [check for check in compare(left, far, again=again) if not check.passed]
    assert [check.name for check in wrong] == ["model's average"] and wrong[0].value > LEAST


def opened(config: Any) -> AutoencoderTask:
    task = AutoencoderTask(config)
    task.open()
    return task


def test_the_order_of_the_images_from_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path)
    task = opened(config)
    for bucketed in (0, 2):
        config.data.aspect_ratio_buckets = bucketed
        config.run.train_batch_size = 2
        check = check_order(task, processes=2, starts=[0, 5])
        assert check is not None and check.passed and check.value == "equal from micro-steps 0, 5"
    config.data.aspect_ratio_buckets = 0
    original = IndexSampler.__init__

    def forgetful(self: IndexSampler, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs | {"start_step": 0})

    monkeypatch.setattr(IndexSampler, "__init__", forgetful)
    check = check_order(task, processes=1, starts=[0, 5])
    assert check is not None and not check.passed and "micro-step 5" in check.value


def test_the_order_is_of_the_images_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, crops_per_image=2)  # batches of 4
    original, read = IndexSampler.__init__, set()

    def noting(self: IndexSampler, count: int, batch_size: int, **kwargs: Any) -> None:
        read.add(batch_size)
        original(self, count, batch_size, **kwargs)

    monkeypatch.setattr(IndexSampler, "__init__", noting)
    check = check_order(opened(config), processes=1, starts=[0, 5])
    assert check is not None and check.passed and read == {2}


def test_kills_are_spread_over_the_run_and_come_from_the_seed() -> None:
    kills = draw_kills(200, updates=12, save_every=3, seed=3)
    assert kills == draw_kills(200, updates=12, save_every=3, seed=3) == sorted(kills)
    assert kills != draw_kills(200, updates=12, save_every=3, seed=4)
    saves = [kill.update for kill in kills if kill.save]
    assert len(saves) == 100 and set(saves) == {3, 6, 9, 12}
    assert {kill.update for kill in kills if not kill.save} == set(range(1, 14))


@pytest.mark.parametrize("preset", preset_names(TrainConfig))
def test_the_short_run_is_the_users_with_everything_in_it(preset: str, tmp_path: Path) -> None:
    config = load_preset(preset)
    short = shortened(AutoencoderTask, config, updates=12, processes=1)
    write_config(short, tmp_path / "config.yaml")
    assert (
        read_config(tmp_path / "config.yaml", TrainConfig) == short
    )  # its ranges are those of the schema
    assert (short.discriminator_start, short.run.max_train_steps) == (3, 12)
    assert short.run.gradient_accumulation_steps >= 2 and short.run.checkpointing_steps == 3
    assert short.model == config.model and short.objective == config.objective
    assert config.run.max_train_steps > 12  # the user's own is untouched


TRAINER = """
import json, pathlib, subprocess, sys, time
run = pathlib.Path(sys.argv[1]); run.mkdir(exist_ok=True)
print("starting", flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
log = run / "log.jsonl.tmp"; log.write_text(""); log.replace(run / "log.jsonl")
for update in range(1, int(sys.argv[2])):
    time.sleep(0.02)
    with open(run / "log.jsonl", "a") as file: file.write(json.dumps({"update": update}) + "\\n")
if sys.argv[3] == "raise": raise SystemExit("error: the disk is full")
time.sleep(600)
"""


def trainer(folder: Path, *, updates: int = 3, end: str = "hang", seconds: float = 60.0) -> Launch:
    """In the place of the launcher, with a child that has a session of its own."""
    command = [sys.executable, "-c", TRAINER, str(folder), str(updates), end]
    output = folder.with_suffix(".txt")
    return Launch(command, folder=folder, output=output, on_cpu=True, seconds=seconds)


def test_a_launch_is_watched_and_killed_with_all_its_children(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"update": 99}\n')
    with trainer(tmp_path / "run") as launch:
        assert launch.updates() is None  # the log is an earlier launch's
        assert launch.wait_for(lambda: launch.updates() == 2)
        family = launch.family()
        assert len(family) == 2
        launch.kill()
    assert launch.process.returncode == -9 and not launch.running
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)


def test_a_launch_that_hangs_is_killed_and_told(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", seconds=1.0) as launch, pytest.raises(Hung):
        launch.watch(total=2, title="x")
    assert launch.process.returncode == -9


def job_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, end: str, seconds: float) -> Job:
    def command(_: Any, __: Path, folder: Path, **___: Any) -> list[str]:
        return [sys.executable, "-c", TRAINER, str(folder), "3", end]

    monkeypatch.setattr(job, "training_command", command)
    return Job(
        task=AutoencoderTask(small_config(tmp_path)), work=tmp_path, processes=1, seconds=seconds
    )


@pytest.mark.parametrize(
    ("end", "said"),
    [("raise", "ended with code 1.*: error: the disk is full"), ("hang", "did not end within 1 s")],
)
def test_a_run_that_ends_before_any_kill_is_a_wrong_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, said: str
) -> None:
    seconds = 1.0 if end == "hang" else 60.0
    with pytest.raises(UserError, match=said):
        job_of(tmp_path, monkeypatch, end=end, seconds=seconds).straight("run", title="x")


@pytest.mark.parametrize("end", ["raise", "hang"])
def test_a_launch_that_fails_or_hangs_after_a_kill_is_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    seconds = 1.5 if end == "hang" else 60.0
    verified = job_of(tmp_path, monkeypatch, end=end, seconds=seconds)
    kills = draw_kills(1, updates=2, save_every=1, seed=0)
    found = {check.name: check for check in verified.killed(kills, Pace(updates=[0.02]))}
    assert found["kills"].passed and not found["resumes"].passed
    said = "launch 2 ended with code 1: error: the disk is full"
    assert found["resumes"].value == (
        said if end == "raise" else "launch 2 did not end within 1.5 s"
    )


def test_streams_are_refused(tmp_path: Path, own_caches: Path) -> None:
    folder = photos(tmp_path / "photos")
    config = small_config(tmp_path, train_data_dir=None, dataset_name=str(folder), streaming=True)
    with pytest.raises(UserError, match="--streaming resumes only approximately"):
        verify_resume(AutoencoderTask, config)


def photos(folder: Path) -> Path:
    """The sample photos, small."""
    folder.mkdir()
    images = SamplePhotos("train")
    for i in range(len(images)):
        image = images.read(i)
        assert isinstance(image, Image.Image)
        image.resize((72, 60)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def job_options(tmp_path: Path) -> dict[str, Any]:
    return {"kills": 2, "work_dir": tmp_path / "work", "json": tmp_path / "checks.json"}


def passed(tmp_path: Path) -> dict[str, bool]:
    checks = json.loads((tmp_path / "checks.json").read_text())["checks"]
    return {check["name"]: check["passed"] for check in checks}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "processes", "kind"), [("folder", 1, "average"), ("tar", 2, None)]
)
def test_the_command_on_a_resume_that_works(
    tmp_path: Path,
    own_caches: Path,
    job_options: dict[str, Any],
    form: str,
    processes: int,
    kind: str | None,
) -> None:
    """In mid-accumulation, from a folder and from tar shards, with one and with two processes."""
    data = folder = photos(tmp_path / "photos")
    if form == "tar":
        data = tmp_path / "shards"
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        for shard in range(2):
            tar(data / f"{shard}.tar", dict(list(files.items())[shard::2]))

    # run the command
    config = small_config(
        tmp_path / "unused",
        model(kind),
        train_data_dir=str(data),
        validation_share=0.2,
        train_batch_size=4 // processes,
        mixed_precision="bf16" if processes == 1 else None,
    )
    assert (
        verify_resume(AutoencoderTask, config, updates=8, processes=processes, **job_options) == 0
    )

    # check its results
    found = passed(tmp_path)
    assert (
        all(found.values())
        and {"model", "model's average", "discriminator", "data order"} <= found.keys()
    )
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
def test_the_command_on_a_resume_that_forgets_the_average(
    tmp_path: Path, job_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Launch.kill

    def kill(self: Launch, known: Any = None) -> None:
        original(self, known)
        checkpoint, _ = newest_usable(self.folder)
        if checkpoint is not None:
            rewritten(self.folder, lambda snapshot: forget(snapshot.tensors["model_average"]))

    def forget(average: dict[str, torch.Tensor]) -> None:
        for value in average.values():
            value.zero_()

    monkeypatch.setattr(Launch, "kill", kill)
    assert verify_resume(AutoencoderTask, small_config(tmp_path), updates=4, **job_options) == 1
    wrong = {name for name, holds in passed(tmp_path).items() if not holds}
    assert wrong == {
        "model's average",
        "export",
        "log rows",
    }  # the average is validated and exported
