"""The command `latentvae`, on a run of one update."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data

import latentvae
from latentvae.cli.flags import parse_options
from latentvae.cli.main import main
from latentvae.cli.measure_commands import Evaluate
from latentvae.engine.resume import write_config
from tests.tasks.autoencoder.small import small_config

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by the command itself, in this process."""
    folder, options = tmp_path_factory.mktemp("cli") / "run", tmp_path_factory.mktemp("a [1]")
    config = small_config(folder, max_train_steps=1, gradient_accumulation_steps=1)
    write_config(config, options / "small.yaml")
    main(["train", "--config", str(options / "small.yaml"), "--log_steps", "1"])
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(data.astronaut()).resize((61, 47)).save(folder / "astronaut.png")
    (folder / "broken.jpg").write_bytes(b"<html>")
    return folder


def test_train_again_resumes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--config", str(run / "config.yaml")])
    assert "has made all its 1 updates" in capsys.readouterr().out
    assert latentvae.load(run / "export").f == 4


def test_export_writes_the_same_model_as_the_end_of_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "out"
    main(["export", str(run), "--out", str(out)])
    ours, theirs = load_file(out / WEIGHTS), load_file(run / "export" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (out / "config.json").read_text() == (run / "export" / "config.json").read_text()
    assert latentvae.load(out).f == 4


def test_export_replaces_only_when_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["export", str(run), "--out", str(out)])
    before = (out / "config.json").stat().st_ino
    assert "--overwrite" in refusal(["export", str(run), "--out", str(out)], capsys)
    assert (out / "config.json").stat().st_ino == before
    main(["export", str(run), "--out", str(out), "--overwrite"])
    assert (out / "config.json").stat().st_ino != before


