"""In every place where a file is read: a clear sentence that names it, no code run, no wait."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from latentvae.cli.main import main
from latentvae.data import UnreadableImage
from latentvae.data.hub_datasets import cell_bytes
from latentvae.engine.checkpoint_files import load_checkpoint, newest_usable
from latentvae.errors import UserError
from latentvae.latents.decode import picture_names
from tests.faults import damage
from tests.faults.places import PLACES, Place, values_of

pytestmark = [pytest.mark.usefixtures("own_caches"), pytest.mark.timeout(60)]
Folders = Callable[[str], Path]


def refusal(place: Place, folder: Path) -> str | None:
    """The one sentence of the refusal; None if it is read. Anything else raises."""
    try:
        place.read(folder)
    except UserError as error:
        text = str(error)
        assert text.isprintable() and text.encode() and 0 < len(text) < 1500, text
        return text
    return None


def names(text: str, place: Place, folder: Path) -> bool:
    """Whether a sentence says which file or folder it is about."""
    return Path(place.file).name in text or str(folder) in text


@pytest.mark.parametrize("name", [name for name, place in PLACES.items() if place.made_good])
def test_the_good_file_is_read(name: str, place_folder: Folders) -> None:
    assert refusal(PLACES[name], place_folder(name)) is None


@pytest.mark.parametrize("name", PLACES)
def test_bytes_of_every_wrong_kind(name: str, place_folder: Folders, ran: Path) -> None:
    """Refused, but for texts that are still texts when cut and places that can do without."""
    place, read = PLACES[name], set[str]()
    texts = {"": {}, "json": damage.JSON, "yaml": damage.YAML}[place.text]
    changes = damage.BYTES | {kind: _always(content) for kind, content in texts.items()}
    for kind, change in changes.items():
        folder = place_folder(name)
        file = folder / place.file
        file.write_bytes(change(file.read_bytes()))
        text = refusal(place, folder)
        assert not ran.exists(), kind
        if text is None:
            read.add(kind)
        else:
            assert names(text, place, folder), (kind, text)
    assert read <= place.may_read or place.lenient, read


def _always(content: bytes) -> Callable[[bytes], bytes]:
    return lambda _: content


@pytest.mark.parametrize("name", PLACES)
def test_what_lies_in_the_place_of_a_file(name: str, place_folder: Folders) -> None:
    place, read = PLACES[name], set[str]()
    for kind, change in damage.IN_ITS_PLACE.items():
        if kind == "no permission" and os.geteuid() == 0:
            continue  # root may read everything
        folder = place_folder(name)
        change(folder / place.file)
        if (text := refusal(place, folder)) is None:
            read.add(kind)
        else:
            assert names(text, place, folder), (kind, text)
    gone = {"missing", "a link to nothing", "a link to itself"}
    assert place.lenient or read <= (gone if place.optional else set()), read


@pytest.mark.parametrize("name", PLACES)
def test_a_flipped_bit_is_noticed_or_harmless(name: str, place_folder: Folders) -> None:
    """In the middle of the file, and where chance has it; never anything but a sentence."""
    place = PLACES[name]
    content = (place_folder(name) / place.file).read_bytes()
    draw = random.Random(0)
    for position in [None, *(draw.randrange(len(content)) for _ in range(4))]:
        folder = place_folder(name)
        (folder / place.file).write_bytes(damage.flipped(content, position))
        text = refusal(place, folder)
        assert text is not None or position is not None or place.flip == "unnoticed"


@pytest.mark.parametrize("name", [name for name, place in PLACES.items() if place.text])
def test_entries_of_wrong_types(name: str, place_folder: Folders, ran: Path) -> None:
    place = PLACES[name]
    values = values_of(place, place_folder(name))
    for changed in damage.wrong_values(values, count=12):
        folder = place_folder(name)
        text = json.dumps(changed) if place.text == "json" else yaml.safe_dump(changed)
        (folder / place.file).write_text(text)
        refusal(place, folder)
    assert not ran.exists()


CALLS: dict[str, Callable[[Path], list[str]]] = {
    "export config": lambda f: ["convert", str(f), "--out", str(f / "x.safetensors")],
    "report": lambda f: ["compare", str(f / "a"), str(f / "b")],
    "shard manifest": lambda f: ["decode", str(f / "shards"), "--out", str(f / "pictures")],
    "config of a run": lambda f: ["export", str(f), "--out", str(f / "x")],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["html", "pickle", "a named pipe", "a folder"])
def test_commands_say_it_in_one_line_and_exit_with_2(
    name: str, kind: str, place_folder: Folders, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place_folder(name)
    file = folder / PLACES[name].file
    if kind in damage.BYTES:
        file.write_bytes(damage.BYTES[kind](file.read_bytes()))
    else:
        damage.IN_ITS_PLACE[kind](file)
    with pytest.raises(SystemExit) as exit_code:
        main(CALLS[name](folder))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert exit_code.value.code == 2 and len(lines) == 1 and "Traceback" not in error
    assert not ran.exists()


@pytest.mark.parametrize(
    "path",
    [
        "reference://a.png::/data/refs.json",
        "sftp://host/a.png",
        "simplecache::https://host/a.png",
        "git://x:main@/a.png",
        "a\0.png",
    ],
)
def test_a_cell_of_a_table_reaches_no_other_file_system(path: str) -> None:
    """Some start programs, log in elsewhere or, in versions of fsspec, run templates."""
    with pytest.raises(UnreadableImage, match=r"tables may not name images|null byte"):
        cell_bytes({"bytes": None, "path": path}, "a.png")


def test_names_in_shards_make_pictures_inside_the_folder() -> None:
    given = [
        "../../x.png",
        "/etc/x",
        "a\0b.png",
        "n" * 5000,
        "n" * 5001,
        "a\n\x1b[31mb.png",
        "..",
        "",
    ]
    written = picture_names(given)
    assert len(set(written)) == len(given)
    for name in written:
        parts = name.split("/")
        assert ".." not in parts and "" not in parts and "\0" not in name
        assert all(len(os.fsencode(part)) < 230 for part in parts) and name.isprintable()


def test_a_manifest_of_a_checkpoint_names_no_file_elsewhere(place_folder: Folders) -> None:
    folder = place_folder("checkpoint manifest")
    outside = folder / "outside.json"
    os.mkfifo(outside)  # which would be waited for
    path = folder / "checkpoint-2" / "manifest.json"
    for name in ("../outside.json", str(outside), "x/../../outside.json", "a\0b", "n" * 5000):
        manifest = json.loads(path.read_text())
        manifest["files"] = {name: {"size": 0, "sha256": ""}} | manifest["files"]
        path.write_text(json.dumps(manifest))
        assert newest_usable(folder)[0] is None


def test_weights_that_no_manifest_lists_are_not_read(place_folder: Folders) -> None:
    folder = place_folder("checkpoint manifest") / "checkpoint-2"
    (folder / "discriminator.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"discriminator\.safetensors is not in manifest\.json"):
        load_checkpoint(folder)
