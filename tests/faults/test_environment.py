"""The commands where locale, home, temporary folder, terminal or output are not what one expects:
nothing ends in a traceback, and nothing that was asked for is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from tests.proofs.test_verify_resume import photos
from tests.tasks.autoencoder.small import as_flags, small_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
NOWHERE = "/proc/nowhere"  # not even root can make it
BARE = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
# Python takes UTF-8 for the C locale by itself; without that, every file is opened as ASCII.
STRICT = ASCII | {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
ENVIRONMENTS = {
    "C locale": ASCII,
    "C locale as it is": STRICT,
    "no home": {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE},
    "home unset, no TMPDIR, a column": {"TMPDIR": NOWHERE, "COLUMNS": "1", "LINES": "1"},
}
CLI = [sys.executable, "-m", "latentvae.cli"]
OUTPUT = {"closed": "exec {} >&-", "all closed": "exec {} <&- >&- 2>&-", "head": "{} | head -n 1"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names of other alphabets, one that is no UTF-8, and a broken file."""
    folder = photos(tmp_path_factory.mktemp("images") / "phötos")
    names = [b"\xff.png", "日本.png".encode(), "ü.png".encode(), b"line\nbreak.png"]
    for path, name in zip(sorted(folder.iterdir()), names, strict=False):
        os.rename(path, os.path.join(os.fsencode(folder), name))
    (folder / "zerbröselt.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("network") / "größe"
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder)
    return folder


def training(folder: Path, images: Path) -> list[str]:
    config = small_config(
        folder, train_data_dir=str(images), max_train_steps=2, max_bad_share=0.5, log_steps=1
    )
    return [sys.executable, "-m", "latentvae.cli.train", *as_flags(config)]


def run(
    command: list[str], environment: dict[str, str], *, shell: str = ""
) -> subprocess.CompletedProcess[bytes]:
    arguments = ["bash", "-c", shell.format('"$@"'), "bash", *command] if shell else command
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env=BARE | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=240,
    )
    said = (done.stdout + done.stderr).decode(errors="replace")
    for sign in ("Traceback", "Exception ignored", "Error:", "core dumped"):
        assert sign not in said, said
    return done


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_training(name: str, images: Path, tmp_path: Path) -> None:
    done = run(training(tmp_path / "läuft", images), ENVIRONMENTS[name])
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, said
    assert (tmp_path / "läuft" / "export" / "config.json").is_file()
    if name in ("C locale", "C locale as it is"):
        assert done.stdout.isascii()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_help_and_reconstruct(name: str, images: Path, network: Path, tmp_path: Path) -> None:
    for command in (["--help"], ["evaluate", "--help"]):
        done = run([*CLI, *command], ENVIRONMENTS[name])
        assert done.returncode == 0 and b"latentvae" in done.stdout.replace(b"\n", b"")
    out = tmp_path / "aus"
    command = [*CLI, "reconstruct", str(network), str(images), "--out", str(out)]
    done = run(command, ENVIRONMENTS[name])
    assert done.returncode == 0, done.stderr
    table = (out / "table.csv").read_text(encoding="utf-8")
    assert len(list(out.rglob("*.png"))) == len(list(images.iterdir())) - 1
    assert "日本" in table or "\\u65e5" in table or "\\udce6" in table


@pytest.mark.parametrize("kind", OUTPUT)
def test_output_that_nothing_reads(kind: str, images: Path, network: Path, tmp_path: Path) -> None:
    run([*CLI, "evaluate", "--help"], {}, shell=OUTPUT[kind])
    out = tmp_path / "out"
    command = [*CLI, "reconstruct", str(network), str(images), "--out", str(out)]
    run(command, {}, shell=OUTPUT[kind])
    assert (out / "table.csv").is_file()
    done = run(training(tmp_path / "run", images), {}, shell="set -o pipefail; " + OUTPUT[kind])
    if kind == "head":
        assert (
            done.returncode == 1 and b"error: nothing reads the output of this run" in done.stderr
        )
    else:
        assert done.returncode == 0
        assert (tmp_path / "run" / "export" / "config.json").is_file()