def test_reconstruct_writes_pictures_and_a_table(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["reconstruct", str(run / "export"), str(photos), "--out", str(out)])
    with (out / "table.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["width"], row["height"]) == ("61", "47") and float(row["psnr"]) > 5
    assert Image.open(out / row["picture"]).height == 47
    assert "broken.jpg" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_speed")
def test_evaluate_and_compare(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One model twice, on its own and on the same images: the report is the same."""
    for name in ("a", "b"):
        command = ["evaluate", str(run / "export"), "--data", str(photos), "--quick"]
        main([*command, "--out", str(tmp_path / name), "--device", "cpu"])
    said = capsys.readouterr()
    assert "PSNR (dB)" in said.out and "[2/6] run: fitting" in said.err
    assert "left out: cannot read image" in said.err and "broken.jpg'" in said.err
    names = {path.name for path in (tmp_path / "a").iterdir() if path.name[0] != "."}
    assert names == {"report.json", "per_image.csv", "rate.png", "sheet.png"}
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | raw bpp | PSNR (dB) |")
    rows = dict(line.removeprefix("| ").split(" | ", 1) for line in lines[2:5])
    assert rows.keys() == {"a: run", "b: run", "linear"}
    assert rows["a: run"] == rows["b: run"] != rows["linear"]
    main([*command, "--out", str(tmp_path / "a"), "--device", "cpu"])
    assert "measured already" in capsys.readouterr().err


def test_encode_and_decode(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents, out = tmp_path / "latents", tmp_path / "out"
    encode = ["encode", str(run / "export"), "--data", str(photos), "--resolution", "16"]
    main([*encode, "--out", str(latents), "--device", "cpu"])
    said = capsys.readouterr().out
    assert "left out broken.jpg: not an image" in said
    assert "1 images in 1 shards" in said and "latents, 4 x 4 x 4 float16" in said
    assert "no classes: neither labels" in said
    main(["decode", str(latents), "--out", str(out), "--device", "cpu"])
    assert Image.open(out / "astronaut.png").size == (16, 16)
    assert "1 pictures in" in capsys.readouterr().out
    wrong = ["encode", str(run / "export"), "--data", str(photos), "--out", str(tmp_path / "n")]
    assert "resolution must be at least 4" in refusal([*wrong, "--resolution", "3"], capsys)
    sides = [*wrong, "--resolution", "64", "63"]
    assert "nearest multiples are 60 and 64" in refusal(sides, capsys)
    assert "another item_shape, resolution" in refusal(
        [*wrong[:-1], str(latents), "--resolution", "16", "20"], capsys
    )
    assert not (tmp_path / "n").exists()


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1, said
    return said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["exprt"],
            "no command 'exprt', only train, train-prior, train-flow, train-tiny, train-vae, "
            "reconstruct, evaluate, compare, export, convert, encode, decode, latents, sample, "
            "prove, likelihood, anomaly fit, anomaly score, preflight, verify-resume; did",
        ),
        (["export", "{}/rn", "--out", "{}/out"], "rn"),
        (["export", "{}/photos", "--out", "{}/out"], "photos' is not a run"),
        (["reconstruct", "{}/photo", "{}/photos", "--out", "{}/out"], "did you mean 'photos'?"),
        (["reconstruct", "{}/photos", "{}/photos", "--out", "{}/out"], "holds no config.json"),
        (["reconstruct", "{}/photos", "{}/photo", "--out", "{}/out"], "no image or folder"),
        (["evaluate", "{}/m", "--data", "{}/photos", "--out", "{}/out"], "no such model folder"),
        (["evaluate", "{}/m", "--data", "{}/photo", "--out", "{}/out"], "did you mean 'photos'?"),
        (
            ["encode", "{}/m", "--data", "{}/photos", "--out", "{}/out", "--resolution", "16"],
            "no such model folder",
        ),
        (
            ["encode", "{}/m", "--data", "{}/photo", "--out", "{}/out", "--resolution", "16"],
            "no such model folder",
        ),
        (["decode", "{}/photos", "--out", "{}/out"], "is not a folder of shards"),
        (["compare", "{}/photos"], "cannot read '"),
        (["compare", "{}/photos", "{}/photo"], "cannot read '"),
    ],
)
def test_wrong_commands_and_paths_are_one_sentence(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert said in refusal([text.format(tmp_path) for text in arguments], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "export"),
        (["--verison"], "--verison"),
        (["export", "run"], "--out"),
        (["export", "run", "--ot", "x"], "did you mean '--out'?"),
        (["export", "run", "--out", "x", "--overwrit"], "did you mean '--overwrite'?"),
        (["export", "run", "--out"], "--out"),
        (["export", "--out", "x"], "run"),
        (["evaluate", "m", "--data", "d"], "--out"),
        (["evaluate", "m", "--data", "d", "--out", "x", "--latent", "mean"], "mode"),
        (["evaluate", "m", "--data", "d", "--out", "x", "--quik"], "did you mean '--quick'?"),
        (["encode", "m", "--data", "d", "--out", "x"], "--resolution"),
        (["encode", "m", "--data", "d", "--out", "x", "--resolution", "x"], "['x']"),
        (["reconstruct", "m", "--out", "x"], "no images: give image files or folders"),
        (["evaluate", "m", "--data", "d", "--out", "x", "--quick", "true"], "'--quick'?"),
        (["decode", "d", "--out", "x", "--limt", "3"], "did you mean '--limit'?"),
        (["compare", "a", "b", "--markdwn"], "did you mean '--markdown'?"),
        (["train", "kl_small"], "did you mean '--config kl_small'?"),
        (["train", "--config", "kl_smal"], "did you mean 'kl_small'?"),
        (["train", "--resolutoin", "64"], "did you mean '--resolution'?"),
        (["train"], "train_data_dir is missing"),
        (["verify-resume"], "preset, or a YAML file"),
        (["verify-resume", "--kills", "2"], "preset, or a YAML file"),
        (["verify-resume", "kl_smal"], "did you mean 'kl_small'?"),
        (["verify-resume", "kl_small"], "train_data_dir is missing"),
        (["verify-resume", "kl_small", "--kils", "2"], "did you mean '--kills'?"),
        (["verify-resume", "kl_small", "--kills", "x"], "--kills"),
        (["verify-resume", "kl_small", "--kills", "0"], "kills must be at least 1 (got 0)"),
        (["verify-resume", "kl_small", "--num_codes", "8"], "no meaning for config kl_small"),
        (["verify-resume", "kl_small", "--config", "kl_f8"], "is already the config"),
        (["verify-resume", "kl_small", "--json", "/"], "'/' is a folder"),
        (
            ["verify-resume", "kl_small", "--train_data_dir", "samples", "--work_dir", "/"],
            "work_dir '/' cannot be made",
        ),
    ],
)
def test_wrong_options_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said.lower() in refusal(arguments, capsys).lower()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], ["reconstruct", "evaluate", "compare", "export"]),
        (["--help"], ["train", "train/train_kl.py", "train/train_vq.py", "demo_pipeline.py"]),
        (["train", "--help"], ["--config", "--train_data_dir", "--preflight", "kl_f8, "]),
        (["evaluate", "--help"], ["--quick", "--inception_weights", "JPEG, WebP and AVIF"]),
        (["export", "--help"], ["--out", "--overwrite"]),
        (["encode", "--help"], ["--resolution", "accelerate launch", "--label_column"]),
        (["decode", "--help"], ["--limit", "sha256"]),
        (["verify-resume", "--help"], ["--kills", "--processes", "latentvae train", "SIGKILL"]),
        (["reconstruct", "-h"], ["--out", "Hub id"]),
    ],
)
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(word in text for word in said)


def test_help_of_the_installed_command_loads_no_torch() -> None:
    code = (
        "import sys\nfrom latentvae.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as ended: print('torch' in sys.modules, ended.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False 0\n")


def test_a_model_may_follow_the_resolution() -> None:
    wanted = parse_options(
        Evaluate,
        ["--resolution", "64", "48", "model", "--data", "photos", "--out", "report"],
        prog="evaluate",
    )
    assert wanted.models == ("model",) and wanted.resolution == (64, 48)
