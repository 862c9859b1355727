"""A VAE learns, its export is measured and sampled, and resumes are exact."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentvae.cli.check_commands import run_of
from latentvae.cli.main import main
from latentvae.config.presets import load_preset, preset_names
from latentvae.config.run_config import flat
from latentvae.data import Batch
from latentvae.engine import checkpoint_content
from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.log import read_rows
from latentvae.engine.loop import Stopped, train
from latentvae.engine.resume import write_config
from latentvae.engine.updates import Updates
from latentvae.errors import RunError, UserError
from latentvae.evaluation.published import PUBLISHED
from latentvae.losses.total_correlation import measure_kl_parts
from latentvae.models.dense.network import VectorVAE
from latentvae.models.hierarchical.spectral import spectral_penalty
from latentvae.models.likelihood_models import load_likelihood_net
from latentvae.proofs.likelihood_preflight import likelihood_preflight
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.likelihood.config import LikelihoodConfig
from latentvae.tasks.likelihood.images import binary, binary_bytes, to_bytes
from latentvae.tasks.likelihood.measure import measure_folder
from latentvae.tasks.likelihood.task import LikelihoodTask
from tests.launch import finish, launch
from tests.tasks.likelihood.fixed_noise import train_fixed
from tests.tasks.likelihood.small import (
    CLASSES,
    HIERARCHY,
    SIDE,
    small_likelihood,
    write_bars,
    write_classes,
)

pytestmark = pytest.mark.usefixtures("own_accelerate")


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bars(tmp_path_factory.mktemp("bars") / "images")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes") / "images")


@pytest.fixture(scope="module")
def run(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE after 200 updates."""
    folder = tmp_path_factory.mktemp("vae") / "run"
    long = {"max_train_steps": 200, "checkpointing_steps": 200, "validation_steps": 100}
    train(LikelihoodTask(small_likelihood(bars, folder, **long, validation_samples=5)))
    return folder


def stopped_at(update: int, config: LikelihoodConfig) -> None:
    """Train until a signal arrives in this update."""
    make = Updates.make

    def stop(self: Updates, batches: Any) -> Any:
        found = make(self, batches)
        found.signal = 15 if self.progress.update == update else 0
        return found

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Updates, "make", stop)
        train(LikelihoodTask(config))


def validations(folder: Path) -> list[dict[str, float]]:
    return [row for row in read_rows(folder / "log.jsonl") if "validation/nats" in row]


def test_it_learns_more_than_the_mean_image(run: Path) -> None:
    first, _, last = validations(run)
    assert last["validation/nats"] < first["validation/nats"] - 5
    assert last["validation/nats_importance"] < last["validation/nats"]
    assert last["validation/kl"] > 1
    assert last["validation/bits_per_dim"] == pytest.approx(
        last["validation/nats"] / (SIDE * SIDE * math.log(2))
    )
    rows = [row for row in read_rows(run / "log.jsonl") if "loss/total" in row]
    for row in rows:
        parts = row["loss/distortion"] + row["loss/kl"]
        assert row["loss/total"] == pytest.approx(parts, rel=1e-5)


def test_the_export_is_the_measured_network(run: Path, bars: Path, tmp_path: Path) -> None:
    net, about = load_likelihood_net(run)
    assert isinstance(net, VectorVAE) and about.binarize == "static"
    found = measure_folder(run, str(bars), samples=20, json=tmp_path / "nats.json")
    assert found == json.loads((tmp_path / "nats.json").read_text())
    nats = found["nats_per_image"]
    assert nats["importance"] < nats["elbo"]
    assert nats["elbo"] == pytest.approx(validations(run)[-1]["validation/nats"], rel=0.2)
    assert found["images"] == 64 and len(found["kl_per_group"]) == 1
    assert sum(found["kl_per_group"]) < nats["elbo"]
    # The information is a part of the KL.
    assert 0 < found["mutual_information"] <= min(sum(found["kl_per_group"]) + 0.1, math.log(64))
    again = measure_folder(run, str(bars), samples=20)
    assert again == found
    assert measure_folder(run, str(bars), samples=20, batch_size=7)["images"] == 64
    card = (run / "export" / "README.md").read_text()
    assert "negative ELBO, nats per image" in card and str(run.parent) not in card


