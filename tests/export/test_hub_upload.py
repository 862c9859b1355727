"""An upload to the Hub, against a stand-in on this machine."""

import re
import shlex
import socket
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from latentvae.errors import UserError
from latentvae.export.hub_upload import UploadError, check_access, check_repo_id, upload_export
from tests.export.hub_stand_in import TOKEN, HubStandIn

FILES = {
    "README.md": b"---\ntags:\n- vae\n---\n# a\n",
    "config.json": b"{}",
    "samples.png": bytes(range(256)) * 9,
    "diffusion_pytorch_model.safetensors": bytes(range(255, -1, -1)) * 5000,
}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def upload(export: Path, repo_id: str = "us/photos", *, private: bool = False) -> str:
    return upload_export(export, repo_id=repo_id, private=private, message="after update 9")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_every_file_arrives_byte_for_byte_in_one_commit(hub: HubStandIn, export: Path) -> None:
    assert upload(export) == f"{hub.address}/us/photos"
    assert hub.commits == [("after update 9", FILES)]
    assert len(hub.blobs) == 1 and len([a for a in hub.asked if a.startswith("PUT")]) == 1
    assert "POST /api/models/us/photos/commit/main" in hub.asked
    assert "visibility" not in hub.created[0] and "private" not in hub.created[0]


def test_a_bare_name_is_the_users_own_and_may_be_private(hub: HubStandIn, export: Path) -> None:
    assert upload(export, "photos", private=True) == f"{hub.address}/me/photos"
    assert hub.created[0].get("visibility") == "private" or hub.created[0]["private"] is True
    assert "POST /api/models/me/photos/commit/main" in hub.asked


@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize("path", ["/api/repos/create", "/api/models/us/photos/commit"])
def test_a_refusal_is_one_sentence_with_the_command_for_later(
    hub: HubStandIn, export: Path, path: str, status: int
) -> None:
    hub.refusals[path] = status
    with pytest.raises(UploadError) as refused:
        upload(export)
    said = str(refused.value)
    assert f"(status {status}" in said and f"`hf upload us/photos {export} .`" in said
    assert "\n" not in said and TOKEN not in said
    assert hub.commits == [] and {p.name: p.read_bytes() for p in export.iterdir()} == FILES


def test_the_command_for_later_keeps_it_private_and_takes_any_path(
    hub: HubStandIn, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refusals["/api/repos/create"] = 500
    folder = export.rename(export.with_name("my export"))
    with pytest.raises(UploadError) as refused:
        upload(folder, private=True)
    (command,) = re.findall("`(.*)`", str(refused.value))
    expected = ["hf", "upload", "us/photos", str(folder), ".", "--private"]
    assert shlex.split(command) == expected
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for private, flag in ((True, " --private"), (False, "")):
        with pytest.raises(UserError, match=rf"`hf upload us/photos EXPORT \.{flag}`"):
            check_access("us/photos", private=private)


def test_a_dead_port_is_one_sentence(
    hub: HubStandIn, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(
        UploadError, match=r"its upload to the Hub failed \(Connect.*hf upload"
    ) as refused:
        upload(export)
    assert "\n" not in str(refused.value)
    doubt = check_access("us/photos")
    assert doubt is not None and "cannot be reached now (Connect" in doubt


def test_access_is_asked_once_and_changes_nothing(hub: HubStandIn) -> None:
    assert check_access("us/photos") is None
    assert check_access("photos") is None
    assert hub.asked == ["GET /api/whoami-v2"] * 2


def test_anothers_repository_is_doubted(hub: HubStandIn) -> None:
    doubt = check_access("uss/photos")
    assert doubt == "'uss' of hub_model_id 'uss/photos' is not one of your accounts (me, us)."


def test_what_is_sure_to_fail_is_refused_before_any_work(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.role = "read"
    with pytest.raises(UserError, match="may only read"):
        check_access("us/photos")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="does not know the token"):
        check_access("us/photos")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="run `hf auth login`, or set HF_TOKEN"):
        check_access("us/photos")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        check_access("us/photos")


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_hub_that_is_down_at_the_start_stops_nothing(hub: HubStandIn, status: int) -> None:
    hub.refusals["/api/whoami-v2"] = status
    doubt = check_access("us/photos")
    assert doubt is not None and f"(status {status}" in doubt and "\n" not in doubt


@pytest.mark.parametrize("repo_id", ["photos", "me/my-photos_1.5"])
def test_names_of_repositories(repo_id: str) -> None:
    check_repo_id(repo_id)


@pytest.mark.parametrize(
    ("repo_id", "near"),
    [
        ("me/my photos", "'me/my-photos'"),
        ("first run!", "'first-run'"),
        ("a/b/c", "'a/c'"),
        ("a--b", "'a-b'"),
        ("", "Allowed are"),
    ],
)
def test_what_cannot_name_a_repository_is_told_with_one_that_can(repo_id: str, near: str) -> None:
    with pytest.raises(UserError, match="must be owner/name") as refused:
        check_repo_id(repo_id)
    assert near in str(refused.value)
