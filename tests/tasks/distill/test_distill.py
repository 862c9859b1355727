"""A student learns from its teacher, its export works in stock diffusers, and resumes are exact."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderTiny
from safetensors.torch import load_file
from torch import Tensor

from latentvae.cli.check_commands import run_of
from latentvae.config.presets import load_preset, preset_names
from latentvae.config.run_config import flat
from latentvae.data import validation_batches
from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.log import read_rows
from latentvae.engine.loop import Stopped, train
from latentvae.engine.resume import write_config
from latentvae.engine.updates import Updates
from latentvae.errors import UserError
from latentvae.evaluation import speed
from latentvae.metrics import psnr
from latentvae.metrics.image import to_8bit
from latentvae.models.students import StudentShape, TinyStudent
from latentvae.proofs.distill_preflight import distill_preflight
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.images import eval_transform, open_data
from latentvae.tasks.distill import cost
from latentvae.tasks.distill.config import DistillConfig
from latentvae.tasks.distill.task import DistillTask
from latentvae.tasks.distill.teaching import Pair, TrainedStudent
from latentvae.tasks.prior.config import PriorConfig
from tests.launch import finish, launch
from tests.tasks.distill.small import small_distill, teacher
from tests.tiny import TINY

pytestmark = pytest.mark.usefixtures("own_accelerate", "small_costs")

BOTH = {
    "student": {"student": "both"},
    "objective": {"lpips_net": "alex", "teacher_share": 0.5, "latent_noise": 0.1},
}


@pytest.fixture(scope="module")
def small_costs() -> Iterator[None]:
    """Exports measure the cost of small images, and only a few times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "ENOUGH", 0.02)
        patch.setattr(cost, "SIDE", 64)
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "vae"
    teacher().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(given: Path, small_costs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student decoder after 60 updates."""
    folder = tmp_path_factory.mktemp("distill") / "run"
    long = {"max_train_steps": 60, "gradient_accumulation_steps": 1, "checkpointing_steps": 60}
    train(DistillTask(small_distill(given, folder, **long, validation_steps=20, log_steps=20)))
    return folder


def validations(folder: Path) -> list[dict[str, float]]:
    return [row for row in read_rows(folder / "log.jsonl") if "validation/psnr" in row]


def validation_images(given: Path, folder: Path) -> Tensor:
    config = small_distill(given, folder)
    batches = validation_batches(open_data(config)[1], eval_transform(config), batch_size=99)
    return next(iter(batches))[0]


def test_it_learns_and_the_teacher_stays_as_it_was(run: Path, given: Path) -> None:
    rows = validations(run)
    assert rows[-1]["validation/psnr"] > rows[0]["validation/psnr"] + 5
    assert len({row["validation/psnr_teacher"] for row in rows}) == 1
    before, after = teacher().state_dict(), load_file(given / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@torch.no_grad()
def test_the_export_decodes_what_a_pipeline_hands_it(run: Path, given: Path) -> None:
    """The metric of the log, from the classes and the config's values alone."""
    vae, net = AutoencoderTiny.from_pretrained(run / "export"), teacher()
    images = validation_images(given, run)
    latents = (net.encode(images).latent_dist.mode() - 0.5) * 0.2  # as a diffusion model learns it
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0)
    recon = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    found = psnr(images, to_8bit(recon)).mean().item()
    assert found == pytest.approx(validations(run)[-1]["validation/psnr"], abs=1e-3)
    theirs = psnr(images, to_8bit(net.decode(latents / 0.2 + 0.5).sample)).mean().item()
    assert theirs == pytest.approx(validations(run)[-1]["validation/psnr_teacher"], abs=1e-3)


@torch.no_grad()
def test_a_part_that_nobody_trained_returns_0_and_the_card_says_so(run: Path) -> None:
    vae = AutoencoderTiny.from_pretrained(run / "export")
    assert not vae.encode(torch.randn(1, 3, 32, 32)).latents.any()
    card = (run / "export" / "README.md").read_text()
    assert "The encoder is not trained and returns 0" in card
    row = validations(run)[-1]
    ours, theirs = row["validation/psnr"], row["validation/psnr_teacher"]
    assert f"| PSNR (dB) to the images | {ours:.2f} | {theirs:.2f} |" in card
    assert "decoder: G MACs at 64 px" in card and str(run.parent) not in card


@pytest.mark.parametrize("part", ["encoder", "both"])
def test_each_part_learns_alone_or_with_the_other(part: str, given: Path, tmp_path: Path) -> None:
    student = {"student": {"student": part}}
    short = {"gradient_accumulation_steps": 1, "max_train_steps": 15, "checkpointing_steps": 15}
    train(DistillTask(small_distill(given, tmp_path / "run", **short, **student)))
    rows = validations(tmp_path / "run")
    first, last = rows[0]["validation/latent_error"], rows[-1]["validation/latent_error"]
    assert last < 0.9 * first
    vae, images = (
        AutoencoderTiny.from_pretrained(tmp_path / "run" / "export"),
        validation_images(given, tmp_path),
    )
    with torch.no_grad():
        ours = vae.encode(images).latents
        theirs = (teacher().encode(images).latent_dist.mode() - 0.5) * 0.2
        error = ((ours - theirs).square().mean() / theirs.var(correction=0)).sqrt().item()
    assert error == pytest.approx(last, rel=1e-3)
    assert vae.decode(ours).sample.std() > 0 if part == "both" else True


