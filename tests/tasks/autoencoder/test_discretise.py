"""A KL autoencoder becomes a tokenizer: what learns when, resume, refusals and the export."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import latentvae
from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.errors import UserError
from latentvae.models import build_autoencoder_kl
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.fine_tuning import open_base
from latentvae.tasks.autoencoder.run_export import export_folder
from latentvae.tasks.autoencoder.task import AutoencoderTask
from tests.forks import ranks
from tests.tasks.autoencoder.ranks import Done, gradients_after_update
from tests.tasks.autoencoder.small import broken_off, built, small_config
from tests.tasks.autoencoder.test_tokenizers import WEIGHTS, tokenizer
from tests.tiny import TINY

ADAPTER = ("net.quant_conv.", "net.quantize.", "net.post_quant_conv.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A KL autoencoder of another shape than the run's preset."""
    torch.manual_seed(0)
    net = build_autoencoder_kl(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=3, norm_num_groups=4
    )
    folder = tmp_path_factory.mktemp("base") / "vae"
    net.save_pretrained(folder)
    return folder


def discretising(folder: Path, base: Path, *, quantizer: str = "vq", **options: Any) -> Any:
    model = {"pretrained_model_name_or_path": str(base)}
    for name in ("quantizer_warmup_steps", "train_encoder", "freeze_encoder", "likelihood"):
        if name in options:
            model[name] = options.pop(name)
    shape = {"max_train_steps": 4, "checkpointing_steps": 1, "learn_logvar": False}
    shape |= {"disc_start": 0, "adam_weight_decay": 0.1, "lr_warmup_steps": 0}
    return small_config(folder, model=tokenizer(quantizer, **model), **shape | options)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates, of which two are the quantiser's warm-up."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(discretising(folder, base, quantizer_warmup_steps=2, optimizer="muon"))
    return folder


def weights(run: Path, update: int) -> dict[str, Tensor]:
    return dict(load_checkpoint(run / f"checkpoint-{update}").tensors["model"])


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_only_the_quantiser_learns_in_its_warm_up(base: Path, whole: Path) -> None:
    opened = open_base(discretising(whole.with_name("other"), base))
    assert opened is not None and opened.discretised
    loaded = {f"net.{name}": value for name, value in opened.net.state_dict().items()}
    second, third, last = (weights(whole, update) for update in (2, 3, 4))

    assert {name for name in changed(loaded, second) if not name.startswith(ADAPTER)} == set()
    learned = changed(weights(whole, 1), second)
    assert {"net.quant_conv.weight", "net.quantize.weight", "net.post_quant_conv.bias"} <= learned
    learned = changed(second, third)
    assert {"net.decoder.conv_in.weight", "net.decoder.conv_out.bias"} <= learned
    assert not {name for name in changed(loaded, last) if name.startswith("net.encoder.")}


def test_no_gradient_of_the_decoders_weights_in_the_warm_up(base: Path, tmp_path: Path) -> None:
    config = discretising(tmp_path, base, quantizer_warmup_steps=1, train_encoder=True)
    training = built(config, tmp_path)
    task: Any = training.task
    batches, got = iter(task.batches(start_step=0)), []
    for update in range(2):
        task.micro_step(next(batches), update)
        got.append({n for n, p in task.net.named_parameters() if p.grad is not None})
        task.learners["model"].optimizer.zero_grad()
    parts = [{name.split(".")[0] for name in names} for names in got]
    adapter = {"quant_conv", "quantize", "post_quant_conv"}
    assert parts == [adapter, adapter | {"encoder", "decoder"}]


