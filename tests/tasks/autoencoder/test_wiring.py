"""Whole runs, seen from outside: who is trained by what, when, in which precision and how much."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from latentvae.data import EvalTransform, ImageFolder, SamplePhotos
from latentvae.engine import loop
from latentvae.engine.log import read_rows
from latentvae.losses.discriminators import PatchGAN
from latentvae.losses.perceptual import load_lpips, weights_id
from latentvae.metrics import to_8bit
from latentvae.tasks.autoencoder import run_export, train
from tests.tasks.autoencoder.recording import Recording, changed, recorded
from tests.tasks.autoencoder.small import small_config

pytestmark = pytest.mark.usefixtures("own_accelerate")

RATE = 4.5e-6  # at which bfloat16 weights of 0.02 stand still
START = 2  # the discriminator's first update, from 0


@pytest.fixture(scope="module")
def convolutions() -> dict[str, set[torch.dtype]]:
    """What convolutions gave out in the recorded run: the model's and the losses' in training,
    all in validation."""
    return defaultdict(set)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wiring") / "run"


@pytest.fixture(scope="module")
def bf16(
    folder: Path, own_accelerate: None, convolutions: dict[str, set[torch.dtype]]
) -> Recording:
    """Four updates of two micro-steps under bf16 autocast, the discriminator from the third on."""

    def watch(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, nn.Conv2d) and recording.started:
            if torch.is_inference_mode_enabled():
                convolutions["validation"].add(output.dtype)
            elif recording.inside:
                modules = set(recording.task.net.modules())
                convolutions["model" if module in modules else "losses"].add(output.dtype)

    config = small_config(
        folder,
        mixed_precision="bf16",
        max_train_steps=4,
        learning_rate=RATE,
        disc_learning_rate=RATE,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        checkpointing_steps=4,
        validation_steps=4,
        disc_start=START,
    )
    with recorded() as recording:
        hook = register_module_forward_hook(watch)
        train(config)
        hook.remove()
    return recording


def test_autocast_runs_training_in_bf16_and_validation_in_float32(
    bf16: Recording, convolutions: dict[str, set[torch.dtype]]
) -> None:
    assert convolutions["model"] == {torch.bfloat16}
    assert torch.bfloat16 in convolutions["losses"]
    assert convolutions["validation"] == {torch.float32}


def test_bf16_keeps_float32_weights_that_a_small_rate_moves(bf16: Recording) -> None:
    for update in bf16.updates:
        assert {value.dtype for value in update.after.values()} == {torch.float32}
    first = bf16.updates[0]  # AdamW's first step is the rate itself, but where gradients vanish
    for name in ("model/net.encoder.conv_in.weight", "model/net.decoder.conv_out.weight"):
        before, after = first.before[name], first.after[name]
        assert (after - before).abs().median().item() == pytest.approx(RATE, rel=0.01), name
        large = before[before.abs() > 0.02].bfloat16()
        assert len(large) and torch.equal(large + RATE, large)  # what float32 weights avoid


def test_the_average_follows_every_model_update_in_float32(bf16: Recording) -> None:
    assert bf16.training.averages["model"].optimization_step == len(bf16.updates)
    for i, update in enumerate(bf16.updates):
        decay = min((1 + i) / (10 + i), 0.999) if i else 0.0
        for name, _ in bf16.task.net.named_parameters():
            old, new = update.before[f"ema/{name}"], update.after[f"ema/{name}"]
            weights = update.after[f"model/net.{name}"].double()
            expected = decay * old.double() + (1 - decay) * weights
            torch.testing.assert_close(new.double(), expected, rtol=1e-6, atol=1e-9)
    moved = [changed(update, "ema/") for update in bf16.updates]
    assert all(moved)


def test_the_discriminator_learns_from_its_first_update_and_not_before(bf16: Recording) -> None:
    assert [update.factor for update in bf16.updates] == [None, None, 0.0, 0.25]
    learns = [changed(update, "discriminator/") for update in bf16.updates]
    assert learns == [False, False, True, True]
    first = bf16.updates[START]
    name = "discriminator/layers.0.weight"
    step = (first.after[name] - first.before[name]).abs().median().item()
    assert step == pytest.approx(RATE, rel=0.01)


def test_every_update_steps_the_model_and_gives_clipped_gradients(bf16: Recording) -> None:
    assert [changed(update, "model/") for update in bf16.updates] == [True] * 4
    assert all(update.norm is not None and update.norm <= 1.0 + 1e-4 for update in bf16.updates)
    steps = {name: v for name, v in bf16.updates[-1].after.items() if name.endswith("/step")}
    assert {v.item() for name, v in steps.items() if name.startswith("model")} == {4.0}
    assert {v.item() for name, v in steps.items() if name.startswith("discriminator")} == {2.0}


def test_the_output_log_variance_is_learned(bf16: Recording) -> None:
    assert all(changed(update, "model/output_logvar") for update in bf16.updates)


def test_lpips_is_as_it_was_loaded_frozen_and_in_eval_mode(bf16: Recording) -> None:
    perceptual = bf16.task.objective.perceptual
    assert perceptual is not None and perceptual is bf16.task.metric
    assert not list(perceptual.parameters())
    assert not any(module.training for module in perceptual.modules())
    for name, value in perceptual.named_buffers():
        assert not value.requires_grad and value.grad is None, name
    assert weights_id(bf16.task.metric.lpips) == weights_id(load_lpips("alex"))


def test_no_gradient_is_left_anywhere_after_an_update(bf16: Recording) -> None:
    assert bf16.task.discriminator is not None
    for module in (bf16.task.wrapper, bf16.task.discriminator):
        assert all(p.grad is None for p in module.parameters())


def test_checkpoints_hold_no_lpips_and_the_average_of_all_parts(
    bf16: Recording, folder: Path
) -> None:
    checkpoint = folder / "checkpoint-4"
    names = {path.stem for path in checkpoint.glob("*.safetensors")}
    assert names == {
        f"{n}{part}" for n in ("model", "discriminator") for part in ("", "_optimizer")
    } | {"model_average"}
    average = load_file(checkpoint / "model_average.safetensors")
    of_net = dict(bf16.task.net.named_parameters())
    assert average.keys() == {f"net.{name}" for name in of_net}
    assert not any("lpips" in name for name in load_file(checkpoint / "model.safetensors"))


def test_the_logged_psnr_is_that_of_the_export(bf16: Recording, folder: Path) -> None:
    rows = [row for row in read_rows(folder / "log.jsonl") if "validation/psnr" in row]
    net: Any = AutoencoderKL.from_pretrained(folder / "export")
    photos, transform = SamplePhotos("validation"), EvalTransform(32, interpolation="bilinear")
    values = []
    for i in range(len(photos)):
        images = transform(photos.read(i))[None]
        with torch.no_grad():
            recon = net.decode(net.encode(images).latent_dist.mode()).sample
        pair = [to_8bit(x.clamp(-1, 1))[0].numpy() for x in (images, recon)]
        values.append(peak_signal_noise_ratio(*pair, data_range=2.0))
    assert rows[-1]["validation/psnr"] == pytest.approx(sum(values) / len(values), abs=1e-3)


def test_the_exported_scaling_factor_is_one_over_the_standard_deviation(
    bf16: Recording, folder: Path
) -> None:
    """By the law of total variance, from the posteriors' moments."""
    net: Any = AutoencoderKL.from_pretrained(folder / "export")
    photos, transform = SamplePhotos("train"), EvalTransform(32, interpolation="bilinear")
    images = torch.stack([transform(photos.read(i)) for i in range(len(photos))])
    with torch.no_grad():
        posterior = net.encode(images).latent_dist
    variance = posterior.mean.var() + posterior.var.mean()
    assert net.config["scaling_factor"] == pytest.approx(variance.item() ** -0.5, rel=0.05)
    assert abs(net.config["scaling_factor"] / 0.18215 - 1) > 0.1


