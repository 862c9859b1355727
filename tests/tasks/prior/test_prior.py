"""A prior learns the tokens of images, its export gives pictures, and bad input is named."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from latentvae.cli.encode_decode import summary
from latentvae.cli.main import main
from latentvae.config.presets import load_preset
from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.log import read_rows
from latentvae.engine.loop import Stopped, train
from latentvae.engine.resume import write_config
from latentvae.engine.updates import Updates
from latentvae.errors import UserError
from latentvae.latents.decode import decode_folder
from latentvae.latents.encode import encode_folder
from latentvae.latents.shard_dataset import TokenDataset
from latentvae.priors.pipeline import TokenPipeline
from latentvae.priors.sample import sample_folder, write_samples
from latentvae.priors.sampling import Sampling
from latentvae.proofs.prior_preflight import prior_preflight
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.prior.config import PriorConfig
from latentvae.tasks.prior.prior_export import export_prior
from latentvae.tasks.prior.task import PriorTask
from latentvae.tasks.prior.tokens import unigram_bits
from latentvae.tasks.prior.trained_prior import token_bits
from tests.launch import finish, launch
from tests.proofs.injection import around
from tests.tasks.prior.text_encoder import write_text_encoder
from tests.tasks.prior.tokens import CLASSES, pictures, small_prior, write_patterns
from tests.tiny import TRAINABLE

pytestmark = pytest.mark.usefixtures("own_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_patterns(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def run(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior") / "run"
    train(PriorTask(small_prior(data[1], folder)))
    return folder


def last(folder: Path) -> dict[str, float]:
    return [r for r in read_rows(folder / "log.jsonl") if "validation/bits_per_token" in r][-1]


def test_it_learns_the_pattern_of_each_class(run: Path) -> None:
    row, uniform = last(run), np.log2(300)
    assert row["validation/bits_per_token"] < 0.6 * uniform
    assert row["validation/bits_wrong_class"] > row["validation/bits_per_token"] + 0.5
    assert row["validation/bits_unigram"] > 0.9 * uniform
    first = read_rows(run / "log.jsonl")[0]
    assert first["validation/bits_per_token"] == pytest.approx(uniform, abs=1e-4)


def test_shuffled_tokens_are_harder(data: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    train(PriorTask(small_prior(data[1], tmp_path / "run", tokens={"shuffle_tokens": True})))
    shuffled, ours = last(tmp_path / "run"), last(run)
    assert shuffled["validation/bits_per_token"] > ours["validation/bits_per_token"] + 0.5


def test_the_card_has_the_bits_and_one_call_gives_pictures(run: Path) -> None:
    card = (run / "export" / "README.md").read_text()
    bits = last(run)["validation/bits_per_token"]
    assert f"| this prior (bits_per_token) | {bits:.3f} |" in card
    assert str(run.parent) not in card

    pipe = TokenPipeline.from_pretrained(run / "export")
    pictures = pipe(["bee", "ant"], guidance_scale=1.5, top_k=50, seed=1).images
    assert [picture.size for picture in pictures] == [(8, 8)] * 2
    again = pipe("ant", num_images=2, guidance_scale=1.5, top_k=50, seed=1).images
    assert again[1] == pictures[1]


def test_samples_follow_their_class(run: Path) -> None:
    """A sampled token is most often its forerunner plus 1 in class 0, and plus 2 in class 1."""
    pipe = TokenPipeline.from_pretrained(run / "export")
    for number in (0, 1):
        tokens = drawn(pipe, number)
        steps = (tokens[:, 1:] - tokens[:, :-1]) % 300
        assert (steps == number + 1).float().mean() > 0.5


def drawn(pipe: TokenPipeline, number: int) -> Tensor:
    from latentvae.priors.sampling import sample_tokens

    return sample_tokens(pipe.transformer, torch.full((32,), number), options=Sampling(top_k=5))


def test_the_command_writes_pictures_and_tokens(run: Path, tmp_path: Path) -> None:
    arguments = ["sample", str(run), "--num", "5", "--class", "bee", "--top_k", "20"]
    main([*arguments, "--tokens", "--batch_size", "2", "--out", str(tmp_path / "a")])
    names = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert names == [*(f"{number:05d}.png" for number in range(5)), "grid.png"]

    # the tokens decode to the same pictures
    shards = tmp_path / "a" / "tokens"
    assert [item["label"] for item in TokenDataset(shards)] == [1] * 5  # type: ignore[attr-defined]
    for path in decode_folder(shards, tmp_path / "decoded"):
        ours, theirs = (np.asarray(Image.open(p)) for p in (path, tmp_path / "a" / path.name))
        assert np.array_equal(ours, theirs)

    # the pictures depend neither on the number of pictures nor on the batch
    main([*arguments[:2], "--num", "3", *arguments[4:], "--out", str(tmp_path / "b")])
    one, other = ((tmp_path / name / "00002.png").read_bytes() for name in "ab")
    assert one == other


def test_a_run_resumes_to_the_bit(data: tuple[Path, Path], tmp_path: Path) -> None:
    changes = {"max_train_steps": 6, "checkpointing_steps": 2, "validation_steps": 6}
    changes |= {"prior": {"dropout": 0.1}}
    train(PriorTask(small_prior(data[1], tmp_path / "straight", **changes)))

    # stopped in the middle, then the same command again
    make = Updates.make

    def stop(self: Updates, batches: object) -> object:
        result = make(self, batches)  # type: ignore[arg-type]
        result.signal = 15 if self.progress.update == 3 else 0
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Updates, "make", stop)
        train(PriorTask(small_prior(data[1], tmp_path / "resumed", **changes)))
    train(PriorTask(small_prior(data[1], tmp_path / "resumed", **changes)))

    one, other = (
        load_checkpoint(tmp_path / name / "checkpoint-6").tensors
        for name in ("straight", "resumed")
    )
    for file, tensors in one.items():
        for name, value in tensors.items():
            assert torch.equal(value, other[file][name]), name
    weights = [
        load_file(tmp_path / n / "export/transformer/diffusion_pytorch_model.safetensors")
        for n in ("straight", "resumed")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joined_batch(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    changes = {"max_train_steps": 6, "checkpointing_steps": 6, "validation_steps": 6}
    changes |= {"prior": {"condition_dropout": 0.0}}
    train(PriorTask(small_prior(data[1], tmp_path / "one", **changes)))
    config = small_prior(data[1], tmp_path / "two", train_batch_size=8, **changes)
    file = tmp_path / "two.yaml"
    write_config(config, file)
    folder = ["--config", str(file), "--output_dir", str(tmp_path / "two")]
    finish(launch(["-m", "latentvae.cli.train_prior", *folder], processes=2))

    # the first update's gradients are summed in another order, so the last digits differ
    one, two = (load_checkpoint(tmp_path / n / "checkpoint-6").tensors for n in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=2e-4, rtol=0)
    names = ("validation/bits_per_token", "validation/bits_wrong_class")
    for name in names:
        assert last(tmp_path / "two")[name] == pytest.approx(last(tmp_path / "one")[name], rel=1e-4)


def test_preflight_holds(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, report = small_prior(data[1], tmp_path / "run"), tmp_path / "checks.json"
    assert prior_preflight(config, json=report) == 0, capsys.readouterr().out
    checks = {check["name"] for check in json.loads(report.read_text())["checks"]}
    assert {"causal", "loss-at-start", "condition-dropout", "cache", "checkpoint"} <= checks
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fault", "named"),
    [("mask", "causal"), ("drop", "condition-dropout"), ("head", "loss-at-start")],
)
def test_preflight_finds_faults(
    data: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    named: str,
) -> None:
    from torch.nn import functional as F

    build = PriorTask.build
    if fault == "mask":
        attend = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: attend(q, k, v))
    elif fault == "drop":
        monkeypatch.setattr(PriorTask, "drop_condition", lambda _, classes, text: (classes, text))
    else:

        def loud(self: PriorTask, *args: object, **kwargs: object) -> None:
            build(self, *args, **kwargs)  # type: ignore[arg-type]
            torch.nn.init.normal_(self.net.outputs[0].weight)

        monkeypatch.setattr(PriorTask, "build", loud)
    assert prior_preflight(small_prior(data[1], tmp_path / "run")) == 1
    assert f"FAILED {named}" in capsys.readouterr().out


def rows_of(shards: Path) -> list[dict[str, str]]:
    """A caption for each item, which names its class."""
    items = TokenDataset(shards)
    return [
        {"id": items[i]["id"], "text": f"a photo of a {CLASSES[items[i]['label']]}"}
        for i in range(len(items))
    ]


def written(rows: list[dict[str, str]], folder: Path) -> Path:
    captions = folder / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return captions


def test_a_prior_with_text_follows_its_captions(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, rows = TokenDataset(data[1]), rows_of(data[1])
    captions = written(rows, tmp_path)
    encoder = write_text_encoder(tmp_path / "encoder", ["a", "photo", "of", *CLASSES])

    text = {"captions": str(captions), "text_encoder": str(encoder)}
    train(PriorTask(small_prior(data[1], tmp_path / "run", prior=text)))
    assert last(tmp_path / "run")["validation/bits_per_token"] < 0.6 * np.log2(300)
    prompt = ["--prompt", "a photo of a bee", "--guidance", "2"]
    out = tmp_path / "pictures"
    main(["sample", str(tmp_path / "run"), "--num", "2", *prompt, "--out", str(out)])
    assert len(list(out.glob("0*.png"))) == 2

    # the caption of the other class makes the tokens less likely
    pipe = TokenPipeline.from_pretrained(tmp_path / "run" / "export")
    indices = items[0]["indices"].flatten()[None]
    label = items[0]["label"]
    right, wrong = (
        token_bits(pipe.transformer, indices, None, pipe.encode([f"a photo of a {CLASSES[i]}"]))
        for i in (label, 1 - label)
    )
    assert wrong.mean() > right.mean() + 0.2

    # an exported text encoder with other weights is found
    def damaged(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        copy = deepcopy(self)
        torch.nn.init.normal_(copy.shared.weight)
        return original(copy, *args, **kwargs)

    task = PriorTask(small_prior(data[1], tmp_path / "run", prior=text))
    task.open()
    around("transformers:T5EncoderModel.save_pretrained", damaged)(monkeypatch)
    values: dict[str, Any] = {"config": task.config, "data": task.data, "folder": tmp_path / "run"}
    with pytest.raises(RuntimeError, match="text encoder differs from the one used in training"):
        export_prior(pipe, tmp_path / "damaged", update=1, **values)

    # each image needs a caption
    captions.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="has no text for 255 of 256 images"):
        PriorTask(small_prior(data[1], tmp_path / "other", prior=text)).open()
    without = small_prior(data[1], tmp_path / "other", prior={"text_encoder": str(encoder)})
    with pytest.raises(UserError, match=r"text_encoder '.*encoder' needs captions"):
        PriorTask(without).open()


@pytest.mark.parametrize("name", ["vqvae2", "residual", "gumbel", "vit_fsq"])
def test_tokens_of_every_kind_are_learned_and_sampled(name: str, tmp_path: Path) -> None:
    nets = {**TRAINABLE["vqvae2"], **TRAINABLE["vq"], **TRAINABLE["vit_vq"]}
    nets[name]().save_pretrained(tmp_path / "tokenizer")
    manifest = encode_folder(
        tmp_path / "tokenizer", pictures(tmp_path / "photos"), tmp_path / "tokens", resolution=8
    )
    assert manifest is not None
    several = re.search(
        r"\d+ and \d+ of \d+ codes of each level used", summary(manifest, tmp_path / "tokens")
    )
    assert (several is not None) == (name == "vqvae2")
    short = {"max_train_steps": 2, "validation_steps": 2, "train_batch_size": 4}
    train(PriorTask(small_prior(tmp_path / "tokens", tmp_path / "run", **short)))
    levels = {key for key in last(tmp_path / "run") if key.startswith("validation/bits_level")}
    assert len(levels) == {"vqvae2": 2, "residual": 2}.get(name, 0)

    out = tmp_path / "pictures"
    (path,) = sample_folder(tmp_path / "run", out, num=1, options=Sampling(), tokens=True)
    (decoded,) = decode_folder(out / "tokens", tmp_path / "decoded")
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(decoded)))


def test_bad_input_is_named_before_any_work(
    data: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    options = Sampling()
    out = tmp_path / "pictures"
    for values, named in (
        ({"class_name": "bea"}, "there is no class 'bea'.* did you mean 'bee'"),
        ({"class_name": "2"}, "there is no class '2'"),
        ({"prompt": "a bee"}, "no text encoder"),
        ({"num": 0}, "num and batch_size must be at least 1"),
    ):
        with pytest.raises(UserError, match=named):
            sample_folder(run, out, **{"num": 1, "options": options, **values})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is no prior"):
        sample_folder(data[1], out, num=1, options=options)
    assert not out.exists()

    # shards of another tokenizer
    dataset = TokenDataset(data[1])
    content = dataset.content.model_copy(update={"num_codes": 200, "dtype": "uint8"})
    other = tmp_path / "other"
    sequences, classes = torch.zeros(4, 16, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    write_samples(other, sequences, classes, content, folder=tmp_path)
    both = small_prior(data[1], out, tokens={"tokens": [str(data[1]), str(other)]})
    with pytest.raises(UserError, match=r"other codes K .* \(200, not 300\)"):
        PriorTask(both).open()
    with pytest.raises(UserError, match="tokens is missing"):
        PriorTask(small_prior(data[1], out, tokens={"tokens": []})).open()


def test_presets_of_other_commands_are_named() -> None:
    with pytest.raises(UserError, match="another command, `latentvae train-prior`"):
        load_preset("prior_small", TrainConfig)
    with pytest.raises(UserError, match="'vq_small' is for another command, `latentvae train`"):
        load_preset("vq_small", PriorConfig)


def test_the_unigram_counts_frequencies() -> None:
    train_tokens = torch.tensor([0, 0, 0, 1])
    bits = unigram_bits(train_tokens, torch.tensor([0, 1]), num_codes=2)
    assert bits == pytest.approx(-(np.log2(4 / 6) + np.log2(2 / 6)) / 2)
