"""Fine-tuning by adapters: the latents stay, runs resume to the bit, and the export has both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from latentvae.cli.train import config_from_arguments
from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.log import read_rows
from latentvae.errors import UserError
from latentvae.proofs.preflight import preflight
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.autoencoder.run_export import export_folder
from tests.launch import finish, launch
from tests.tasks.autoencoder.small import as_flags, broken_off, small_config
from tests.tiny import images

pytestmark = pytest.mark.usefixtures("own_accelerate")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network: Any = AutoencoderKL
    net = network(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=0.3,
    )
    folder = tmp_path_factory.mktemp("base") / "vae"
    net.save_pretrained(folder)
    return folder


def low_rank(folder: Path, base: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"pretrained_model_name_or_path": str(base), "freeze_encoder": True}
    options |= {"lora_rank": 2, "kl_scale": 0.0, "lr_scheduler": "constant", "ema_decay": 0.5}
    return small_config(folder, **options | changes)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a discriminator, whose weight adapts to the last layer's gradients."""
    folder = tmp_path_factory.mktemp("low_rank") / "run"
    train(low_rank(folder, base))
    return folder


@torch.no_grad()
def test_the_adapters_on_the_base_equal_the_export(run: Path, base: Path) -> None:
    pytest.importorskip("peft")
    theirs, ours = (
        AutoencoderKL.from_pretrained(base),
        AutoencoderKL.from_pretrained(run / "export"),
    )
    latents = [net.encode(images(32, 32)).latent_dist.parameters for net in (theirs, ours)]
    assert torch.equal(*latents)
    assert ours.config.scaling_factor == 0.3

    z = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = theirs.decode(z).sample
    theirs.load_lora_adapter(run / "export" / "lora", prefix=None, use_safetensors=True)
    after = ours.decode(z).sample
    torch.testing.assert_close(theirs.decode(z).sample, after, atol=1e-5, rtol=1e-5)
    assert (before - after).abs().max() > 1e-3
    assert "adapters of rank 2" in (run / "export" / "README.md").read_text()


def test_frozen_weights_stay_those_of_the_base(run: Path, base: Path) -> None:
    file = "diffusion_pytorch_model.safetensors"
    before, after = load_file(base / file), load_file(run / "export" / file)
    kept = {n for n, v in before.items() if torch.equal(v, after[n])}
    assert kept == {n for n in before if not n.startswith("decoder.") or _no_matrix(n, before)}
    rows = [row for row in read_rows(run / "log.jsonl") if "discriminator/adaptive_weight" in row]
    assert rows and rows[-1]["discriminator/adaptive_weight"] > 0


def _no_matrix(name: str, weights: dict[str, torch.Tensor]) -> bool:
    return not name.endswith("weight") or weights[name].ndim < 2


def test_a_run_resumes_to_the_bit_and_its_checkpoint_exports(
    run: Path, base: Path, tmp_path: Path
) -> None:
    broken = broken_off(run, tmp_path / "broken", update=4)
    train(low_rank(broken, base))
    one, other = (load_checkpoint(folder / "checkpoint-6").tensors for folder in (run, broken))
    for file, tensors in one.items():
        assert all(torch.equal(value, other[file][name]) for name, value in tensors.items()), file

    export_folder(broken, out=tmp_path / "again")
    for name in ("diffusion_pytorch_model.safetensors", "lora/pytorch_lora_weights.safetensors"):
        first, second = load_file(run / "export" / name), load_file(tmp_path / "again" / name)
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name


def test_preflight_holds(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight(low_rank(tmp_path / "run", base)) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joined_batch(
    run: Path, base: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"disc_scale": 0.0, "deterministic_posterior": True}
    options |= {"random_flip": False, "crop": "center", "learn_logvar": False}
    train(low_rank(tmp_path / "one", base, **options))
    config = low_rank(tmp_path / "two", base, train_batch_size=2, **options)
    finish(launch(["-m", "latentvae.cli.train", *as_flags(config)], processes=2))
    one, two = (load_checkpoint(tmp_path / n / "checkpoint-6").tensors for n in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("kl_small --lora_rank 4 --optimizer adamw", "needs pretrained_model_name_or_path"),
        (
            "kl_small --lora_rank 4 --optimizer adamw --pretrained_model_name_or_path vae",
            "Give --freeze_encoder too",
        ),
        (
            "kl_small --lora_rank 4 --pretrained_model_name_or_path vae --freeze_encoder",
            "lora_rank 4 and optimizer muon exclude each other",
        ),
        ("vq_small --lora_rank 4", "'--lora_rank' has no meaning for config vq_small"),
        ("kl_small --lora_rank -1", "lora_rank is -1"),
    ],
)
def test_wrong_options_are_one_sentence(arguments: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_from_arguments(["--config", *arguments.split()], description="")
