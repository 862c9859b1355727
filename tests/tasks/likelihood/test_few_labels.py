"""A VAE with classes learns from few labels, and its export names and draws classes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from latentvae.cli.check_commands import run_of
from latentvae.cli.main import main
from latentvae.config.presets import load_preset
from latentvae.data.image_folder import ImageFolder
from latentvae.engine.log import read_rows
from latentvae.engine.loop import train
from latentvae.errors import UserError
from latentvae.models.dense.class_network import ClassVAE
from latentvae.models.likelihood_models import load_likelihood_net
from latentvae.tasks.likelihood.config import LikelihoodConfig
from latentvae.tasks.likelihood.few_labels import NO_LABEL, Classes, ClassLoss, some_labels
from latentvae.tasks.likelihood.measure import measure_folder
from latentvae.tasks.likelihood.task import LikelihoodTask
from tests.tasks.likelihood.small import CLASSES, small_likelihood, write_bars, write_classes

pytestmark = pytest.mark.usefixtures("own_accelerate")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("few") / "images")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE after 300 updates with 3 labels of each class."""
    folder = tmp_path_factory.mktemp("few") / "run"
    long = {"max_train_steps": 300, "checkpointing_steps": 300, "validation_steps": 300}
    changes = {"vae": CLASSES, "data": {"labels_per_class": 3}, **long}
    changes["objective"] = {"label_warmup_steps": 20}
    train(LikelihoodTask(small_likelihood(images, folder, **changes)))
    return folder


def test_it_learns_classes_and_images(run: Path) -> None:
    first, last = (row for row in read_rows(run / "log.jsonl") if "validation/nats" in row)
    assert last["validation/class_error"] <= 10.0
    assert last["validation/nats"] < first["validation/nats"] - 5
    rows = [row for row in read_rows(run / "log.jsonl") if "loss/total" in row]
    assert "loss/unlabelled_nats" not in rows[0]  # of the warm-up
    for row in rows[20:]:
        share = 6 / (64 - last["validation/images"])  # of the training images
        parts = 0.5 * row["loss/labels"] + share * row["loss/labelled_nats"]
        parts += (1 - share) * row["loss/unlabelled_nats"]
        assert row["loss/total"] == pytest.approx(parts, rel=1e-4)


def test_the_export_knows_its_classes(run: Path, images: Path) -> None:
    net, _ = load_likelihood_net(run)
    assert isinstance(net, ClassVAE) and net.config["class_names"] == ["left", "right"]
    found = measure_folder(run, str(images), samples=20)
    assert len(found["kl_per_group"]) == 2 and 0 < found["kl_per_group"][0] < 0.7
    assert found["nats_per_image"]["importance"] < found["nats_per_image"]["elbo"]
    assert "wrong classes, percent" in (run / "export" / "README.md").read_text()


def test_pictures_of_a_class_are_drawn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net: Any = load_likelihood_net(run)[0]
    draws = torch.Generator().manual_seed(0)
    asked = torch.tensor([0, 1] * 20)
    drawn = net.sample(40, generator=draws, classes=asked)
    assert (net.logits(drawn).argmax(-1) == asked).float().mean() > 0.8

    command = ["sample", str(run), "--num", "2", "--out"]
    main([*command, str(tmp_path / "name"), "--class", "right"])
    main([*command, str(tmp_path / "number"), "--class", "1"])
    one, other = ((tmp_path / n / "00000.png").read_bytes() for n in ("name", "number"))
    assert one == other
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "wrong"), "--class", "rigth"])
    said = capsys.readouterr().err
    assert "no class 'rigth'. The classes are left, right; did you mean 'right'?" in said


def test_some_labels_of_each_class_are_kept() -> None:
    classes = torch.tensor([0, 1, 0, 1, 0, 1, -1, 0])
    kept = some_labels(classes, ["a", "b"], per_class=2, seed=1)
    assert [(kept == k).sum() for k in (0, 1)] == [2, 2]
    assert (kept[kept != NO_LABEL] == classes[kept != NO_LABEL]).all()
    assert torch.equal(kept, some_labels(classes, ["a", "b"], per_class=2, seed=1))
    others = [some_labels(classes, ["a", "b"], per_class=2, seed=s) for s in range(2, 8)]
    assert any(not torch.equal(kept, other) for other in others)
    with pytest.raises(UserError, match="labels_per_class 4 is more than the 3 readable images"):
        some_labels(classes, ["a", "b"], per_class=4, seed=1)


