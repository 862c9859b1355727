"""A run that ends on the Hub, which is a stand-in on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from latentvae.cli.main import main
from latentvae.cli.train import run_training
from latentvae.engine import loop
from latentvae.errors import UserError
from latentvae.export.hub_upload import UploadError
from latentvae.tasks.autoencoder import train
from tests.export.hub_stand_in import TOKEN, HubStandIn
from tests.forks import ended_ranks
from tests.tasks.autoencoder.small import as_flags, small_config


def config(folder: Path, **changes: Any) -> Any:
    options = {"push_to_hub": True, "hub_model_id": "us/photos", "max_train_steps": 1}
    return small_config(folder, **options | changes)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def status(arguments: Sequence[str], command: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        command(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_finished_run_is_uploaded_and_again_without_training(
    hub: HubStandIn,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    export = train(config(folder, report_to="tensorboard"))
    assert hub.commits == [("Autoencoder after update 1", content(export))]
    assert {"README.md", "config.json", "samples.png"} < hub.commits[0][1].keys()
    assert f"uploaded to {hub.address}/us/photos" in capsys.readouterr().out
    assert 'from_pretrained("us/photos")' in (export / "README.md").read_text()
    for path in folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path

    monkeypatch.setattr(loop, "_train", None)
    hub.commits.clear(), hub.blobs.clear()
    train(config(folder, hub_model_id="me/other", hub_private_repo=True))
    assert hub.commits == [("Autoencoder after update 1", content(export))]
    assert "POST /api/models/me/other/commit/main" in hub.asked


def test_without_an_id_the_run_gives_its_name(hub: HubStandIn, tmp_path: Path) -> None:
    train(config(tmp_path / "photos-f4", hub_model_id=None))
    assert "POST /api/models/me/photos-f4/commit/main" in hub.asked


def test_an_upload_that_fails_loses_nothing_and_exits_with_1(
    hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    hub.refusals["/api/repos/create"] = 500
    code = status(as_flags(config(folder)), lambda flags: run_training(flags, description=""))
    said = capsys.readouterr().err
    assert code == 1 and said.count("error:") == 1
    assert f"Upload the export later with `hf upload us/photos {folder / 'export'} .`" in said
    assert (folder / "export" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "checkpoint-1" / "manifest.json").is_file()
    hub.refusals.clear()
    run_training(as_flags(config(folder)), description="")
    assert hub.commits == [("Autoencoder after update 1", content(folder / "export"))]


@pytest.mark.parametrize(
    ("repo_id", "said"),
    [("me/my photos", "Try 'me/my-photos'"), (None, "Try 'my-run'")],
)
def test_a_wrong_repository_is_refused_before_any_work(
    hub: HubStandIn, tmp_path: Path, repo_id: str | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        train(config(tmp_path / "my run", hub_model_id=repo_id))
    assert hub.asked == [] and not list(tmp_path.iterdir())


def test_no_login_is_refused_before_any_work_and_a_dead_hub_is_not(
    hub: HubStandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        with pytest.raises(UserError, match="needs a login"):
            train(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard, which none serves
    with pytest.raises(UploadError):
        train(config(tmp_path / "run"))
    assert "the Hub cannot be reached now" in capsys.readouterr().out
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_the_export_command_uploads(
    hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "photos", tmp_path / "out"
    train(config(run, push_to_hub=False, hub_model_id=None))
    assert hub.asked == []
    main(["export", str(run), "--out", str(out), "--push_to_hub", "--hub_private_repo"])
    assert hub.commits == [("Autoencoder after update 1", content(out))]
    assert hub.created[0]["name"] == "photos"
    hub.refusals["/api/models"] = 403
    export = ["export", str(run), "--out", str(out), "--overwrite", "--push_to_hub"]
    assert status(export, main) == 1
    assert "403" in capsys.readouterr().err


def test_the_card_names_no_folder_of_this_machine(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a fine-tuning on a local base, whose network is larger than the training images."""
    base = train(config(tmp_path / "first", push_to_hub=False, resolution=64))
    monkeypatch.chdir(tmp_path)
    export = train(
        config(
            tmp_path / "second",
            pretrained_model_name_or_path=str(base),
            validation_data_dir="samples",
            cache_dir=str(tmp_path / "cache"),
        )
    )
    card = ModelCard.load(export / "README.md")
    assert str(tmp_path) not in card.content and "first" not in card.content
    assert "Fine-tuned from export." in card.text and "at 32 pixels" in card.text
    assert card.data.library_name == "diffusers" and card.data.get("base_model") is None
    options = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert options["pretrained_model_name_or_path"] == "export"
    assert options["learning_rate"] == 1e-3 and "output_dir" not in options
    assert not {name for name in options if "hub" in name or "cache" in name}


@pytest.mark.slow
@pytest.mark.parametrize("refused", [False, True])
def test_of_two_processes_one_uploads(hub: HubStandIn, tmp_path: Path, refused: bool) -> None:
    if refused:
        hub.refusals["/api/models/us/photos/commit"] = 403
    options = {"push_to_hub": True, "hub_model_id": "us/photos", "train_batch_size": 2}
    flags = as_flags(small_config(tmp_path / "run", **options))
    codes, text = ended_ranks(
        lambda: run_training(flags, description=""), output=tmp_path / "output.txt"
    )
    if refused:
        assert codes == [1, 0] and "hf upload us/photos" in text and TOKEN not in text
    else:
        assert codes == [0, 0] and text.count("uploaded to") == 1
        assert [files for _, files in hub.commits] == [content(tmp_path / "run" / "export")]
    assert hub.asked.count("POST /api/repos/create") == 1
    assert hub.asked.count("GET /api/whoami-v2") == 1
