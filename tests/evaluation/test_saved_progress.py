"""An evaluation that is stopped goes on, and gives what an unbroken one gives."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import VQModel
from PIL import Image

from latentvae.autoencoder import Autoencoder
from latentvae.errors import UserError
from latentvae.evaluation import METRICS_ONLY, Plan, evaluate, examinations
from latentvae.evaluation.saved_progress import Progress
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.report import Report
from tests.evaluation.conftest import Photos, evaluate_module, photo
from tests.evaluation.pixel_networks import Fault, pixels

PLAN = replace(METRICS_ONLY, qualities=(30,), noise_psnr=(30,), prior_images=2, gain_images=1)
PICTURES = [photo(40, 32, left=left) if left != 60 else None for left in range(0, 120, 20)]


class Killed(BaseException):
    pass


class Fragile(Photos):
    """Kills the process that reads one of its pictures while measuring."""

    def __init__(self, *pictures: Image.Image | None) -> None:
        super().__init__(*pictures)
        self.measuring, self.killer = False, -1

    def read(self, index: int, /, *, at_least: int | None = None) -> Image.Image:
        if self.measuring and index == self.killer:
            raise Killed
        return super().read(index)


@pytest.fixture(autouse=True)
def _save_always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(evaluate_module, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(evaluate_module, "rate_figure", lambda report, path: None)
    yield


@pytest.fixture(scope="module")
def trunks() -> dict[str, PerceptualLoss]:
    return {net: PerceptualLoss(load_lpips(net)) for net in ("alex", "vgg")}


def models() -> dict[str, Autoencoder]:
    blocks = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    vq = VQModel(
        3,
        3,
        *blocks,
        (8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    return {"pixels": pixels(Fault(offset=0.1)), "vq": Autoencoder(vq, name="vq")}


def measure(
    nets: dict[str, Autoencoder], source: Any, out: Path, trunks: Any, plan: Plan = PLAN, **kw: Any
) -> Report:
    return evaluate(nets, source, out, data_name="photos", lpips=trunks, plan=plan, **kw)


@pytest.mark.parametrize(
    "killer",
    [1, *(pytest.param(killer, marks=pytest.mark.slow) for killer in (0, 5))],
)
def test_a_stop_and_a_second_start_give_the_unbroken_report(
    killer: int, tmp_path: Path, trunks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = models()
    whole = measure(nets, Photos(*PICTURES), tmp_path / "whole", trunks)
    fragile = Fragile(*PICTURES)

    def then_fragile(*_: Any) -> Any:
        fragile.measuring, fragile.killer = True, killer
        return range_of(*_)

    from latentvae.evaluation.evaluate import _Evaluation

    range_of = _Evaluation._bar
    monkeypatch.setattr(_Evaluation, "_bar", then_fragile)
    with pytest.raises(Killed):
        measure(nets, fragile, tmp_path / "broken", trunks)
    monkeypatch.undo()
    assert not (tmp_path / "broken" / "report.json").exists()
    with (tmp_path / "broken" / "per_image.csv").open("a") as file:
        file.write("half a row,model,pix")  # as a kill may leave behind
    read: list[int] = []
    resumed = measure(nets, Counting(PICTURES, read), tmp_path / "broken", trunks)
    assert resumed == whole
    csvs = [(tmp_path / run / "per_image.csv").read_text() for run in ("whole", "broken")]
    assert csvs[0] == csvs[1]
    assert (tmp_path / "broken" / "report.json").read_text() == (
        tmp_path / "whole" / "report.json"
    ).read_text()


class Counting(Photos):
    def __init__(self, pictures: list[Image.Image | None], read: list[int]) -> None:
        super().__init__(*pictures)
        self.log = read

    def read(self, index: int, /, *, at_least: int | None = None) -> Image.Image:
        self.log.append(index)
        return super().read(index)


def test_what_is_finished_is_not_measured_again(tmp_path: Path, trunks: Any) -> None:
    nets = models()
    first = measure(nets, Photos(*PICTURES), tmp_path, trunks)
    read: list[int] = []
    assert measure(nets, Counting(PICTURES, read), tmp_path, trunks) == first
    assert read == []
    (tmp_path / "report.json").unlink()  # then it is
    assert measure(nets, Counting(PICTURES, read), tmp_path, trunks) == first
    assert read


def test_a_state_that_no_evaluation_wrote_is_refused(
    tmp_path: Path, trunks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentvae.evaluation.evaluate import _Evaluation

    def killed(*_: Any) -> None:
        raise Killed

    nets = models()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(_Evaluation, "_examine", killed)
        measure(nets, Photos(*PICTURES), tmp_path, trunks)
    path = tmp_path / ".progress" / "state.json"
    good = json.loads(path.read_text())
    for name, values in (("seen", (None, [1])), ("examined", ({"a": 1},)), ("failures", (None,))):
        for value in values:
            path.write_text(json.dumps(good | {"values": good["values"] | {name: value}}))
            with pytest.raises(UserError, match=r"the saved state in .* is damaged"):
                measure(nets, Photos(*PICTURES), tmp_path, trunks)


def test_another_evaluation_in_the_same_folder_is_refused(tmp_path: Path, trunks: Any) -> None:
    nets = models()
    measure(nets, Photos(*PICTURES), tmp_path, trunks)
    before = (tmp_path / "report.json").read_text()
    other = {**nets, "pixels": pixels(Fault(offset=0.2))}
    for changed, message in (
        ({"source": Photos(*PICTURES[:2])}, "another images"),
        ({"plan": replace(PLAN, qualities=(31,))}, "another plan.qualities, protocol.codecs"),
        ({"nets": {"vq": nets["vq"]}}, "another models.pixels"),
    ):
        options = {"nets": nets, "source": Photos(*PICTURES), "plan": PLAN} | changed
        with pytest.raises(UserError, match=f"{message}.*--overwrite"):
            measure(options["nets"], options["source"], tmp_path, trunks, options["plan"])
    assert (tmp_path / "report.json").read_text() == before
    report = measure(other, Photos(*PICTURES), tmp_path, trunks, overwrite=True)
    assert (
        report.models["pixels"].metrics.psnr
        != Report.model_validate_json(before).models["pixels"].metrics.psnr
    )


def test_a_report_of_unknown_origin_is_not_written_over(tmp_path: Path, trunks: Any) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a report"):
        measure(models(), Photos(*PICTURES), tmp_path, trunks)
    assert (tmp_path / "report.json").read_text() == "{}"


def test_a_passport_that_ended_the_process_is_not_tried_again(
    tmp_path: Path, trunks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(PLAN, passport_images=1)
    nets = {"pixels": pixels(Fault(offset=0.1))}

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(examinations, "passport", killed)
    with pytest.raises(Killed):
        measure(nets, Photos(*PICTURES), tmp_path, trunks, plan)
    metrics = Report.read(tmp_path / "report.json").models["pixels"].metrics  # there already
    report = measure(nets, Photos(*PICTURES), tmp_path, trunks, plan)
    assert report.models["pixels"].passport == {"skipped": "the process ended here"}
    assert report.models["pixels"].metrics == metrics


@pytest.mark.parametrize("damage", ["state", "sums", "gone"])
def test_a_damaged_state_is_told(damage: str, tmp_path: Path) -> None:
    Progress(tmp_path, {"a": 1}).save(3, {"csv_bytes": 0}, {})
    (sums,) = (tmp_path / ".progress").glob("*.npz")
    state = tmp_path / ".progress" / "state.json"
    if damage == "state":
        state.write_text(state.read_text()[:-5])
    elif damage == "sums":
        sums.write_bytes(b"PK\x03\x04")
    else:
        sums.unlink()
    with pytest.raises(UserError, match=r"damaged.*--overwrite"):
        Progress(tmp_path, {"a": 1})
    assert Progress(tmp_path, {"a": 1}, overwrite=True).done == 0


def test_a_state_is_whole_at_every_moment(tmp_path: Path) -> None:
    """The sums that state.json names are never written over."""
    progress = Progress(tmp_path, {"a": 1})
    named = []
    for done in (1, 1, 2):
        progress.save(done, {}, {})
        named.append(json.loads((tmp_path / ".progress" / "state.json").read_text())["arrays"])
    assert len(set(named)) == 3
    again = Progress(tmp_path, {"a": 1})
    again.save(3, {}, {})
    assert json.loads((tmp_path / ".progress" / "state.json").read_text())["arrays"] not in named