def test_only_images_with_a_label_are_drawn() -> None:
    options = load_preset("m2_mnist", LikelihoodConfig).objective
    loss = ClassLoss(torch.tensor([-1, 0, -1, 1, -1, -1]), options, num_classes=2)
    batch = torch.tensor([0, 4])
    assert sorted(loss.draw(batch).tolist()) == [1, 3] and loss.share == pytest.approx(1 / 3)
    every = ClassLoss(torch.tensor([1, 0, 1]), options, num_classes=2)
    assert every.draw(batch) is batch
    with pytest.raises(UserError, match="none of the training images that can be read has a label"):
        ClassLoss(torch.tensor([-1, -1]), options, num_classes=2)


def write_folders(folder: Path, *names: str) -> ImageFolder:
    for name in names:
        write_bars(folder / name, count=2)
    return ImageFolder(folder)


def test_classes_of_another_folder_are_found_by_name(tmp_path: Path) -> None:
    """Train and validation folders have other numbers for the same class."""
    train = write_folders(tmp_path / "train", "cat", "dog", "unlabelled", "zebra")
    found = Classes(train, write_folders(tmp_path / "validation", "dog", "zebra"))
    assert found.names == ["cat", "dog", "zebra"]
    assert found.train.tolist() == [0, 0, 1, 1, -1, -1, 2, 2]
    assert found.validation.tolist() == [1, 1, 2, 2]
    without = write_bars(tmp_path / "plain", count=2)
    assert Classes(train, ImageFolder(without)).validation.tolist() == [-1, -1]
    with pytest.raises(UserError, match="have the class 'emu', which no training image has"):
        Classes(train, write_folders(tmp_path / "other", "dog", "emu"))


def test_all_labels_train_on_the_batch(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(images, folder)
    shutil.rmtree(folder / "unlabelled")
    long = {"max_train_steps": 60, "validation_steps": 60, "checkpointing_steps": 60}
    train(LikelihoodTask(small_likelihood(folder, tmp_path / "run", vae=CLASSES, **long)))
    rows = read_rows(tmp_path / "run" / "log.jsonl")
    assert all("loss/unlabelled_nats" not in row for row in rows)
    (error,) = [
        row["validation/class_error"]
        for row in rows
        if row.get("update") == 60 and "validation/nats" in row
    ]
    assert error <= 10.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"labels_per_class": 3}}, "labels_per_class 3 needs architecture 'classes'"),
        ({"vae": CLASSES, "objective": {"bound": "iwae"}}, "needs bound elbo"),
        (
            {"vae": CLASSES, "objective": {"bound": "dreg", "train_samples": 2}},
            "needs bound elbo and train_samples 1",
        ),
        ({"vae": CLASSES, "objective": {"free_nats": 1.0}}, "free_nats 1.0 has no effect"),
        ({"objective": {"label_scale": 1.0}}, "label_scale 1.0 has no effect with architecture"),
        ({"vae": CLASSES, "data": {"cache_images": False}}, "needs the images in memory"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(
    changes: dict[str, Any], said: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        small_likelihood(images, tmp_path / "run", **changes)


def test_sizes_are_given_on_the_command_line() -> None:
    flags = ["--train_data_dir", "x", "--latent_units", "7", "--hidden_channels", "30"]
    _, config = run_of("m2_mnist", flags, also=[])
    net: Any = config.vae.model_copy(update={"num_classes": 2}).build((1, 8, 8))
    assert net.latent_units == 7 and net.from_image.out_features == 30


def test_images_without_classes_are_refused(tmp_path: Path) -> None:
    bars = write_bars(tmp_path / "bars", count=12)
    with pytest.raises(UserError, match="needs training images with classes"):
        train(LikelihoodTask(small_likelihood(bars, tmp_path / "run", vae=CLASSES)))


def test_too_few_classes_are_refused(images: Path, tmp_path: Path) -> None:
    vae = CLASSES | {"num_classes": 1}
    with pytest.raises(UserError, match="num_classes 1 is too small: the images have 2"):
        train(LikelihoodTask(small_likelihood(images, tmp_path / "run", vae=vae)))
