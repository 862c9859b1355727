"""A checkpoint that was damaged, or written by something else: the run goes on from the one before
and says so, or ends in one sentence; never otherwise than it would have."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from latentvae.cli import train as command_line
from latentvae.engine import loop
from latentvae.engine.checkpoint_content import take_snapshot
from latentvae.engine.checkpoint_files import load_checkpoint
from latentvae.engine.log import Window
from latentvae.engine.progress import Progress, SavedValues, checked_values
from latentvae.engine.training import Training
from latentvae.errors import UserError
from latentvae.losses.perceptual import load_lpips
from latentvae.tasks.autoencoder import build_parts as building
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.state import AutoencoderState
from tests.tasks.autoencoder.small import as_flags, small_config

pytestmark = pytest.mark.usefixtures("own_accelerate")

FILES = (
    "model.safetensors",
    "model_average.safetensors",
    "model_optimizer.safetensors",
    "discriminator.safetensors",
    "discriminator_optimizer.safetensors",
    "state.json",
    "manifest.json",
)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80  # in the manifest no text any more, whichever digit it hits
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": _flip,
    "a folder": _folder,
}


def _few_at_once(*, files: bool) -> list[Any]:
    """One damage of each file, or one alone; the other pairs are slow in their number."""
    slow = pytest.mark.slow
    if not files:
        return [pytest.param(kind, marks=[slow] if i else []) for i, kind in enumerate(DAMAGES)]
    return [
        pytest.param(file, kind, marks=[] if j == i % len(DAMAGES) else [slow])
        for i, file in enumerate(FILES)
        for j, kind in enumerate(DAMAGES)
    ]


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory, own_accelerate: None) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(small_config(folder, max_train_steps=4, validation_steps=4, disc_start=0.0))
    shutil.rmtree(folder / "export")
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A run with checkpoints 2 and 4 of its six updates."""
    return shutil.copytree(_finished, tmp_path / "run")


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Training, Window]]:
    """What a command line builds and restores, in the place of its training."""
    found: list[tuple[Training, Window]] = []

    def taken(training: Training, window: Window) -> None:
        found.append((training, window))
        raise _Enough

    monkeypatch.setattr(loop, "_train", taken)
    return found


@pytest.fixture(autouse=True)
def _trunk_read_once(monkeypatch: pytest.MonkeyPatch, _trunk: torch.nn.Module) -> None:
    monkeypatch.setattr(building, "load_lpips", lambda *_, **__: copy.deepcopy(_trunk))


@pytest.fixture(scope="module")
def _trunk() -> torch.nn.Module:
    return load_lpips("alex")


class _Enough(Exception):
    pass


def resume(folder: Path, **changes: Any) -> None:
    config = small_config(folder, max_train_steps=6, validation_steps=4, disc_start=0.0, **changes)
    command_line.run_training(as_flags(config), description="")


def test_the_files_are_all_that_a_checkpoint_has(finished: Path) -> None:
    assert {path.name for path in (finished / "checkpoint-4").iterdir()} == set(FILES)


