"""A checkpoint is whole or it is not there."""

import json
import os
from pathlib import Path

import pytest
import torch

from latentvae.engine.checkpoint_files import (
    Snapshot,
    checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    newest_usable,
    optimizer_tensors,
    save_checkpoint,
    sweep_temporary,
)
from latentvae.errors import UserError


def snapshot(value: float = 0.0) -> Snapshot:
    return Snapshot(tensors={"model": {"w": torch.full((3, 2), value)}}, values={"update": value})


def test_round_trip_and_modes(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        folder = save_checkpoint(tmp_path, snapshot(2.0), update=2, keep=5)
    finally:
        os.umask(umask)
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((3, 2), 2.0)) and loaded.values == {
        "update": 2.0
    }
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o640"}


def test_rotation_counts_by_update_not_by_name(tmp_path: Path) -> None:
    for update in (8, 9, 10, 100):
        save_checkpoint(tmp_path, snapshot(), update=update, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_damaged_one_is_named_and_passed_over(tmp_path: Path, name: str, kind: str) -> None:
    good = save_checkpoint(tmp_path, snapshot(), update=1, keep=5)
    bad = save_checkpoint(tmp_path, snapshot(), update=2, keep=5)
    damage(bad / name, kind)
    if name == "manifest.json" and kind == "flipped":  # the last byte of JSON is its brace
        assert not (bad / name).read_text().endswith("}")
    found, faults = newest_usable(tmp_path)
    assert found == good and len(faults) == 1 and name in faults[0]
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_checkpoint(bad)


def test_a_half_written_one_is_never_read_and_swept_away(tmp_path: Path) -> None:
    half = tmp_path / "checkpoint-7.tmp-1234"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert newest_usable(tmp_path) == (None, [])
    sweep_temporary(tmp_path)
    assert not half.exists()


def test_a_killed_export_is_swept_away_too(tmp_path: Path) -> None:
    for name in (".export.writing-12", ".export.replaced-12", "export"):
        (tmp_path / name).mkdir()
    sweep_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_no_checkpoint_is_written_over(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, snapshot(1.0), update=1, keep=1)
    with pytest.raises(AssertionError, match="is there already"):
        save_checkpoint(tmp_path, snapshot(2.0), update=1, keep=1)
    assert torch.equal(load_checkpoint(folder).tensors["model"]["w"], torch.full((3, 2), 1.0))


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, snapshot(), update=1, keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentvae.engine.checkpoint_files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, snapshot(), update=2, keep=1)
    found, _ = newest_usable(tmp_path)
    assert found is not None and found.name == "checkpoint-1"


def test_optimizer_state_continues_to_the_bit_in_any_memory_format() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)

    def steps(module: torch.nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            optimizer.zero_grad()
            module(torch.randn(2, 3, 5, 5)).square().mean().backward()
            optimizer.step()

    straight, optimizer = make()
    steps(straight, optimizer, range(6))
    first, optimizer = make()
    steps(first, optimizer, range(3))
    saved = {
        name: value.clone().contiguous()
        for name, value in optimizer_tensors(optimizer, first).items()
    }
    weights = {name: value.clone() for name, value in first.state_dict().items()}
    resumed, optimizer = make()
    resumed.load_state_dict(weights)
    load_optimizer_tensors(optimizer, resumed, saved)
    steps(resumed, optimizer, range(3, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True)
    )


def test_the_manifest_is_json_with_hashes(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, snapshot(), update=1, keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "state.json"}
    assert all(len(entry["sha256"]) == 64 for entry in manifest["files"].values())
