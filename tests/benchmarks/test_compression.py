"""The command that measures models: one short run of it, and its errors."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from latentvae.report import Report

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compression.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_compression", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the option parser reads the source through it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two untrained models of f 2, runs/a/export and runs/b/export, and a folder of one image."""
    root = tmp_path_factory.mktemp("inputs")
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "mid_block_add_attention": False,  # which would take most of the time at 512 px
    }
    for run in "ab":
        torch.manual_seed(ord(run))
        net = AutoencoderKL(**config)
        net.save_pretrained(root / "runs" / run / "export")
    (root / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (33, 35, 3), np.uint8)
    Image.fromarray(pixels).save(root / "images" / "noise.png")
    return root / "runs", root / "images"


def command(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["compression.py", *map(str, arguments)])
    try:
        script.main()
        return 0
    except SystemExit as stop:  # of the option parser
        return stop.code


@pytest.mark.usefixtures("quick_speed")
def test_measures_two_models_and_writes_the_report(
    script: ModuleType,
    inputs: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs, images = inputs
    options = ["--data", images, "--out", tmp_path / "report", "--quick", "--device", "cpu"]
    models = ["--model", runs / "a" / "export", "--model", runs / "b" / "export"]
    assert command(script, monkeypatch, *models, *options) == 0
    report = Report.read(tmp_path / "report" / "report.json")
    assert list(report.models) == ["a", "b", "linear"] and set(report.codecs) == {
        "jpeg",
        "webp",
        "avif",
    }
    for model in report.models.values():  # 33 x 35 is padded to 34 x 36, latents 17 x 18
        assert model.rate.raw_bpp == pytest.approx(4 * 17 * 18 * 16 / (33 * 35))
        assert model.metrics.lpips_alex is not None and model.metrics.ms_ssim is None
    names = {path.name for path in (tmp_path / "report").iterdir() if path.name[0] != "."}
    assert names == {"report.json", "per_image.csv", "rate.png", "sheet.png"}
    assert "PSNR (dB)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--data": "imagez"}, "did you mean 'images'"),
        ({"--model": "runs/c/export"}, "c/export"),
        ({"--max_images": "0"}, "at least 1"),
        ({"--sheet_images": "0"}, "at least 1"),
        ({"--resolution": "0"}, "resolution must be at least 1"),
        ({"--device": "toaster"}, "toaster"),
        ({"--out": "images/noise.png"}, "noise.png"),
    ],
)
def test_wrong_options_are_one_sentence_and_exit_code_2(
    changed: dict[str, str],
    message: str,
    script: ModuleType,
    inputs: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(inputs[0].parent)
    options = {"--model": "runs/a/export", "--data": "images", "--out": "out", "--device": "cpu"}
    arguments = [part for option in (options | changed).items() for part in option]
    assert command(script, monkeypatch, *arguments, "--quick") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.parametrize("missing", ["--model", "--data", "--out"])
def test_missing_options_exit_with_code_2(
    missing: str,
    script: ModuleType,
    inputs: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    options = {"--model": inputs[0] / "a/export", "--data": inputs[1], "--out": tmp_path}
    arguments = [part for key in options if key != missing for part in (key, options[key])]
    assert command(script, monkeypatch, *arguments) == 2
