"""What a run tells: rows, pictures and trackers, at every step that asks for them."""

import importlib.util
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from PIL import Image

from latentvae.data import EvalTransform, SamplePhotos
from latentvae.engine.log import RunLog
from latentvae.errors import UserError
from latentvae.losses.objective import Objective
from latentvae.models.conv.kl import build_autoencoder_kl
from latentvae.models.posterior import KLTrainingWrapper
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.backward import backward_model
from latentvae.tasks.autoencoder.validate import LABEL_WIDTH
from tests.tasks.autoencoder.small import small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine updates over epochs of five batches: a logged step falls on odd and even epochs, and
    into accumulation."""
    folder = tmp_path_factory.mktemp("log") / "run"
    train(
        small_config(
            folder,
            max_train_steps=9,
            log_steps=2,
            validation_steps=4,
            checkpointing_steps=3,
            report_to="tensorboard",
        )
    )
    return folder


def rows(folder: Path, key: str) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in read if key in row]


def test_rows_validations_and_checkpoints_come_at_every_step_and_at_the_end(folder: Path) -> None:
    assert [row["update"] for row in rows(folder, "loss/rec")] == [2, 4, 6, 8, 9]
    assert [row["update"] for row in rows(folder, "validation/psnr")] == [0, 4, 8, 9]
    pictures = sorted(path.name for path in (folder / "samples").iterdir())
    assert pictures == [f"update-00000{update}.png" for update in (0, 4, 8, 9)]
    assert {path.name for path in folder.glob("checkpoint-*")} == {
        f"checkpoint-{update}" for update in (3, 6, 9)
    }


def test_images_are_counted_and_every_row_has_the_discriminator_once_it_runs(folder: Path) -> None:
    found = rows(folder, "loss/rec")
    assert [row["images"] for row in found] == [8 * row["update"] for row in found]
    assert ["discriminator/loss" in row for row in found] == [False, True, True, True, True]
    measured = rows(folder, "validation/psnr")[-1]
    assert {"validation/ssim", "validation/lpips"} <= measured.keys()
    assert measured["validation/images"] == len(SamplePhotos("validation"))


def test_the_grid_shows_the_validation_images_unaugmented(folder: Path) -> None:
    picture = np.asarray(Image.open(folder / "samples" / "update-000009.png"))
    photos, transform = SamplePhotos("validation"), EvalTransform(32, interpolation="bilinear")
    labels, grid = picture[:, :LABEL_WIDTH], picture[::4, LABEL_WIDTH::4]  # 128 px for 32
    for row in range(3):
        assert (labels[128 * row : 128 * (row + 1)] < 128).any()  # its label
    assert grid.shape == (3 * 32, len(photos) * 32, 3)
    for i in range(len(photos)):
        pixels = (transform(photos.read(i)).permute(1, 2, 0) + 1) * 127.5
        shown = grid[:32, 32 * i : 32 * (i + 1)]
        assert np.array_equal(shown, pixels.round().byte().numpy())
    originals, recons = grid[:32].astype(float), grid[32:64].astype(float)
    expected = np.clip(127.5 + 4 / 2 * (recons - originals), 0, 255)
    assert np.abs(grid[64:] - expected).max() <= 2  # each picture is rounded for itself


def is_tracked(key: str) -> bool:
    """An export's row is for the log alone."""
    return key != "update" and not key.startswith("export/")


def test_tensorboard_gets_every_number_of_the_log(folder: Path) -> None:
    events = tensorboard_events(folder)
    logged = {key for row in rows(folder, "update") for key in row if is_tracked(key)}
    assert len(logged) > 20 and set(events.Tags()["scalars"]) == logged
    for key in logged:
        expected = [(row["update"], row[key]) for row in rows(folder, key)]
        seen = [(event.step, event.value) for event in events.Scalars(key)]
        assert seen == [(step, pytest.approx(value)) for step, value in expected], key


def test_tensorboard_gets_the_grids(folder: Path) -> None:
    shown = tensorboard_events(folder).Images("validation/samples")
    assert [event.step for event in shown] == [0, 4, 8, 9]
    for event in shown:
        grid = np.asarray(Image.open(folder / "samples" / f"update-{event.step:06d}.png"))
        seen = Image.open(io.BytesIO(event.encoded_image_string))
        assert np.array_equal(np.asarray(seen), grid)


def tensorboard_events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(
        str(folder / "logs" / "latentvae"), size_guidance={"images": 0, "scalars": 0}
    ).Reload()


