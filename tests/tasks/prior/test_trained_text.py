"""A text encoder that learns together with the prior."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from latentvae.cli.main import main
from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.loop import train
from latentvae.engine.processes import start_accelerator
from latentvae.engine.resume import write_config
from latentvae.engine.training import Training, build_training
from latentvae.engine.updates import Updates
from latentvae.errors import UserError
from latentvae.latents.shard_dataset import TokenDataset
from latentvae.priors.byte_encoder import ByteTextEncoder
from latentvae.priors.pipeline import TokenPipeline
from latentvae.proofs.prior_preflight import prior_preflight
from latentvae.tasks.prior.config import PriorConfig
from latentvae.tasks.prior.task import PriorTask
from latentvae.tasks.prior.trained_prior import token_bits
from tests.launch import finish, launch
from tests.proofs.injection import around
from tests.tasks.prior.test_prior import last, rows_of, written
from tests.tasks.prior.tokens import CLASSES, halves, small_prior, write_patterns

pytestmark = pytest.mark.usefixtures("own_accelerate")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The tokens, and the options of a prior with captions."""
    root = tmp_path_factory.mktemp("text")
    shards = write_patterns(root, make=halves)[1]
    return shards, {"prior": {"captions": str(written(rows_of(shards), root))}}


@pytest.fixture
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(ByteTextEncoder, channels=32, depth=2, num_heads=2)
    monkeypatch.setattr("latentvae.tasks.prior.task.ByteTextEncoder", small)


def built(config: PriorConfig, folder: Path) -> Training:
    task = PriorTask(config)
    task.open()
    return build_training(task, folder=folder, accelerator=start_accelerator(config.run, folder))


@pytest.mark.usefixtures("small_encoder")
def test_it_learns_to_tell_captions_apart(
    text: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, options = text
    train(PriorTask(small_prior(shards, tmp_path / "run", max_train_steps=60, **options)))
    row = last(tmp_path / "run")
    assert row["validation/bits_per_token"] < 3.4  # 3 bits for one of eight codes
    assert row["validation/bits_wrong_text"] > row["validation/bits_per_token"] + 0.2
    printed = capsys.readouterr().out
    assert "ByteTextEncoder" in printed and "learns with the prior" in printed
    assert "with a wrong caption" in printed

    # the export holds the averaged weights of both networks
    pipe = TokenPipeline.from_pretrained(tmp_path / "run" / "export")
    average = load_checkpoint(tmp_path / "run" / "checkpoint-60").tensors["model_average"]
    for part in ("net", "encoder"):
        module = pipe.transformer if part == "net" else pipe.text_encoder
        for name, value in module.named_parameters():
            assert torch.equal(value, average[f"{part}.{name}"]), name
    item = TokenDataset(shards)[0]
    right, wrong = (
        token_bits(
            pipe.transformer,
            item["indices"].flatten()[None],
            None,
            pipe.encode([f"a photo of a {CLASSES[label]}"]),
        ).mean()
        for label in (item["label"], 1 - item["label"])
    )
    assert wrong > right + 0.2

    out = tmp_path / "pictures"
    prompt = ["--prompt", "a photo of a bee", "--guidance", "2"]
    main(["sample", str(tmp_path / "run"), "--num", "2", *prompt, "--out", str(out)])
    assert len(list(out.glob("0*.png"))) == 2


@pytest.mark.usefixtures("small_encoder")
def test_an_update_moves_the_encoder_by_the_gradient_of_the_loss(
    text: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The gradient of a second update, against a plain computation without the task's code."""
    shards, options = text
    training = built(small_prior(shards, tmp_path / "run", **options), tmp_path)
    task: Any = training.task
    batches = iter(task.batches(start_step=0))
    Updates(training).make(batches)  # output layers begin at 0, so that nothing else has a gradient
    batch = next(batches)
    task.config = task.config.with_changes({"prior": {"condition_dropout": 0.0}})
    task.learners["model"].module.eval()
    task.micro_step(batch, 1)
    found = {name: p.grad.clone() for name, p in task.encoder.named_parameters()}
    assert all(grad.any() for grad in found.values())

    task.learners["model"].module.zero_grad()
    texts = [task.data.train.captions[number] for number in batch.numbers]
    states = task.encoder(task.encoder.split(texts))
    logits = task.net(batch.indices, text=states).logits
    F.cross_entropy(logits.flatten(0, 1), batch.indices.flatten()).backward()
    for name, p in task.encoder.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


@pytest.mark.usefixtures("small_encoder")
def test_it_resumes_to_the_bit_and_only_with_the_same_captions(
    text: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shards, options = text
    changes = {"checkpointing_steps": 2, "validation_steps": 4, "num_sample_images": 1}
    config = small_prior(shards, tmp_path / "straight", max_train_steps=4, **changes, **options)
    train(PriorTask(config))
    for updates in (2, 4):
        config = small_prior(
            shards, tmp_path / "two", max_train_steps=updates, **changes, **options
        )
        train(PriorTask(config))
    one, two = (load_checkpoint(tmp_path / n / "checkpoint-4").tensors for n in ("straight", "two"))
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    assert any(name.startswith("encoder.") for name in one["model"])

    rows = [{**row, "text": f"{row['text']}!"} for row in rows_of(shards)]
    other = {"prior": {"captions": str(written(rows, tmp_path))}}
    config = small_prior(shards, tmp_path / "two", max_train_steps=5, **changes, **other)
    with pytest.raises(UserError, match="captions: "):
        train(PriorTask(config))


@pytest.mark.usefixtures("small_encoder")
@pytest.mark.parametrize("fault", [False, True])
def test_preflight_sees_an_encoder_without_a_gradient(
    text: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: bool,
) -> None:
    shards, options = text
    if fault:

        def detached(original: Any, self: ByteTextEncoder, words: Any) -> Any:
            with torch.no_grad():
                found = original(self, words)
            return type(found)(found.states + 0 * self.bytes.weight.sum(), found.mask)

        around("latentvae.priors.byte_encoder:ByteTextEncoder.forward", detached)(monkeypatch)
    report = tmp_path / "checks.json"
    config = small_prior(shards, tmp_path / "run", **options)
    assert prior_preflight(config, json=report) == fault, capsys.readouterr().out
    checks = {check["name"]: check["passed"] for check in json.loads(report.read_text())["checks"]}
    failed = [name for name, passed in checks.items() if not passed]
    assert failed == ["text-encoder"] * fault
    assert {"condition", "condition-dropout", "text-encoder"} <= checks.keys()


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joined_batch(
    text: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shards, options = text
    options = {"prior": {**options["prior"], "condition_dropout": 0.0}}
    changes = {"max_train_steps": 4, "checkpointing_steps": 4, "validation_steps": 4, **options}
    train(PriorTask(small_prior(shards, tmp_path / "one", **changes)))
    config = small_prior(shards, tmp_path / "two", train_batch_size=8, **changes)
    file = tmp_path / "two.yaml"
    write_config(config, file)
    folder = ["--config", str(file), "--output_dir", str(tmp_path / "two")]
    finish(launch(["-m", "latentvae.cli.train_prior", *folder], processes=2))
    one, two = (load_checkpoint(tmp_path / n / "checkpoint-4").tensors for n in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=2e-4, rtol=0)
    for name in ("validation/bits_per_token", "validation/bits_wrong_text"):
        assert last(tmp_path / "two")[name] == pytest.approx(last(tmp_path / "one")[name], rel=1e-4)