@pytest.mark.parametrize(("file", "damage"), _few_at_once(files=True))
def test_every_damage_of_every_file_falls_back_and_says_so(
    file: str,
    damage: str,
    finished: Path,
    resumed: list[tuple[Training, Window]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    DAMAGES[damage](finished / "checkpoint-4" / file)
    with pytest.raises(_Enough):
        resume(finished)
    said = capsys.readouterr().out
    assert f"checkpoint-4 is skipped: {file} " in said
    assert f"resuming from {finished / 'checkpoint-2'}" in said
    ((training, window),) = resumed
    good = load_checkpoint(finished / "checkpoint-2")
    snapshot = take_snapshot(training, window)
    assert json.loads(json.dumps(snapshot.values)) == good.values
    assert snapshot.tensors.keys() == good.tensors.keys()
    for name, values in good.tensors.items():
        assert values.keys() == snapshot.tensors[name].keys() and values
        assert all(torch.equal(value, snapshot.tensors[name][key]) for key, value in values.items())
    assert (finished / "aside-checkpoint-4").is_dir()


@pytest.mark.parametrize("damage", _few_at_once(files=False))
def test_where_all_are_damaged_it_starts_anew_and_says_so(
    damage: str,
    finished: Path,
    resumed: list[tuple[Training, Window]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in (2, 4):
        DAMAGES[damage](finished / f"checkpoint-{number}" / "model_optimizer.safetensors")
    with pytest.raises(_Enough):
        resume(finished)
    said = capsys.readouterr().out
    assert said.count("is skipped: model_optimizer.safetensors ") == 2
    assert f"starting a new run in {finished}" in said and resumed[0][0].progress.update == 0


@pytest.mark.parametrize("damage", _few_at_once(files=False))
def test_a_damaged_one_that_was_asked_for_is_one_sentence(
    damage: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](finished / "checkpoint-4" / "model_average.safetensors")
    file = f"'{finished / 'checkpoint-4'}' cannot be used: model_average.safetensors "
    refused = _refused(finished, capsys, resume_from_checkpoint="checkpoint-4")
    assert refused.startswith(f"error: checkpoint {file}")


def _refused(folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """The one line of a command that exits with 2."""
    with pytest.raises(SystemExit) as ended:
        resume(folder, **changes)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    return line


def forge(checkpoint: Path, values: Any) -> None:
    """Write a state, and the hash and size of it into the manifest."""
    content = json.dumps(values).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


WRONG: tuple[Any, ...] = (None, "text", -1, 1.5, True, 10**30, [], [3], {"a": "b"}, [[{}]])
HARMLESS = {  # of the right type after all
    "identity": [{"a": "b"}],
    "versions": [{"a": "b"}],
    "task": [{"a": "b"}],  # the task's own class looks at it
    "mixed_precision": ["text"],
    "discriminator_stopped": [None],
    "bad_images": [[]],
}


def test_a_forged_state_is_refused_whatever_it_says(finished: Path) -> None:
    """Each entry gone, of another type, or one too many; the sentence names it."""
    good = load_checkpoint(finished / "checkpoint-4").values
    checked_values(SavedValues, good)
    checked_values(AutoencoderState, good["task"])
    not_utf8 = {"bad_images": [["caf\udce9.jpg", "no image"]]}
    checked_values(AutoencoderState, good["task"] | not_utf8)
    models: list[tuple[type[BaseModel], Any]] = [
        (SavedValues, good),
        (Progress, good["progress"]),
        (AutoencoderState, good["task"]),
    ]
    for model, values in models:
        assert set(values) == set(model.model_fields)
        forged = [(name, values | {name: wrong}) for name in values for wrong in _wrong(name)]
        forged.append(("extra", values | {"extra": 1}))
        forged += [(name, {k: v for k, v in values.items() if k != name}) for name in values]
        for name, other in forged:
            with pytest.raises(UserError, match=f"{name}|processes"):
                checked_values(model, other)


def _wrong(name: str) -> list[Any]:
    harmless = HARMLESS.get(name, [])
    return [value for value in WRONG if not any(value is h or value == h for h in harmless)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["windows"].append({}), "windows: 2 of 1 processes"),
        (lambda v: v["windows"][0].update({"loss/rec": [1.0]}), r"windows.0.loss/rec"),
        (lambda v: v["ranks"][0]["units"].pop(), "units: not 3 x 4 sums"),
        (
            lambda v: v["ranks"][0]["units"][0].__setitem__(0, -1.0),
            "units: a count is not",
        ),
        (lambda v: v["ranks"][0]["units"][1].append(0.0), "units: not 3 x 4 sums"),
        (lambda v: v["task"]["bad_images"].append(["a.png"]), "bad_images.0"),
        (
            lambda v: v["task"]["watch"]["conditions"]["discriminator_won"].update(extra=1),
            "conditions",
        ),
        (lambda v: v["task"]["kl_target"].update(error=float("inf")), "kl_target.error"),
        (lambda v: v["progress"].update(update=3), "its state.json is of update 3"),
        (lambda v: v.update(average_steps={}), "average_steps of model is missing"),
        (lambda v: v.update(update=4), "written by another version of latentvae"),
    ],
)
def test_a_forged_entry_is_named(
    change: Callable[[Any], object], said: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = copy.deepcopy(load_checkpoint(finished / "checkpoint-4").values)
    change(values)
    forge(finished / "checkpoint-4", values)
    assert said in _refused(finished, capsys)


def test_a_renamed_checkpoint_is_passed_over(
    finished: Path, resumed: list[tuple[Training, Window]], capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "checkpoint-4").rename(finished / "checkpoint-5")
    with pytest.raises(_Enough):
        resume(finished)
    assert "checkpoint-5 is skipped: manifest.json is of update 4" in capsys.readouterr().out
    assert resumed[0][0].progress.update == 2
