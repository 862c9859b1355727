"""Reports beside one another: what may be compared, and the table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentvae.errors import UserError
from latentvae.report import Report, compare, markdown
from latentvae.report.paired import paired_difference

PROTOCOL = {
    "size": "own size",
    "latent": "mode",
    "lpips": {"alex": "0.1, weights aa"},
    "distribution": {},
    "bitstream": {"noise_psnr": [20]},
    "codecs": {"jpeg": {"qualities": [50]}},
    "versions": {"torch": "2.6"},
    "device": "cpu",
}


def report(psnr: float, *, name: str = "m", **changes: Any) -> Report:
    metrics = {"psnr": {"mean": psnr, "ci95": [psnr - 1, psnr + 1], "images": 3}}
    if "lpips_vgg" in changes:
        metrics["lpips_vgg"] = {"mean": changes["lpips_vgg"], "ci95": [0, 1], "images": 3}
    model = {
        "metrics": metrics,
        "rate": {"raw_bpp": 1.0, "points": [{"bpp": 0.5, "psnr": psnr}]},
        "distribution": {"images": {"kd_vgg": 3}, "kd_vgg": 0.25},
    }
    return Report.model_validate(
        {
            "protocol": PROTOCOL | changes.get("protocol", {}),
            "data": {"num_images": 3, "pixels_sha256_sum": changes.get("pixels", "ab")},
            "models": {name: model},
            "codecs": {},
            "bd_rate": {name: {"psnr": -12.3}},
        }
    )


def write(path: Path, *reports: Report) -> list[Path]:
    for number, each in enumerate(reports):
        (path / f"run{number}").mkdir()
        each.write(path / f"run{number}" / "report.json")
    return [path / f"run{number}" for number in range(len(reports))]


def shown(paths: list[Path], *, force: bool = False) -> str:
    """The tables as Markdown."""
    return "\n\n".join(map(markdown, compare(paths, force=force)))


def test_table_and_markdown_of_two_reports(tmp_path: Path) -> None:
    paths = write(tmp_path, report(30.126), report(float("inf"), lpips_vgg=0.12345))
    (table,) = compare(paths)  # without per_image.csv no paired differences
    assert markdown(table).splitlines()[:4] == [
        "| model | raw bpp | PSNR (dB) | LPIPS vgg | kd_vgg | BD-rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| run0: m | 1.000 | 30.13 \u00b11.00 | n/a | 0.25 | -12 % |",
        "| run1: m | 1.000 | exact (best) | 0.1235 \u00b10.5000 | 0.25 | -12 % |",
    ]
    file = tmp_path / "run1" / "report.json"
    (tmp_path / "other.json").write_bytes(file.read_bytes())
    assert "| other: m |" in shown([tmp_path / "run0", tmp_path / "other.json"])


def test_rows_are_named_after_models(tmp_path: Path) -> None:
    paths = write(tmp_path, report(30.0, name="taesd"), report(31.0, name="mine"))
    lines = shown(paths).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| taesd", "| mine"]
    assert "30.00 \u00b11.00 |" in lines[2] and "31.00 \u00b11.00 (best)" in lines[3]


def test_one_report_compares_its_models_image_by_image(tmp_path: Path) -> None:
    """A difference of 0.5 dB on every image is sure, though the intervals overlap."""
    one = report(30.0, name="a")
    one.models["=b"] = one.models["a"].model_copy(deep=True)
    (folder,) = write(tmp_path, one)
    rows = ["image,kind,coder,psnr,lpips_alex"]
    for i, psnr in enumerate((20.0, 30.0, 40.0)):
        rows.append(f"{i}.png,model,a,{psnr},0.{i}")
        rows.append(f"{i}.png,model,'=b,{psnr + 0.5},0.{(i + 1) % 3}")
        rows.append(f"{i}.png,codec,jpeg,99,0")
    (folder / "per_image.csv").write_text("\n".join([*rows, "3.png,model,a,50,0", ""]))
    values, differences = compare([folder])
    assert values.row_count == 2
    lines = markdown(differences).splitlines()
    assert lines[0] == "Difference from a on the same images (3 images)"
    assert lines[2] == "| model | PSNR (dB) | LPIPS alex |"
    assert lines[4].startswith(r"| =b | +0.50 \[+0.50, +0.50\] (clear) | +0.0000 ")
    assert "(clear)" not in lines[4].split("|")[3]


def test_a_paired_interval_is_that_of_the_mean() -> None:
    """Against the normal interval of the mean of many differences."""
    rng = np.random.default_rng(0)
    first = {str(i): value for i, value in enumerate(rng.normal(30, 5, 3000))}
    second = {name: value + rng.normal(0.1, 1) for name, value in first.items()}
    found = paired_difference(first, second | {"other": 1.0})
    deltas = np.array([second[name] - first[name] for name in first])
    error = 1.96 * deltas.std() / len(deltas) ** 0.5
    assert found is not None and found.images == 3000
    assert found.mean == pytest.approx(deltas.mean())
    assert found.low == pytest.approx(deltas.mean() - error, abs=0.003)
    assert found.high == pytest.approx(deltas.mean() + error, abs=0.003)
    assert paired_difference({"a": 1.0}, {"a": 2.0}) is None


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for run, psnr in (("a", 30.0), ("b", 31.0)):
        (tmp_path / run / "report").mkdir(parents=True)
        report(psnr).write(tmp_path / run / "report" / "report.json")
        paths.append(tmp_path / run / "report")
    lines = shown([paths[0], paths[1] / "report.json"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| a/report: m", "| b/report: m"]


def test_every_pair_must_be_alike(tmp_path: Path) -> None:
    """The first lacks VGG, as after --quick; the others have different weights of it."""
    nets = [{}, {"vgg": "0.1, weights cc"}, {"vgg": "0.1, weights dd"}]
    lpips = [{"lpips": {"alex": "0.1, weights aa"} | net} for net in nets]
    paths = write(tmp_path, *(report(30.0, protocol=changes) for changes in lpips))
    compare(paths[:2])
    with pytest.raises(UserError, match="lpips vgg"):
        compare(paths)


def test_names_with_bars_stay_in_their_cell(tmp_path: Path) -> None:
    first, second = report(30.0), report(31.0)
    first.models["a|b"] = first.models.pop("m")
    first.models["c"] = first.models["a|b"]
    assert "| a\\|b |" in shown(write(tmp_path, first, second))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": {"size": "64"}}, "size: own size in run0, 64 in run1"),
        ({"protocol": {"latent": "sample"}}, "latent: mode in run0"),
        ({"protocol": {"lpips": {"alex": "0.1, weights bb"}}}, "lpips alex"),
        ({"pixels": "cd"}, "images: 3 of sum ab"),
    ],
)
def test_unlike_protocols_are_refused_unless_forced(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    paths = write(tmp_path, report(30.0), report(31.0, **changes))
    with pytest.raises(UserError, match=f"{message}.*--force"):
        compare(paths)
    forced = shown(paths, force=True)
    assert forced.startswith("not measured alike") and "| run1: m | 1.000 | 31.00 " in forced


def test_what_does_not_touch_the_numbers_may_differ(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "versions": {"torch": "2.7"},
        "device": "cuda",
        "lpips": {"alex": "0.1, weights aa", "vgg": "0.1, weights cc"},
    }
    paths = write(tmp_path, report(30.0), report(31.0, protocol=changes))
    assert "BD-rate" in shown(paths)


def test_a_mean_over_fewer_images_has_their_number(tmp_path: Path) -> None:
    fewer = report(30.0, lpips_vgg=0.25)
    assert fewer.models["m"].metrics.lpips_vgg is not None
    fewer.models["m"].metrics.lpips_vgg.images = 2
    text = shown(write(tmp_path, fewer, report(31.0, lpips_vgg=0.5)))
    assert "0.2500 \u00b10.5000 (2 images) (best) |" in text and "0.5000 \u00b10.5000 |" in text


@pytest.mark.parametrize("changes", [{"bitstream": {"noise_psnr": [10, 20]}}, {"curves": "other"}])
def test_rates_of_other_settings_are_left_out(changes: dict[str, Any], tmp_path: Path) -> None:
    paths = write(tmp_path, report(30.0), report(31.0, protocol=changes))
    assert "BD-rate" not in shown(paths)


def test_what_is_no_report_is_told(tmp_path: Path) -> None:
    paths = write(tmp_path, report(30.0))
    with pytest.raises(UserError, match=r"at least 1 report \(got none\)"):
        compare([])
    with pytest.raises(UserError, match="given twice"):
        compare([*paths, paths[0] / "report.json"])
    damaged = report(30.0).model_copy(update={"data": {"num_images": "three"}})
    damaged.write(tmp_path / "damaged.json")
    with pytest.raises(UserError, match="its data or its protocol is damaged"):
        compare([*paths, tmp_path / "damaged.json"])
    with pytest.raises(UserError, match="cannot read '"):
        compare([*paths, tmp_path / "nothing.json"])
    for content in ("{", "[]", '{"schema_version": 2}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match="not a report of"):
            compare([*paths, tmp_path / "bad.json"])