def test_what_is_measured_on_some_images_is_measured_all_over_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first by name may be of one class."""
    monkeypatch.setattr(run_export, "STATISTICS_IMAGES", 3)
    seen: dict[str, list[str]] = {"train": [], "validation": []}
    for split in seen:
        folder = tmp_path / split
        folder.mkdir()
        for i in range(9):
            Image.new("RGB", (32, 32), (i * 20, 0, 0)).save(folder / f"{i}.png")
    read = ImageFolder.read

    def noted(self: ImageFolder, index: int, /, **options: Any) -> Any:
        seen[self.root.name].append(self.name(index))
        return read(self, index, **options)

    config = small_config(
        tmp_path / "run",
        train_data_dir=str(tmp_path / "train"),
        validation_data_dir=str(tmp_path / "validation"),
        max_validation_images=3,
        num_sample_images=3,
        max_train_steps=1,
        disc_start=1,
    )
    export = loop.export

    def exported(*args: Any, **options: Any) -> Path:
        seen["train"].clear()
        return export(*args, **options)

    monkeypatch.setattr(ImageFolder, "read", noted)
    monkeypatch.setattr(loop, "export", exported)
    train(config)
    assert seen["train"] == ["0.png", "3.png", "6.png"]
    assert set(seen["validation"]) == {"0.png", "3.png", "6.png", "4.png"}  # two to prove it


def rates(recording: Recording) -> list[float]:
    return [update.rates[0] for update in recording.updates]


@pytest.mark.parametrize(("processes", "micro_steps"), [(1, 1), (4, 1), (1, 3)])
def test_the_learning_rate_ends_at_max_train_steps_whatever_makes_up_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, micro_steps: int
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: processes))
    config = small_config(
        tmp_path,
        mixed_precision="bf16",
        max_train_steps=5,
        train_batch_size=1,
        gradient_accumulation_steps=micro_steps,
        disc_scale=0.0,
        perceptual_scale=0.0,
        lr_warmup_steps=1,
    )
    with recorded() as recording:
        train(config)
    cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert rates(recording) == pytest.approx([1e-3, *cosine])


def test_before_its_start_the_discriminator_is_not_even_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = PatchGAN.forward

    def counting(self: PatchGAN, images: Tensor) -> Tensor:
        calls.append(len(recording.updates))
        return forward(self, images)

    monkeypatch.setattr(PatchGAN, "forward", counting)
    with recorded() as recording:
        train(small_config(tmp_path, mixed_precision="bf16", max_train_steps=4))
    # From update 2 (counted from 0) on: once for the model and once for itself, twice accumulated.
    assert calls == [2] * 4 + [3] * 4


@pytest.mark.parametrize("change", [{}, {"kl_target": 1.0}], ids=["", "kl_target"])
def test_an_update_waits_for_the_device_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    waits: list[tuple[int, str]] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def counting(self: Tensor, *args: Any, _name: str = name, _call: Any = original) -> Any:
            if recording.inside:
                waits.append((len(recording.updates), _name))
            return _call(self, *args)

        monkeypatch.setattr(Tensor, name, counting)
    with recorded() as recording:
        options = {"mixed_precision": "bf16", "max_train_steps": 3, "disc_start": 1}
        train(small_config(tmp_path, **options, **change))
    waits.remove((0, "item"))  # the loader's seed, drawn on the CPU when it starts
    assert waits == [(i, "tolist") for i in range(3)]


@pytest.mark.parametrize("precision", ["no", None])
def test_another_run_in_the_same_process_has_its_own_precision(
    bf16: Recording, tmp_path: Path, precision: str | None
) -> None:
    with recorded() as recording:
        train(small_config(tmp_path, mixed_precision=precision, max_train_steps=1))
    assert recording.training.accelerator.mixed_precision == "no"
    assert recording.task.objective.autocast_dtype is None