@pytest.mark.slow
def test_wandb_gets_every_number_and_the_grids_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    folder = tmp_path / "run"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(small_config(folder, max_train_steps=4, report_to="wandb"))
    wandb.teardown()  # as at the end of a program: its own process has written all
    expected: dict[int, dict[str, float]] = {}
    for row in rows(folder, "update"):
        expected.setdefault(int(row["update"]), {}).update(row)
    (file,) = folder.glob("logs/wandb/offline-run-*/run-*.wandb")
    seen = {step: values for step, values in wandb_history(file)}
    assert seen.keys() == {0, 2, 3, 4} == expected.keys()
    for step, values in seen.items():
        own = ("_", "validation/samples")  # wandb's, such as a time, and the picture's parts
        numbers = {key: value for key, value in values.items() if not key.startswith(own)}
        wanted = {key: value for key, value in expected[step].items() if is_tracked(key)}
        assert numbers == pytest.approx(wanted)
        assert any("samples" in key for key in values) == (step != 2)
    for picture in file.parent.rglob("samples_*.png"):
        grid = folder / "samples" / f"update-{int(picture.name.split('_')[1]):06d}.png"
        assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(Image.open(grid)))


def wandb_history(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Steps and values of an offline run: LevelDB's log format around wandb's records,
    https://github.com/google/leveldb/blob/main/doc/log_format.md."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = file.read_bytes(), 7, b""
    while at < len(content):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<4xHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind not in (1, 4):  # whole, or the last of several
            continue
        record, parts = Record.FromString(parts), b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield (
                record.history.step.num,
                {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items},
            )


@pytest.mark.parametrize("broken", ["log", "log_images", "finish"])
def test_a_tracker_that_fails_stops_nothing_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    calls: list[str] = []

    def fail(self: TensorBoardTracker, *args: Any, **options: Any) -> None:
        calls.append(broken)
        raise OSError("No space left on device")

    folder = tmp_path / "run"
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(TensorBoardTracker, broken, fail)
    export = train(small_config(folder, max_train_steps=4, report_to="tensorboard"))
    assert (export / "config.json").is_file()
    assert [row["update"] for row in rows(folder, "loss/rec")] == [2, 4]
    assert [row["update"] for row in rows(folder, "validation/psnr")] == [0, 3, 4]
    assert len(calls) == {"log": 5, "log_images": 3, "finish": 1}[broken]
    said = capsys.readouterr()
    assert (said.out + said.err).count("No space left on device") == 1


def test_a_tracker_that_cannot_start_is_one_sentence_before_the_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As wandb without a login, which it asks for only in a terminal."""

    def fail(self: TensorBoardTracker) -> None:
        raise RuntimeError("No API key configured.\nMore lines")

    folder = tmp_path / "run"
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    with pytest.raises(UserError, match=r"cannot start.*No API key.*--report_to none") as refused:
        train(small_config(folder, report_to="tensorboard"))
    assert "\n" not in str(refused.value)
    assert not (folder / "log.jsonl").exists() and "closed" not in capsys.readouterr().out


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_an_error_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    find = importlib.util.find_spec
    hidden = ("tensorboard", "tensorboardX", "wandb")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in hidden else find(name, *a)
    )
    with pytest.raises(UserError, match=f"pip install {tracker}"):
        train(small_config(tmp_path / "run", report_to=tracker))
    assert not list(tmp_path.iterdir())


def test_rec_is_logged_without_lpips_and_lpips_without_its_weight() -> None:
    class Half(torch.nn.Module):
        def forward(self, images: torch.Tensor, recon: torch.Tensor) -> torch.Tensor:
            return 0.5 + 0.0 * recon.mean(dim=(1, 2, 3))

    net = build_autoencoder_kl(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    wrapper = KLTrainingWrapper(net)
    objective = Objective(rec_loss="l1", perceptual=Half(), perceptual_scale=3.0, kl_scale=1e-6)
    images = torch.rand(2, 3, 16, 16)
    out = wrapper(images)
    logged = backward_model(
        images,
        out,
        objective=objective,
        update=0,
        last_layer=wrapper.last_layer,
        adversary=None,
    )
    torch.testing.assert_close(logged["loss/rec"], (out.recon.detach() - images).abs().mean())
    assert logged["loss/lpips"].item() == 0.5


def test_a_terminal_keeps_the_rows_beside_a_bar_of_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    alone: Any = SimpleNamespace(is_main_process=True, trackers=[], log=lambda *_, **__: None)
    log = RunLog(tmp_path, alone, start=0, total=250_000, items_per_update=8, shown=["loss/rec"])
    log.step()
    log.row(1, {"loss/rec": 0.25})
    log.close()
    assert "update 1 of 250,000: rec 0.25, items/s " in capsys.readouterr().out
    drawn = terminal.getvalue().replace("\n", "\r").split("\r")
    assert any("training:" in line for line in drawn) and max(map(len, drawn)) <= 80
