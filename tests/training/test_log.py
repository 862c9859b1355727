"""What a run tells: rows, pictures and trackers, at every step that asks for them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.data import EvalTransform, SamplePhotos
from latentvae.errors import UserError
from latentvae.losses.objective import Objective
from latentvae.models.kl import KLTrainingWrapper, build_autoencoder_kl
from latentvae.training.loop import train
from latentvae.training.update import backward_model
from tests.training.small import small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine updates over epochs of three batches: a logged step falls on odd and even epochs, and
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
    assert [row["update"] for row in rows(folder, "validation/psnr")] == [4, 8, 9]
    pictures = sorted(path.name for path in (folder / "samples").iterdir())
    assert pictures == ["update-000004.png", "update-000008.png", "update-000009.png"]
    assert {path.name for path in folder.glob("checkpoint-*")} == {
        f"checkpoint-{update}" for update in (3, 6, 9)
    }


def test_images_are_counted_and_every_row_has_the_critic_once_it_runs(folder: Path) -> None:
    found = rows(folder, "loss/rec")
    assert [row["images"] for row in found] == [8 * row["update"] for row in found]
    assert ["critic/loss" in row for row in found] == [False, True, True, True, True]
    measured = rows(folder, "validation/psnr")[-1]
    assert {"validation/ssim", "validation/lpips"} <= measured.keys()
    assert measured["validation/images"] == len(SamplePhotos("validation"))


def test_the_grid_shows_the_validation_images_unaugmented(folder: Path) -> None:
    grid = np.asarray(Image.open(folder / "samples" / "update-000009.png"))
    photos, transform = SamplePhotos("validation"), EvalTransform(32, interpolation="bilinear")
    assert grid.shape == (3 * 32, len(photos) * 32, 3)
    for i in range(len(photos)):
        pixels = (transform(photos.read(i)).permute(1, 2, 0) + 1) * 127.5
        shown = grid[:32, 32 * i : 32 * (i + 1)]
        assert np.array_equal(shown, pixels.round().byte().numpy())
    originals, recons = grid[:32].astype(float), grid[32:64].astype(float)
    expected = np.clip(127.5 + 4 / 2 * (recons - originals), 0, 255)
    assert np.abs(grid[64:] - expected).max() <= 2  # each picture is rounded for itself


def test_tensorboard_gets_every_number_of_the_log(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "latentvae"))
    events.Reload()
    for key in ("loss/rec", "optimizer/learning_rate", "validation/psnr", "critic/loss"):
        logged = [(row["update"], row[key]) for row in rows(folder, key)]
        seen = [(event.step, event.value) for event in events.Scalars(key)]
        assert seen == [(step, pytest.approx(value)) for step, value in logged], key


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
        images, out, objective=objective, last_layer=wrapper.last_layer, adversary=None
    )
    torch.testing.assert_close(logged["loss/rec"], (out.recon.detach() - images).abs().mean())
    assert logged["loss/lpips"].item() == 0.5