def test_a_run_resumes_to_the_bit(given: Path, tmp_path: Path) -> None:
    def config(name: str) -> DistillConfig:
        return small_distill(given, tmp_path / name, **BOTH)

    train(DistillTask(config("straight")))
    make = Updates.make

    def stop(self: Updates, batches: Any) -> Any:
        found = make(self, batches)
        found.signal = 15 if self.progress.update == 3 else 0
        return found

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Updates, "make", stop)
        train(DistillTask(config("resumed")))
    train(DistillTask(config("resumed")))

    one, other = (
        load_checkpoint(tmp_path / n / "checkpoint-6").tensors for n in ("straight", "resumed")
    )
    for file, tensors in one.items():
        for name, value in tensors.items():
            assert torch.equal(value, other[file][name]), name
    assert validations(tmp_path / "straight") == validations(tmp_path / "resumed")


def test_another_teacher_is_refused_on_resume(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    net = teacher()
    with torch.no_grad():
        net.decoder.conv_out.bias.add_(0.1)
    net.save_pretrained(tmp_path / "other")
    long = {"max_train_steps": 60, "gradient_accumulation_steps": 1, "checkpointing_steps": 60}
    config = small_distill(tmp_path / "other", run, **long, validation_steps=20, log_steps=20)
    with pytest.raises(UserError, match="teacher"):
        train(DistillTask(config))


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joined_batch(given: Path, tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"objective": {"latent_noise": 0.0}}
    quiet |= {"data": {"random_flip": False, "crop": "center"}}
    quiet |= {"seed": 1}  # with 0, rounding moves a value over the kink of a ReLU
    train(DistillTask(small_distill(given, tmp_path / "one", **quiet)))
    config = small_distill(given, tmp_path / "two", train_batch_size=2, **quiet)
    file = tmp_path / "two.yaml"
    write_config(config, file)
    folder = ["--config", str(file), "--output_dir", str(tmp_path / "two")]
    finish(launch(["-m", "latentvae.cli.train_tiny", *folder], processes=2))
    one, two = (load_checkpoint(tmp_path / n / "checkpoint-6").tensors for n in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=1e-5, rtol=0)
    ours, theirs = (validations(tmp_path / name)[-1] for name in ("one", "two"))
    assert ours["validation/psnr"] == pytest.approx(theirs["validation/psnr"], abs=0.02)


def test_training_continues_from_a_given_student(run: Path, given: Path, tmp_path: Path) -> None:
    start = {"student": {"pretrained_model_name_or_path": str(run / "export")}}
    slow = {"optimizer": {"learning_rate": 1e-6}}
    train(DistillTask(small_distill(given, tmp_path / "run", **start, **slow)))
    rows = validations(tmp_path / "run")
    assert rows[0]["validation/psnr"] == pytest.approx(validations(run)[-1]["validation/psnr"])
    ours = AutoencoderTiny.from_pretrained(tmp_path / "run" / "export")
    encoder = AutoencoderTiny.from_pretrained(run / "export").encoder.state_dict()
    assert all(torch.equal(v, ours.encoder.state_dict()[n]) for n, v in encoder.items())


def test_the_student_of_flux2_keeps_its_latents(tmp_path: Path) -> None:
    net = TINY["flux2"]()
    net.save_pretrained(tmp_path / "vae")
    half = {"student": {"decoder_block_out_channels": (4, 4)}, "max_train_steps": 3}
    half |= {"train_batch_size": 2, "gradient_accumulation_steps": 1, "validation_steps": 3}
    train(DistillTask(small_distill(tmp_path / "vae", tmp_path / "run", **half)))
    ours = AutoencoderKLFlux2.from_pretrained(tmp_path / "run" / "export")
    assert ours.config.decoder_block_out_channels == [4, 4]
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(
            ours.encode(images).latent_dist.mode(), net.encode(images).latent_dist.mode()
        )
    assert torch.equal(ours.bn.running_mean, net.bn.running_mean)
    assert torch.equal(ours.bn.running_var, net.bn.running_var)
    first, last = validations(tmp_path / "run")
    assert last["validation/psnr"] > first["validation/psnr"]


# preflight


@pytest.mark.parametrize("changes", [{}, BOTH])
def test_preflight_holds(
    changes: dict[str, Any], given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, report = small_distill(given, tmp_path / "run", **changes), tmp_path / "checks.json"
    assert distill_preflight(config, json=report) == 0, capsys.readouterr().out
    names = [check["name"] for check in json.loads(report.read_text())["checks"]]
    assert {"teacher", "parts", "latents", "scale", "checkpoint", "loss-falls"} <= set(names)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["teacher", "parts", "latents", "scale", "loss-falls"])
def test_preflight_finds_faults(
    fault: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each fault has the name of the check that must find it."""
    folder, config = given, small_distill(given, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        if fault == "teacher":
            patch.setattr(Pair, "teach", _moving(Pair.teach))
        elif fault == "parts":
            patch.setattr(TrainedStudent, "forward", _detached(TrainedStudent.forward))
        elif fault == "latents":
            folder = tmp_path / "vae"
            net = teacher()
            net.register_to_config(scaling_factor=3.0)
            net.save_pretrained(folder)
            config = small_distill(folder, tmp_path / "run")
        elif fault == "scale":
            target = "latentvae.proofs.distill_preflight.to_teacher"
            patch.setattr(target, lambda student, teacher, z: z)
        else:
            config = small_distill(given, tmp_path / "run", optimizer={"learning_rate": 5.0})
        assert distill_preflight(config) == 1
    assert f"FAILED {fault}" in capsys.readouterr().out


def _moving(teach: Any) -> Any:
    @torch.no_grad()
    def moved(self: Pair, *args: Any, **kwargs: Any) -> Any:
        next(iter(self.teacher.parameters())).add_(1e-3)
        return teach(self, *args, **kwargs)

    return moved


def _detached(forward: Any) -> Any:
    def detached(self: TrainedStudent, images: Tensor, z: Tensor) -> Any:
        """Only the decoder's last layers learn."""
        layers: Any = self.net.decoder.layers
        handle = layers[3].register_forward_hook(lambda module, inputs, output: output.detach())
        found = forward(self, images, z)
        handle.remove()
        return found

    return detached


# options


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {"teacher": None}}, "teacher is missing"),
        ({"data": {"resolution": 34}}, "resolution 34 is not a multiple of 4"),
        ({"data": {"image_channels": 1}}, "Give --image_channels 3"),
        ({"data": {"train_data_dir": None}}, "train_data_dir is missing"),
        ({"data": {"resolution": 28}}, "LPIPS-alex needs at least 31 px"),
        ({"student": {"decoder_block_out_channels": (8,)}}, "only for a teacher of FLUX.2"),
    ],
)
def test_wrong_options_are_one_sentence(
    changes: dict[str, Any], said: str, given: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(DistillTask(small_distill(given, tmp_path / "run", **changes)))
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gradient", {}, "the teacher is a tokenizer"),
        ("flux2", {"student": "encoder"}, "Give --student decoder"),
        ("flux2", {"decoder_block_out_channels": (6, 6)}, "2 multiples of 4"),
        ("kl", {"pretrained_model_name_or_path": "vae"}, "is a AutoencoderKL, but the student"),
        ("kl", {"pretrained_model_name_or_path": "f4"}, "has f = 4 and 4 latent channels, but"),
    ],
)
def test_teachers_and_students_that_do_not_fit(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    net = TINY[name]()
    net.save_pretrained(tmp_path / "vae")
    TinyStudent().build(teacher(), StudentShape(channels=8, blocks=1)).save_pretrained(
        tmp_path / "f4"
    )
    key = "pretrained_model_name_or_path"
    if key in changes:
        changes = {key: str(tmp_path / changes[key])}
    with pytest.raises(UserError, match=said):
        task = DistillTask(small_distill(tmp_path / "vae", tmp_path / "run", student=changes))
        train(task)


def test_an_encoder_alone_has_no_options_of_the_decoder() -> None:
    for option in ("teacher_share", "latent_noise"):
        values = {"student": {"student": "encoder"}, "objective": {option: 0.5}}
        with pytest.raises(ValueError, match=f"{option} 0.5 is for the decoder's loss"):
            DistillConfig.model_validate(values)


def test_presets_belong_to_this_task_alone() -> None:
    assert preset_names(DistillConfig) == ["tiny_small", "tiny_taesd"]
    for schema in (TrainConfig, PriorConfig):
        assert not {"tiny_small", "tiny_taesd"} & set(preset_names(schema))
    with pytest.raises(UserError, match="another command, `latentvae train-tiny`"):
        load_preset("tiny_small", TrainConfig)
    assert run_of("tiny_small", [], also=[])[0] is DistillTask
    names = list(flat(DistillConfig()))
    assert len(names) == len(set(names))


def test_tiny_taesd_has_taesds_shape() -> None:
    options = load_preset("tiny_taesd", DistillConfig).student
    net = TinyStudent().build(
        TINY_F8, StudentShape(options.student_channels, options.student_blocks)
    )
    stock = AutoencoderTiny()
    assert {n: v.shape for n, v in net.state_dict().items()} == {
        n: v.shape for n, v in stock.state_dict().items()
    }


TINY_F8 = AutoencoderTiny(
    encoder_block_out_channels=(8,) * 4,
    decoder_block_out_channels=(8,) * 4,
    num_encoder_blocks=(1, 1, 1, 1),
    num_decoder_blocks=(1, 1, 1, 1),
)
