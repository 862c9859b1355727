"""A flow learns latents, its export is a diffusers pipeline, and bad input is named."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, DPMSolverMultistepScheduler

from latentvae.cli.main import main
from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.log import read_rows
from latentvae.engine.loop import Stopped, train
from latentvae.engine.resume import write_config
from latentvae.engine.updates import Updates
from latentvae.errors import UserError
from latentvae.priors.dit import TIME_SCALE
from latentvae.priors.flow_matching import FlowSampling, integrate
from latentvae.priors.flow_pipeline import FlowPipeline
from latentvae.proofs.flow_preflight import flow_preflight
from latentvae.tasks.flow.task import FlowTask
from tests.launch import finish, launch
from tests.tasks.flow.fixed_noise import FixedNoise
from tests.tasks.flow.latents import small_flow, write_latents
from tests.tasks.prior.tokens import write_patterns

pytestmark = pytest.mark.usefixtures("own_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def run(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "run"
    train(FlowTask(small_flow(data[1], folder)))
    return folder


def last(folder: Path) -> dict[str, float]:
    return [r for r in read_rows(folder / "log.jsonl") if "validation/loss" in r][-1]


def test_it_learns_the_latents_of_each_class(run: Path) -> None:
    row, first = last(run), read_rows(run / "log.jsonl")[0]
    assert first["validation/loss"] == pytest.approx(2.0, abs=0.1)  # a prediction of 0
    assert row["validation/loss"] < 0.5 * row["validation/loss_gaussian"]
    assert row["validation/loss_wrong_class"] > row["validation/loss"] + 0.5


def test_samples_follow_their_class(run: Path) -> None:
    pipe = FlowPipeline.from_pretrained(run / "export")
    assert pipe.class_names == ["ant", "bee"]
    latents = pipe.sample(torch.tensor([0, 1]).repeat(8))
    assert latents[::2].mean() > 0.8
    assert latents[1::2].mean() < -0.8


def test_the_export_is_a_stock_pipeline(run: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(run / "export")
    assert type(pipe) is DiTPipeline
    assert pipe.get_label_ids(["bee", "ant"]) == [1, 0]
    card = (run / "export" / "README.md").read_text()
    assert f"| this model | {last(run)['validation/loss']:.4f} |" in card
    assert str(run.parent) not in card

    # the same noise leads to the same pictures as our own solver
    ours = FlowPipeline.from_pretrained(run / "export")
    shape = (2, 4, 4, 4)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def guided(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        time = sigma * TIME_SCALE
        a, b = (
            ours.transformer(x, timestep=time, class_labels=torch.tensor(labels)).sample
            for labels in ([1000, 1000], [1, 0])
        )
        return a + 2 * (b - a)

    with torch.no_grad():
        latents = integrate(guided, noise, options=FlowSampling(steps=40), shift=ours.shift)
        expected = (ours.decode(latents) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": 2.0, "num_inference_steps": 40, "output_type": "np"}
    found = pipe([1, 0], generator=torch.Generator().manual_seed(3), **arguments).images
    assert np.abs(found - expected).max() < 0.02


@pytest.mark.slow
def test_the_export_samples_where_only_diffusers_is_installed(run: Path) -> None:
    code = (
        "import sys; sys.modules['latentvae'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(run / 'export')!r})\n"
        "print(pipe([0, 1], num_inference_steps=2).images[1].size)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "(8, 8)"


def test_the_command_writes_pictures(run: Path, tmp_path: Path) -> None:
    arguments = ["sample", str(run), "--class", "bee", "--steps", "4", "--solver", "heun"]
    main([*arguments, "--num", "5", "--batch_size", "2", "--out", str(tmp_path / "a")])
    names = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert names == [*(f"{number:05d}.png" for number in range(5)), "grid.png"]

    main([*arguments, "--num", "3", "--out", str(tmp_path / "b")])
    one, other = ((tmp_path / name / "00002.png").read_bytes() for name in "ab")
    assert one == other

    for flag, named in ((["--top_k", "5"], "--top_k 5 has no meaning"), (["--tokens"], "--tokens")):
        with pytest.raises(SystemExit) as stopped:
            main(["sample", str(run), *flag, "--out", str(tmp_path / "c")])
        assert stopped.value.code == 2, named
    assert not (tmp_path / "c").exists()


def test_channels_can_have_their_own_scale(data: tuple[Path, Path], tmp_path: Path) -> None:
    short = {"max_train_steps": 2, "validation_steps": 2}
    changes = {"latents": {"normalization": "channel"}, **short}
    task = FlowTask(small_flow(data[1], tmp_path / "run", **changes))
    train(task)
    x = task.data.normalization.apply(task.data.train.z.float())
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)

    # diffusers' DiTPipeline could not bring these latents back, so the export names another class
    index = json.loads((tmp_path / "run/export/model_index.json").read_text())
    assert index["_class_name"] == "FlowPipeline"
    pipe = FlowPipeline.from_pretrained(tmp_path / "run" / "export")
    z = task.data.train.z[:2].float()
    expected = task.autoencoder.decode(z).clamp(-1, 1)
    torch.testing.assert_close(pipe.decode(task.data.normalization.apply(z)), expected)
    assert len(pipe("bee", num_images=2, guidance_scale=1.5).images) == 2


def test_posterior_samples_are_new_in_each_update(tmp_path: Path) -> None:
    _, shards = write_latents(tmp_path, moments=True)
    task = FlowTask(small_flow(shards, tmp_path / "run"))
    task.open()
    task.num_classes, task.device = 2, torch.device("cpu")
    batch = task.data.train.rows(range(64))
    mean, _ = task.moved(batch)
    drawn = torch.stack([task.moved(batch, sample=True)[0] for _ in range(50)])
    torch.testing.assert_close(drawn.mean(dim=0), mean, atol=0.1, rtol=0)
    assert drawn.std(dim=0).mean().item() == pytest.approx(0.2 * 0.5, rel=0.05)


def test_scales_of_channels_count_the_posterior(tmp_path: Path) -> None:
    _, shards = write_latents(tmp_path, moments=True)
    channel = {"latents": {"normalization": "channel"}}
    task = FlowTask(small_flow(shards, tmp_path / "run", **channel))
    task.open()
    task.num_classes, task.device = 2, torch.device("cpu")
    torch.manual_seed(0)
    batch = task.data.train.rows(range(len(task.data.train)))
    drawn = torch.cat([task.moved(batch, sample=True)[0] for _ in range(20)])
    torch.testing.assert_close(drawn.std(dim=(0, 2, 3)), torch.ones(4), atol=0.01, rtol=0)


def test_a_class_that_only_the_validation_has_is_named(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    task = FlowTask(small_flow(data[1], tmp_path / "run"))
    task.open()
    content = task.data.content.model_copy(update={"class_names": None})
    task.data = dataclasses.replace(task.data, content=content)
    assert task.count_classes() == 2
    task.data.validation.classes[0] = 2
    with pytest.raises(
        UserError, match="has class 2, but the training images have 2 classes, from 0 to 1"
    ):
        task.count_classes()


def test_muon_trains_linear_layers_and_no_embeddings(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    options = {"optimizer": {"optimizer": "muon"}, "max_train_steps": 1}
    task = FlowTask(small_flow(data[1], tmp_path / "run", **options))
    train(task)
    optimizer: Any = task.learners["model"].optimizer
    named = {id(p): name for name, p in task.net.named_parameters()}
    groups = [group for group in optimizer.param_groups if group["muon"] is not None]
    chosen = [named[id(p)] for group in groups for p in group["params"]]
    assert any(name.endswith("to_q.weight") for name in chosen)
    assert not any("embedding_table" in name for name in chosen)


def test_a_part_of_a_name_is_the_class(run: Path) -> None:
    pipe = FlowPipeline.from_pretrained(run / "export")
    pipe.register_to_config(id2label={"0": "tench, Tinca tinca", "1": "goldfish"})
    assert pipe.class_number("Tinca tinca") == 0
    assert pipe.class_number("goldfish") == pipe.class_number("1") == 1


def test_a_run_resumes_to_the_bit(data: tuple[Path, Path], tmp_path: Path) -> None:
    changes = {"max_train_steps": 6, "checkpointing_steps": 2, "validation_steps": 6}
    train(FlowTask(small_flow(data[1], tmp_path / "straight", **changes)))

    # stopped in the middle, then the same command again
    make = Updates.make

    def stop(self: Updates, batches: object) -> object:
        result = make(self, batches)  # type: ignore[arg-type]
        result.signal = 15 if self.progress.update == 3 else 0
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Updates, "make", stop)
        train(FlowTask(small_flow(data[1], tmp_path / "resumed", **changes)))
    train(FlowTask(small_flow(data[1], tmp_path / "resumed", **changes)))

    one, other = (
        load_checkpoint(tmp_path / name / "checkpoint-6").tensors
        for name in ("straight", "resumed")
    )
    for file, tensors in one.items():
        for name, value in tensors.items():
            assert torch.equal(value, other[file][name]), name


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joined_batch(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"max_train_steps": 6, "checkpointing_steps": 6}
    changes |= {"validation_steps": 6, "flow": {"condition_dropout": 0.0}}
    train(FixedNoise(small_flow(data[1], tmp_path / "one", **changes)))
    config = small_flow(data[1], tmp_path / "two", train_batch_size=8, **changes)
    write_config(config, tmp_path / "two.yaml")
    arguments = ["-m", "tests.tasks.flow.fixed_noise", str(tmp_path / "two.yaml")]
    finish(launch(arguments, processes=2))

    one, two = (load_checkpoint(tmp_path / n / "checkpoint-6").tensors for n in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=2e-4, rtol=0)
    for name in ("validation/loss", "validation/loss_wrong_class"):
        assert last(tmp_path / "two")[name] == pytest.approx(last(tmp_path / "one")[name], rel=1e-4)


def test_preflight_holds(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, report = small_flow(data[1], tmp_path / "run"), tmp_path / "checks.json"
    assert flow_preflight(config, json=report) == 0, capsys.readouterr().out
    checks = {check["name"] for check in json.loads(report.read_text())["checks"]}
    assert {"latents", "sampling", "loss-at-start", "condition-dropout", "checkpoint"} <= checks
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fault", "named"),
    [("drop", "condition-dropout"), ("head", "loss-at-start"), ("sign", "sampling")],
)
def test_preflight_finds_faults(
    data: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    named: str,
) -> None:
    build = FlowTask.build
    if fault == "drop":
        monkeypatch.setattr(FlowTask, "drop_condition", lambda _, classes: classes)
    elif fault == "head":

        def loud(self: FlowTask, *args: object, **kwargs: object) -> None:
            build(self, *args, **kwargs)  # type: ignore[arg-type]
            torch.nn.init.normal_(self.net.proj_out_2.weight)

        monkeypatch.setattr(FlowTask, "build", loud)
    else:
        from latentvae.priors import dit

        exact = dit.velocity
        monkeypatch.setattr(dit, "velocity", lambda *args: -exact(*args))
    assert flow_preflight(small_flow(data[1], tmp_path / "run")) == 1
    assert f"FAILED {named}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"flow": {"patch_size": 3}}, "patch_size 3 does not divide .* 4.* is 2"),
        ({"latents": {"latents": []}}, "latents is missing"),
        ({"latents": {"autoencoder": "TOKENIZER"}}, "has other weights"),
        ({"latents": {"latents": ["TOKENS"]}}, "holds tokens, not latents"),
    ],
)
def test_bad_input_is_named_before_any_work(
    data: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    tokenizer, tokens = write_patterns(tmp_path / "other")
    known = {"TOKENIZER": str(tokenizer), "TOKENS": str(tokens)}
    section = changes.get("latents", {})
    if section.get("autoencoder"):
        changes = {"latents": {"autoencoder": known["TOKENIZER"]}}
    if section.get("latents"):
        changes = {"latents": {"latents": [known["TOKENS"]]}}
    with pytest.raises(UserError, match=named):
        train(FlowTask(small_flow(data[1], tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


def test_classes_and_widths_are_checked(data: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    pipe = FlowPipeline.from_pretrained(run / "export")
    with pytest.raises(UserError, match=r"no class 'bea'.* did you mean 'bee'"):
        pipe("bea")
    with pytest.raises(ValueError, match="nearest multiple is 32"):
        small_flow(data[1], tmp_path / "run", flow={"width": 40, "head_dim": 16})
    without = small_flow(data[1], tmp_path / "run", flow={"condition": "none"}, max_train_steps=1)
    export = train(FlowTask(without))
    with pytest.raises(UserError, match="guidance needs a class"):
        FlowPipeline.from_pretrained(export)(num_images=1, guidance_scale=2.0)
