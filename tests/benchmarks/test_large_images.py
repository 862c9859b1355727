"""Large images: which ways are measured at which size."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_an_image_no_larger_than_a_tile_has_no_row_of_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("large_images")
    measured: list[tuple[str, int]] = []

    def measure(_options: object, call: str, way: str, size: int, folder: str) -> dict[str, float]:
        measured.append((way, size))
        script.save_file({"result": script.torch.zeros(1)}, Path(folder) / f"{way}.safetensors")
        return {"MiB": 1.0, "s": 1.0}

    monkeypatch.setattr(script, "_in_a_process", measure)
    monkeypatch.setattr(script, "_print_seam", lambda *_: None)
    script.run(script.Options(model="kl_small", sizes=(512, 520), json=tmp_path / "rows.json"))
    assert {size for way, size in measured if way == "tiles"} == {520}
    assert {size for way, size in measured if way == "stock"} == {512, 520}
    assert (tmp_path / "rows.json").read_text().count("512 px fp32: tiles") == 0
    assert (tmp_path / "rows.json").read_text().count("520 px fp32: tiles") == 4
