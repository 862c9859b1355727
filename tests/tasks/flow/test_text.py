"""A flow with text follows its captions, and its export is diffusers' PixArt pipeline."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from torch.nn import functional as F

from latentvae.cli.main import main
from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.loop import train
from latentvae.engine.processes import start_accelerator
from latentvae.engine.resume import write_config
from latentvae.engine.training import build_training
from latentvae.errors import UserError
from latentvae.latents.shard_dataset import LatentDataset
from latentvae.priors.dit import TIME_SCALE
from latentvae.priors.flow_matching import FlowSampling, integrate
from latentvae.priors.flow_pipeline import FlowPipeline
from latentvae.proofs.flow_preflight import flow_preflight
from latentvae.tasks.flow.task import FlowTask
from tests.launch import finish, launch
from tests.proofs.injection import around
from tests.tasks.flow.fixed_noise import FixedNoise
from tests.tasks.flow.latents import small_flow, write_latents
from tests.tasks.flow.test_flow import last
from tests.tasks.prior.test_prior import written
from tests.tasks.prior.text_encoder import write_text_encoder
from tests.tasks.prior.tokens import CLASSES

pytestmark = pytest.mark.usefixtures("own_accelerate")
PROMPTS = [f"a photo of a {name}" for name in CLASSES]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Latents, and the options of a flow with captions. A caption names the class of its image."""
    root = tmp_path_factory.mktemp("text")
    shards = write_latents(root)[1]
    captions = written(rows_of(shards), root)
    encoder = write_text_encoder(root / "encoder", ["a", "photo", "of", *CLASSES])
    return shards, {"flow": {"captions": str(captions), "text_encoder": str(encoder)}}


def rows_of(shards: Path) -> list[dict[str, str]]:
    items = LatentDataset(shards)
    ids = ((items[i]["id"], items[i]["label"]) for i in range(len(items)))
    return [{"id": name, "text": f" {PROMPTS[label].upper()} "} for name, label in ids]


