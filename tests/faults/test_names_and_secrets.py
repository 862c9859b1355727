"""Names are text wherever they are shown, and passwords are nowhere."""

from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from latentvae.cli.main import main
from latentvae.data import DatasetSpec, open_source
from latentvae.errors import UserError
from latentvae.models import load_network
from latentvae.report.comparison import markdown
from latentvae.text import markdown_text
from tests.data.conftest import picture
from tests.faults.places import kl
from tests.tasks.autoencoder.small import small_config
from tests.tiny import spread_vq

CANARY = "canary-7f3a"
ADDRESS = f"https://me:{CANARY}@host/a"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY")
HOSTILE = "a|b`c`<img src=x>[d](javascript:e)\n# f\x1b[31m"


def test_markdown_shows_names_as_text() -> None:
    shown = markdown_text(HOSTILE)
    assert shown.isprintable()
    for character in "|`<>[]":
        places = [i for i, c in enumerate(shown) if c == character]
        assert places and all(shown[i - 1] == "\\" for i in places)


def test_a_hostile_name_is_one_cell_of_a_markdown_table() -> None:
    table = Table("model", "PSNR")
    table.add_row(HOSTILE.replace("[", "\\["), "30.0")
    lines = markdown(table).splitlines()
    assert len(lines) == 3 and lines[2].replace("\\|", "").count("|") == 3


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: small_config(folder, dataset_name=ADDRESS, train_data_dir=None),
        lambda folder: small_config(folder, train_data_dir=ADDRESS),
        lambda folder: small_config(folder, pretrained_model_name_or_path=ADDRESS),
        lambda folder: load_network(ADDRESS),
        lambda folder: open_source(ADDRESS),
        lambda folder: DatasetSpec(name=ADDRESS),
    ],
)
def test_an_address_with_a_password_is_refused_without_it(use: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a password") as error:
        use(tmp_path)
    assert CANARY not in str(error.value) and not any(tmp_path.iterdir())


def test_no_sentence_repeats_a_password() -> None:
    said = str(UserError(f"cannot read {ADDRESS}: 404 for hf://x:{CANARY}@y"))
    assert CANARY not in said and "https://***@host/a" in said


@pytest.mark.slow
def test_tokens_of_the_environment_are_in_no_file_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from latentvae import train

    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)
    train(small_config(tmp_path / "run", report_to="tensorboard", max_train_steps=2))
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"log.jsonl", "config.yaml", "README.md"} <= {path.name for path in written}
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "latents"])
def test_tokens_of_the_environment_are_in_no_shard_and_no_evaluation(
    kind: str,
    tmp_path: Path,
    own_caches: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)
    model, data, out = (str(tmp_path / name) for name in ("model", "photos", "out"))
    (spread_vq() if kind == "tokens" else kl()).save_pretrained(model)
    Path(data).mkdir()
    for number in range(2):
        picture(40, 36, seed=number).save(f"{data}/{number}.png")
    main(["encode", model, "--data", data, "--out", f"{out}/shards", "--resolution", "32"])
    main(["decode", f"{out}/shards", "--out", f"{out}/pictures"])
    main(["evaluate", model, "--data", data, "--out", f"{out}/report", "--quick"])
    written = [path for path in Path(out).rglob("*") if path.is_file()]
    assert {"manifest.json", "report.json", "per_image.csv"} <= {path.name for path in written}
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
    said = capfd.readouterr()
    assert "shards" in said.out + said.err and CANARY not in said.out + said.err