@pytest.mark.parametrize("update", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_resumes_across_the_end_of_the_warm_up(
    base: Path, whole: Path, update: int, tmp_path: Path
) -> None:
    broken = broken_off(whole, tmp_path / "broken", update=update)
    options = {"quantizer_warmup_steps": 2, "optimizer": "muon"}
    resumed = train(discretising(broken, base, **options))
    expected, found = load_file(whole / "export" / WEIGHTS), load_file(resumed / WEIGHTS)
    assert not changed(expected, found) and expected.keys() == found.keys()
    assert not changed(weights(whole, 4), weights(broken, 4))
    export_folder(broken, out=tmp_path / "again")
    assert not changed(expected, load_file(tmp_path / "again" / WEIGHTS))


def test_the_export_is_a_stock_tokenizer(base: Path, whole: Path) -> None:
    export = whole / "export"
    assert json.loads((export / "config.json").read_text())["_class_name"] == "VQModel"
    assert "discretised from" in (export / "README.md").read_text()
    model = latentvae.load(export)
    assert model.encode_tokens(torch.zeros(1, 3, 32, 40)).shape == (1, 16, 20)


@pytest.mark.parametrize(
    "quantizer",
    [
        *("vq_sphere", "fsq"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("vq_average", "residual", "lfq", "simvq")
        ),
    ],
)
def test_every_quantiser_starts_near_the_base(base: Path, quantizer: str, tmp_path: Path) -> None:
    """Before the first update, more variance of the latents is kept than lost."""
    task: Any = built(discretising(tmp_path, base, quantizer=quantizer), tmp_path).task
    net, images = task.net.eval(), next(iter(task.batches(start_step=0))).on("cpu")
    with torch.no_grad():
        y = net.encoder(images)
        back = net.post_quant_conv(net.quantize(net.quant_conv(y)).z)
    lost = (back - y).square().mean() / (y - y.mean((0, 2, 3), keepdim=True)).square().mean()
    assert lost < 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze_encoder": True}, "the quantiser of a discretised KL autoencoder is new"),
        ({"quantizer": "gumbel"}, "gumbel cannot discretise a KL autoencoder"),
        ({"likelihood": "logit_laplace"}, "cannot discretise a KL autoencoder"),
    ],
)
def test_what_cannot_be_discretised_is_refused(
    options: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        built(discretising(tmp_path / "run", base, **options), tmp_path / "run")


@pytest.mark.parametrize("kind", ["asymmetric", "dc", "flux2"])
def test_other_networks_are_refused(kind: str, tmp_path: Path) -> None:
    TINY[kind]().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="but config kl_small fine-tunes DiscreteAutoencoder"):
        open_base(discretising(tmp_path / "run", tmp_path / "base"))


def test_other_image_channels_are_refused(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    build_autoencoder_kl(image_channels=1, **shape).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="takes 1-channel images, but image_channels is 3"):
        open_base(discretising(tmp_path / "run", tmp_path / "base"))


@pytest.mark.parametrize("option", [{"quantizer_warmup_steps": 2}, {"train_encoder": True}])
def test_the_options_need_a_kl_autoencoder(option: dict[str, Any], tmp_path: Path) -> None:
    model = tokenizer("vq", **option)
    config = small_config(tmp_path / "run", model=model, learn_logvar=False)
    with pytest.raises(UserError, match="has an effect only if pretrained_model_name_or_path"):
        built(config, tmp_path / "run")


@pytest.mark.slow
def test_two_ranks_train_through_the_end_of_the_warm_up(base: Path, tmp_path: Path) -> None:
    """DDP does not wait for the decoder's gradients at first, and adds them up later."""
    config = discretising(
        tmp_path / "two", base, quantizer_warmup_steps=2, optimizer="muon", train_batch_size=2
    )

    def third_update() -> None:
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Done):
            saving = gradients_after_update(3, tmp_path / "grads")
            patch.setattr(AutoencoderTask, "after_update", saving)
            train(config)

    ranks(third_update, output=tmp_path / "output.txt")
    first, second = (load_file(tmp_path / f"grads-{rank}.safetensors") for rank in (0, 1))
    assert "model/net.decoder.conv_out.weight" in first and not changed(first, second)