def test_the_commands_measure_and_sample(
    run: Path, bars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["likelihood", str(run), "--data", str(bars), "--samples", "3", "--max_images", "5"])
    out = capsys.readouterr().out
    assert "5 images, 3 samples each" in out and "active units" in out

    command = ["sample", str(run), "--num", "3", "--temperature", "0.7"]
    main([*command, "--out", str(tmp_path / "one")])
    main([*command, "--out", str(tmp_path / "two")])
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "grid.png"]
    first, second = (np.asarray(Image.open(tmp_path / n / "00001.png")) for n in ("one", "two"))
    assert first.shape == (SIDE, SIDE) and (first == second).all()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["likelihood", "RUN", "--data", "BARS", "--samples", "0"], "samples must be at least 1"),
        (["likelihood", "BARS", "--data", "BARS"], "holds no network with a likelihood"),
        (["sample", "RUN", "--out", "OUT", "--top_k", "3"], "--top_k 3 has no meaning"),
        (["sample", "RUN", "--out", "OUT", "--class", "a"], "this model has no classes"),
        (["sample", "RUN", "--out", "OUT", "--temperature", "-1"], "must be at least 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    flags: list[str],
    said: str,
    run: Path,
    bars: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"RUN": str(run), "BARS": str(bars), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as ended:
        main([paths.get(flag, flag) for flag in flags])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "vae": {"latent_units": (4, 3), "hidden_channels": (16, 8)},
            "data": {"binarize": "static"},
        },
        {"objective": {"bound": "dreg", "train_samples": 3}},
        {"objective": {"tc_scale": 5.0}},
        {"vae": HIERARCHY, "objective": {"free_nats": 0.1, "spectral_scale": 0.1}},
        {"vae": CLASSES, "data": {"labels_per_class": 3}},
    ],
    ids=["elbo", "two-static", "dreg", "factor", "hierarchical", "classes"],
)
def test_a_run_resumes_to_the_bit(
    changes: dict[str, Any], bars: Path, classes: Path, tmp_path: Path
) -> None:
    images = classes if changes.get("vae") == CLASSES else bars

    def config(name: str) -> LikelihoodConfig:
        return small_likelihood(images, tmp_path / name, **changes)

    train(LikelihoodTask(config("straight")))
    stopped_at(3, config("resumed"))
    train(LikelihoodTask(config("resumed")))
    train(LikelihoodTask(config("resumed")))

    one, other = (
        load_checkpoint(tmp_path / n / "checkpoint-6").tensors for n in ("straight", "resumed")
    )
    for file, tensors in one.items():
        for name, value in tensors.items():
            assert torch.equal(value, other[file][name]), name
    assert validations(tmp_path / "straight") == validations(tmp_path / "resumed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "special",
    [
        {"objective": {"free_nats": 0.5}},
        {"objective": {"tc_scale": 3.0, "tc_estimate": "minibatch"}},
        {"vae": CLASSES, "objective": {"class_floor": 0.0}},
    ],
    ids=["free bits", "joined codes", "classes"],
)
def test_two_processes_equal_one_with_the_joined_batch(
    special: dict[str, Any], bars: Path, classes: Path, tmp_path: Path
) -> None:
    """With free bits, whose floor is decided by the mean over ranks, and with the joined codes."""
    changes = {
        "data": {"binarize": "threshold"},
        "optimizer": {"learning_rate": 1e-4},
        **special,
    }
    images = classes if "vae" in special else bars
    train_fixed(small_likelihood(images, tmp_path / "one", **changes))
    config = small_likelihood(images, tmp_path / "two", train_batch_size=4, **changes)
    write_config(config, tmp_path / "two.yaml")
    arguments = ["-m", "tests.tasks.likelihood.fixed_noise", str(tmp_path / "two.yaml")]
    finish(launch(arguments, processes=2))

    one, two = (load_checkpoint(tmp_path / n / "checkpoint-6").tensors for n in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=2e-3, rtol=0)

    # A step of Adam is at most the learning rate, so the losses tell more than the weights.
    losses = [read_rows(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    for row, other in zip(*losses, strict=True):
        for name in {"loss/total", "loss/kl", "loss/total_correlation"} & row.keys():
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-3), name


def test_the_order_is_known_before_the_images_are_read(bars: Path, tmp_path: Path) -> None:
    """`verify-resume` compares the order of tasks that were opened, but not built."""
    task = LikelihoodTask(small_likelihood(bars, tmp_path / "run"))
    task.open()
    whole = task.order(rank=0, processes=1, start=0, stop=4)
    parts = [task.order(rank=r, processes=2, start=0, stop=4) for r in (0, 1)]
    assert whole is not None and len(whole) == 4 and parts[0] != parts[1]
    assert task.order(rank=0, processes=1, start=2, stop=4) == whole[2:]


def test_a_bad_batch_is_skipped_and_leaves_no_trace(
    bars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One update has a finite gradient that is a thousand times too large."""
    options = {"optimizer": {"skip_grad_norm": 2000.0}, "max_train_steps": 8}
    step = LikelihoodTask.micro_step

    def bad(self: LikelihoodTask, batch: Any, update: int) -> dict[str, Tensor]:
        before = [p.detach().clone() for p in self.net.parameters()]
        states.append(before)
        values = step(self, batch, update)
        if update == 3:
            for parameter in self.net.parameters():
                parameter.grad.mul_(1e4)
        return values

    states: list[list[Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LikelihoodTask, "micro_step", bad)
        train(LikelihoodTask(small_likelihood(bars, tmp_path / "run", **options)))
    moved = [
        any(not torch.equal(a, b) for a, b in zip(states[i], states[i + 1], strict=True))
        for i in range(7)
    ]
    assert moved == [True, True, True, False, True, True, True]
    assert "update 4 skipped: its gradient is above skip_grad_norm 2000" in capsys.readouterr().out
    rows = read_rows(tmp_path / "run" / "log.jsonl")
    assert max(row.get("grad/model", 0.0) for row in rows) < 2000
    assert [row["optimizer/skipped"] for row in rows if "optimizer/skipped" in row][-1] == 1


def test_a_skipped_update_restores_batch_norm(bars: Path, tmp_path: Path) -> None:
    """One batch has a pixel that is not a number."""
    step, found = LikelihoodTask.micro_step, []

    def bad(self: LikelihoodTask, batch: Batch, update: int) -> dict[str, Tensor]:
        found.append([b.clone() for b in self.net.buffers()])
        images = batch.images.float() / 127.5 - 1.0
        if update == 2:
            images[0, 0, 0, 0] = float("nan")
        return step(self, batch._replace(images=images), update)

    changes = {"vae": HIERARCHY | {"block": "nvae"}, "data": {"binarize": "threshold"}}
    config = small_likelihood(bars, tmp_path / "run", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LikelihoodTask, "micro_step", bad)
        patch.setattr("latentvae.tasks.likelihood.task.binary", lambda images, _: images)
        train(LikelihoodTask(config))
    kept = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(found)]
    assert kept == [False, False, True, False, False]
    assert math.isfinite(validations(tmp_path / "run")[-1]["validation/nats"])


def test_batch_norm_needs_one_process_on_a_cpu(bars: Path, tmp_path: Path) -> None:
    config = small_likelihood(bars, tmp_path / "run", vae=HIERARCHY | {"block": "nvae"})
    task = LikelihoodTask(config)
    task.open()
    task.check_processes(1)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="batch norm, whose statistics only"):
            task.check_processes(2)


def test_unreadable_images_are_named_and_limited(
    bars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_bars(tmp_path / "images")
    names = sorted(folder.iterdir())
    for path in names[:8]:
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"At most 1\.0% of the images may be unreadable"):
        train(LikelihoodTask(small_likelihood(folder, tmp_path / "run")))

    task = LikelihoodTask(small_likelihood(folder, tmp_path / "run", data={"max_bad_share": 0.5}))
    train(task)
    out = capsys.readouterr().out
    assert f"cannot train on {names[0].name}" in out or f"validate on {names[0].name}" in out
    # The place in memory is not the number in the folder.
    assert task.pixels is not None and task.names(torch.tensor([len(task.pixels) - 1])) == [
        task.train_images.name(len(task.train_images) - 1)  # type: ignore[arg-type, union-attr]
    ]

    for path in names:
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image can be read"):
        measure_folder(tmp_path / "run", str(folder), samples=1)


def test_resized_images_are_noted_and_compared_with_no_paper(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "large").mkdir()
    Image.new("RGB", (20, 30)).save(tmp_path / "large" / "a.png")
    found = measure_folder(run, str(tmp_path / "large"), samples=1)
    assert found["protocol"] == {"binarize": "static", "seed": 0, "resized_from": "30 x 20"}
    assert "images were resized (the first image from 30 x 20)" in capsys.readouterr().out


def test_a_run_of_bad_batches_ends(bars: Path, tmp_path: Path) -> None:
    options = {"optimizer": {"skip_grad_norm": 1e-9, "max_skipped_updates": 3}}
    with pytest.raises(RunError, match=r"3 updates in a row were skipped.*above skip_grad_norm"):
        train(LikelihoodTask(small_likelihood(bars, tmp_path / "run", **options)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"data": {"binarize": "none"}, "vae": {"likelihood": "discretized_logistic"}}],
    ids=["binary", "grey"],
)
def test_preflight_holds(
    changes: dict[str, Any], bars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, report = small_likelihood(bars, tmp_path / "run", **changes), tmp_path / "checks.json"
    assert likelihood_preflight(config, json=report) == 0, capsys.readouterr().out
    names = [check["name"] for check in json.loads(report.read_text())["checks"]]
    assert {"gradients", "values", "bounds", "checkpoint", "loss-falls"} <= set(names)
    assert not (tmp_path / "run").exists()


def test_a_hierarchy_learns_and_its_groups_add_up(bars: Path, tmp_path: Path) -> None:
    long = {"max_train_steps": 150, "checkpointing_steps": 150, "validation_steps": 150}
    config = small_likelihood(bars, tmp_path / "run", vae=HIERARCHY, **long)
    assert config.vae.architecture == "hierarchical"
    train(LikelihoodTask(config))
    first, last = validations(tmp_path / "run")
    assert last["validation/nats"] < first["validation/nats"] - 5
    found = measure_folder(tmp_path / "run", str(bars), samples=10)
    assert len(found["kl_per_group"]) == 3
    assert 0 < found["active_units"] <= found["units"] == 4 * (1 + 16 + 64)
    assert sum(found["kl_per_group"]) == pytest.approx(last["validation/kl"], rel=0.25)
    main(["sample", str(tmp_path / "run"), "--num", "2", "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_the_spectral_penalty_makes_singular_values_smaller(bars: Path, tmp_path: Path) -> None:
    found = []
    for name, scale in (("plain", 0.0), ("smooth", 5.0)):
        objective = {"spectral_scale": scale}
        config = small_likelihood(
            bars, tmp_path / name, vae=HIERARCHY, objective=objective, max_train_steps=30
        )
        train(LikelihoodTask(config))
        net, _ = load_likelihood_net(tmp_path / name)
        found.append(spectral_penalty(net).item())  # type: ignore[arg-type]
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize("fault", ["gradients", "values", "bounds", "loss-falls"])
def test_preflight_finds_faults(
    fault: str, bars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_likelihood(bars, tmp_path / "run")
    forward = VectorVAE.forward

    def detached(self: VectorVAE, images: Tensor, **options: Any) -> Any:
        with torch.no_grad():
            features = self.encoder(images)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(type(self.encoder), "forward", lambda *_: features)
            return forward(self, images, **options)

    def too_good(self: VectorVAE, images: Tensor, **options: Any) -> Any:
        bound = forward(self, images, **options)
        bound.log_ratio = bound.log_ratio + float("nan")
        return bound

    with pytest.MonkeyPatch.context() as patch:
        if fault == "gradients":
            patch.setattr(VectorVAE, "forward", detached)
        elif fault == "values":
            patch.setattr("latentvae.tasks.likelihood.task.binary", lambda images, _: images)
        elif fault == "bounds":
            patch.setattr(VectorVAE, "forward", too_good)
        else:
            config = small_likelihood(bars, tmp_path / "run", optimizer={"learning_rate": 50.0})
        assert likelihood_preflight(config) == 1
    assert f"FAILED {fault}" in capsys.readouterr().out


# total correlation


def correlation_of(run: Path, bars: Path) -> float:
    """Total correlation of the latents of all images."""
    net, _ = load_likelihood_net(run)
    assert isinstance(net, VectorVAE)
    pixels = [np.asarray(Image.open(path)) for path in sorted(bars.iterdir())]
    images = torch.tensor(np.stack(pixels))[:, None].float() / 127.5 - 1
    with torch.no_grad():
        posterior = net.posterior(images)
    draws = torch.Generator().manual_seed(0)
    parts = measure_kl_parts(posterior.mean, posterior.logvar, generator=draws)
    return parts.total_correlation.item()


@pytest.mark.parametrize("estimate", ["minibatch", "discriminator"])
def test_the_term_makes_the_units_less_dependent(
    estimate: str, run: Path, bars: Path, tmp_path: Path
) -> None:
    options = {"tc_scale": 10.0, "tc_estimate": estimate, "tc_learning_rate": 2e-3}
    long = {"max_train_steps": 200, "checkpointing_steps": 200, "validation_steps": 200}
    train(LikelihoodTask(small_likelihood(bars, tmp_path / "run", **long, objective=options)))
    assert correlation_of(tmp_path / "run", bars) < 0.6 * correlation_of(run, bars)
    assert validations(tmp_path / "run")[-1]["validation/kl"] > 1  # not by collapse
    names = {name for row in read_rows(tmp_path / "run" / "log.jsonl") for name in row}
    assert "loss/total_correlation" in names
    assert ("loss/tc_discriminator" in names) == (estimate == "discriminator")


# images and options


def test_grey_values_are_the_share_of_white() -> None:
    grey = torch.full((400, 1, 8, 8), 0.5)  # 191 of 255
    draws = torch.Generator().manual_seed(0)
    drawn = binary(grey, "dynamic", generator=draws)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert (drawn > 0).float().mean().item() == pytest.approx(0.75, abs=0.01)
    once, again = (binary_bytes(to_bytes(grey), seed=1) for _ in range(2))
    assert torch.equal(once, again) and (once == 255).float().mean().item() == pytest.approx(
        0.75, abs=0.01
    )
    assert binary(torch.tensor([-0.1, 0.1]), "threshold").tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"binarize": "none"}}, "likelihood bernoulli is for binary images"),
        ({"vae": {"likelihood": "gaussian"}}, "binarize dynamic needs likelihood bernoulli"),
        ({"data": {"crop": "random"}}, "crop random does not work with cache_images"),
        ({"data": {"aspect_ratio_buckets": 3}}, "needs one size"),
        ({"data": {"train_data_dir": None}}, "train_data_dir is missing"),
        ({"vae": {"latent_units": (3, 2)}}, "as many numbers as latent_units"),
        (
            {
                "vae": {"latent_units": (3, 2), "hidden_channels": (8, 8)},
                "objective": {"bound": "dreg", "train_samples": 2},
            },
            "dreg needs a single latent vector",
        ),
        ({"objective": {"spectral_scale": 0.1}}, "architecture dense has none"),
        ({"gradient_checkpointing": True}, "not available for architecture dense"),
        (
            {"vae": HIERARCHY, "objective": {"bound": "dreg", "train_samples": 2}},
            "dreg needs architecture dense or conv",
        ),
        ({"vae": {"posterior_flow": "iaf"}, "objective": {"tc_scale": 1.0}}, "posterior_flow none"),
    ],
)
def test_wrong_options_are_one_sentence_too(
    changes: dict[str, Any], said: str, bars: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(LikelihoodTask(small_likelihood(bars, tmp_path / "run", **changes)))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_every_preset_is_for_this_command() -> None:
    names = preset_names(LikelihoodConfig)
    assert set(PUBLISHED) <= set(names) and not set(names) & set(preset_names(TrainConfig))
    for name in names:
        config = load_preset(name, LikelihoodConfig)
        assert config.vae.likelihood and flat(config)


def test_a_command_finds_the_task_by_its_config() -> None:
    assert run_of("vae_mnist", [], also=[])[0] is LikelihoodTask


@pytest.mark.parametrize(
    ("vae", "left_out"),
    [
        (
            {"architecture": "dense", "latent_units": (4,), "hidden_channels": (24,)},
            ("encoder.layers.0", "decoder.last"),
        ),
        (
            {"architecture": "conv", "latent_units": (4,), "hidden_channels": (24,)},
            ("encoder.blocks.0.first", "encoder.blocks.0.skip", "decoder.last"),
        ),
        (HIERARCHY, ("encoder.conv_in", "conv_out")),
        (
            CLASSES,
            (
                *("classifier.0.layers.0", "classifier.1", "from_image", "from_class"),
                "decoder.last",
            ),
        ),
    ],
    ids=["dense", "conv", "hierarchical", "classes"],
)
def test_muon_trains_the_matrices_inside(
    vae: dict[str, Any], left_out: tuple[str, ...], classes: Path, tmp_path: Path
) -> None:
    changes = {"vae": vae, "optimizer": {"optimizer": "muon"}, "max_train_steps": 1}
    task = LikelihoodTask(small_likelihood(classes, tmp_path / "run", **changes))
    train(task)
    groups = task.learners["model"].optimizer.param_groups
    (trained,) = ({id(p) for p in g["params"]} for g in groups if g["muon"] is not None)
    others = {
        name.removesuffix(".weight")
        for name, p in task.net.named_parameters()
        if p.ndim > 1 and name.endswith(".weight") and id(p) not in trained
    }
    assert others == set(left_out) and trained


def test_a_run_that_was_stopped_is_exported(
    bars: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`latentvae export` writes the newest checkpoint, with averaged weights, of any training."""
    run, out = tmp_path / "run", tmp_path / "out"
    config = small_likelihood(bars, run, max_train_steps=6, checkpointing_steps=100)
    stopped_at(3, config)
    # a run of two processes on another machine
    monkeypatch.setattr(checkpoint_content, "world_size", lambda: 2)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = ["export", str(run), "--out"]
    main([*command, str(out)])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    averages = load_checkpoint(run / "checkpoint-3").tensors["model_average"]
    weights = load_likelihood_net(out)[0].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in averages.items())
    main([*command, str(out), "--overwrite"])
    file = out / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"the network in '.*out' cannot be loaded"):
        load_likelihood_net(out)

    shutil.copytree(run, tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "checkpoint-3")
    capsys.readouterr()
    for arguments, said in (
        ([*command, str(out)], "holds an export"),
        ([*command, str(run), "--overwrite"], "is not an export"),
        ([*command, str(tmp_path / "o"), "--lookup_from_codebook"], "needs a tokenizer"),
        (["export", str(tmp_path / "empty"), "--out", str(tmp_path / "o")], "has no checkpoint"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists() and (run / "checkpoint-3").is_dir()