@pytest.fixture(scope="module")
def run(text: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "run"
    train(FlowTask(small_flow(text[0], folder, **text[1])))
    return folder


def test_it_learns_the_latents_of_each_caption(run: Path) -> None:
    row = last(run)
    assert row["validation/loss"] < 0.5 * row["validation/loss_gaussian"]
    assert row["validation/loss_wrong_text"] > row["validation/loss"] + 0.5
    assert "validation/loss_wrong_class" not in row

    # samples follow their prompt, in any case
    pipe: Any = FlowPipeline.from_pretrained(run / "export")
    assert pipe.class_names == [] and pipe.reads_text
    ant, bee = (pipe.sample(pipe.encode([f"{text} "] * 8)).mean() for text in PROMPTS)
    assert ant > 0.8 and bee < -0.8
    torch.testing.assert_close(pipe.encode(["A BEE"]).states, pipe.encode(["a bee "]).states)
    assert len(pipe(prompt=PROMPTS, guidance_scale=2.0, num_inference_steps=2).images) == 2


def test_the_export_is_a_stock_pipeline(run: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(run / "export")
    assert type(pipe).__name__ == "PixArtSigmaPipeline"
    card = (run / "export" / "README.md").read_text()
    assert "PixArtTransformer2DModel" in card and "Condition:\ntext" in card
    assert (
        f"| this model, given a wrong caption | {last(run)['validation/loss_wrong_text']:.4f}"
        in card
    )
    assert str(run.parent) not in card

    # the same noise leads to the same pictures as our own solver
    ours = FlowPipeline.from_pretrained(run / "export")
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    words = pipe.tokenizer([*PROMPTS, "", ""], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = pipe.text_encoder(**words.to("cpu")).last_hidden_state

    def guided(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        found = ours.transformer(
            x.repeat(2, 1, 1, 1),
            timestep=sigma.repeat(2) * TIME_SCALE,
            encoder_hidden_states=states,
            encoder_attention_mask=words.attention_mask,
            added_cond_kwargs={},
        ).sample
        b, a = found.chunk(2)
        return a + 2 * (b - a)

    with torch.no_grad():
        latents = integrate(guided, noise, options=FlowSampling(steps=40), shift=ours.shift)
        expected = (ours.decode(latents) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": 2.0, "num_inference_steps": 40, "output_type": "np"}
    arguments |= {"use_resolution_binning": False, "clean_caption": False}
    prompts = [f"{prompt.upper()} " for prompt in PROMPTS]
    found = pipe(prompts, latents=noise, **arguments).images
    assert np.abs(found - expected).max() < 0.02

    # and our pipeline guides in the same way
    own = ours.sample(ours.encode(PROMPTS), options=FlowSampling(guidance=2.0, steps=40), seed=5)
    noise = torch.from_numpy(
        np.stack(
            [np.random.default_rng([5, i]).standard_normal((4, 4, 4), np.float32) for i in (0, 1)]
        )
    )
    with torch.no_grad():
        latents = integrate(guided, noise, options=FlowSampling(steps=40), shift=ours.shift)
    torch.testing.assert_close(own, latents, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_export_samples_where_only_diffusers_is_installed(run: Path) -> None:
    code = (
        "import sys; sys.modules['latentvae'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(run / 'export')!r})\n"
        f"pictures = pipe({PROMPTS}, num_inference_steps=2, use_resolution_binning=False).images\n"
        "print(type(pipe).__name__, pictures[1].size)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "PixArtSigmaPipeline (8, 8)"


def test_the_command_needs_a_prompt(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", str(run), "--prompt", PROMPTS[1], "--steps", "4", "--guidance", "2"]
    main([*arguments, "--num", "5", "--batch_size", "2", "--out", str(tmp_path / "a")])
    assert len(list((tmp_path / "a").glob("0*.png"))) == 5
    main([*arguments, "--num", "3", "--out", str(tmp_path / "b")])
    one, other = ((tmp_path / name / "00002.png").read_bytes() for name in "ab")
    assert one == other

    for flags, named in (
        ([], "needs a prompt"),
        (["--class", "bee"], "has no classes, so it cannot take the class 'bee'. Give a prompt."),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["sample", str(run), *flags, "--out", str(tmp_path / "c")])
        assert stopped.value.code == 2
        assert named in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_an_update_learns_from_the_captions_that_remain(
    text: tuple[Path, dict[str, Any]], tmp_path: Path, dropout: float
) -> None:
    """The gradient of an update, against a plain computation without the task's code."""
    shards, options = text
    task: Any = FixedNoise(
        small_flow(shards, tmp_path / "run", flow={**options["flow"], "condition_dropout": dropout})
    )
    task.open()
    training = build_training(
        task, folder=tmp_path, accelerator=start_accelerator(task.config.run, tmp_path)
    )
    with torch.no_grad():  # output layers begin at 0, so that nothing else has a gradient
        for parameter in task.net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = next(iter(training.task.batches(start_step=0)))
    task.micro_step(batch, 1)
    found = {name: p.grad.clone() for name, p in task.net.named_parameters()}

    captions = [PROMPTS[label] if dropout == 0 else "" for label in batch.classes.tolist()]
    words = task.words(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = task.encoder(**words).last_hidden_state
    x = 0.5 * batch.z
    noise, sigma = task.draw(x, batch)
    level = sigma.view(-1, 1, 1, 1)
    predicted = task.net(
        (1 - level) * x + level * noise,
        timestep=sigma * 1000,
        encoder_hidden_states=states,
        encoder_attention_mask=words.attention_mask,
        added_cond_kwargs={},
    ).sample
    task.net.zero_grad()
    F.mse_loss(predicted, noise - x).backward()
    for name, p in task.net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)
    assert not any(p.requires_grad for p in task.encoder.parameters())


def test_it_resumes_to_the_bit_and_only_with_the_same_captions(
    text: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shards, options = text
    changes = {"checkpointing_steps": 2, "validation_steps": 4, "num_sample_images": 1}
    for name, lengths in (("straight", [4]), ("two", [2, 4])):
        for updates in lengths:
            values = {"max_train_steps": updates, **changes, **options}
            train(FlowTask(small_flow(shards, tmp_path / name, **values)))
    one, two = (load_checkpoint(tmp_path / n / "checkpoint-4").tensors for n in ("straight", "two"))
    for file, tensors in one.items():
        for name, value in tensors.items():
            assert torch.equal(value, two[file][name]), name

    rows = [{**row, "text": f"{row['text']}!"} for row in rows_of(shards)]
    other = {"flow": {**options["flow"], "captions": str(written(rows, tmp_path))}}
    with pytest.raises(UserError, match="captions: "):
        config = small_flow(shards, tmp_path / "two", max_train_steps=5, **changes, **other)
        train(FlowTask(config))


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joined_batch(
    text: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shards, options = text
    changes: dict[str, Any] = {"max_train_steps": 6, "checkpointing_steps": 6}
    changes |= {"validation_steps": 6, "flow": {**options["flow"], "condition_dropout": 0.0}}
    train(FixedNoise(small_flow(shards, tmp_path / "one", **changes)))
    config = small_flow(shards, tmp_path / "two", train_batch_size=8, **changes)
    write_config(config, tmp_path / "two.yaml")
    arguments = ["-m", "tests.tasks.flow.fixed_noise", str(tmp_path / "two.yaml")]
    finish(launch(arguments, processes=2))
    one, two = (load_checkpoint(tmp_path / n / "checkpoint-6").tensors for n in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=2e-4, rtol=0)
    for name in ("validation/loss", "validation/loss_wrong_text"):
        assert last(tmp_path / "two")[name] == pytest.approx(last(tmp_path / "one")[name], rel=1e-4)


@pytest.mark.parametrize("fault", ["none", "drop", "deaf"])
def test_preflight_checks_captions(
    text: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    if fault == "drop":
        monkeypatch.setattr(FlowTask, "drop_condition", lambda _, known: known)
    elif fault == "deaf":
        states = FlowTask.states
        monkeypatch.setattr(FlowTask, "states", lambda self, texts: states(self, [""] * len(texts)))
    report = tmp_path / "checks.json"
    config = small_flow(text[0], tmp_path / "run", **text[1])
    code = flow_preflight(config, json=report)
    checks = {check["name"]: check["passed"] for check in json.loads(report.read_text())["checks"]}
    failed = [name for name, passed in checks.items() if not passed]
    expected = {"none": [], "drop": ["condition-dropout"], "deaf": ["condition"]}[fault]
    assert (code, failed) == (int(fault != "none"), expected), capsys.readouterr().out
    assert {"condition", "condition-dropout", "loss-at-start", "sampling"} <= checks.keys()


def test_other_scales_are_exported_with_our_own_pipeline(
    text: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards, options = text
    changes = {"latents": {"normalization": "channel"}, "max_train_steps": 2, **options}
    changes |= {"optimizer": {"optimizer": "muon"}, "gradient_checkpointing": True}
    task = FlowTask(small_flow(shards, tmp_path / "run", **changes))
    export = train(task)
    assert json.loads((export / "model_index.json").read_text())["_class_name"] == "FlowPipeline"
    pipe: Any = FlowPipeline.from_pretrained(export)
    assert len(pipe(prompt="a bee", num_images=2, guidance_scale=1.5).images) == 2
    assert 'prompt="a photo"' in (export / "README.md").read_text()

    # the plan names the encoder, and rows of the pictures have captions as labels
    assert "read by T5EncoderModel" in " ".join(capsys.readouterr().out.split())
    rows = task.sample_rows(task.num_classes)
    assert rows.labels is not None and sorted(t.strip().lower() for t in rows.labels) == PROMPTS
    assert rows.captions == [caption for caption in rows.labels for _ in range(2)]

    # an exported text encoder with other weights is found
    def damaged(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        copy = deepcopy(self)
        torch.nn.init.normal_(copy.shared.weight)
        return original(copy, *args, **kwargs)

    with torch.no_grad():
        for parameter in task.net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    around("transformers:T5EncoderModel.save_pretrained", damaged)(monkeypatch)
    with pytest.raises(RuntimeError, match="text encoder differs from the one used in training"):
        task.export(tmp_path / "damaged", update=2, folder=tmp_path / "run")


def test_bad_input_is_named_before_any_work(
    text: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shards, options = text
    encoder, captions = (options["flow"][name] for name in ("text_encoder", "captions"))
    some = written(rows_of(shards)[:1], tmp_path)
    endless = write_text_encoder(tmp_path / "endless", ["a"], end_token=False)
    for flow, named in (
        ({"condition": "text"}, "condition text needs a text_encoder"),
        ({"captions": captions}, "captions needs a text_encoder"),
        ({"condition": "class", "captions": captions}, "captions has no meaning with .* class"),
        (
            {"condition": "none", "text_encoder": encoder},
            "text_encoder has no meaning with .* none",
        ),
        ({"text_encoder": encoder}, "text_encoder '.*' needs captions, but the latents have none"),
        ({"text_encoder": encoder, "captions": str(some)}, "has no text for 127 of 128 images"),
        ({"text_encoder": str(shards), "captions": captions}, "is not a text encoder"),
        ({"text_encoder": str(endless), "captions": captions}, "no token for an empty text"),
    ):
        with pytest.raises((UserError, ValueError), match=named):
            FlowTask(small_flow(shards, tmp_path / "run", flow=flow)).open()


def test_a_model_of_classes_takes_no_prompt(
    text: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    export = train(FlowTask(small_flow(text[0], tmp_path / "run", max_train_steps=1)))
    pipe: Any = FlowPipeline.from_pretrained(export)
    with pytest.raises(UserError, match="no text encoder, so it cannot take the prompt 'a bee'"):
        pipe(prompt="a bee")
