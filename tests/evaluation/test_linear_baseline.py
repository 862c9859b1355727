"""The row of the linear code, against the code computed directly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from latentvae.autoencoder import Autoencoder
from latentvae.errors import UserError
from latentvae.evaluation import METRICS_ONLY, evaluate
from latentvae.evaluation.linear_baseline import LinearBaseline
from latentvae.linear_code import PatchMoments
from latentvae.metrics import psnr, to_8bit
from latentvae.report import Report
from tests.evaluation.conftest import Photos, evaluate_module, photo
from tests.tiny import BLOCKS

METRICS = replace(METRICS_ONLY, sections=("distortion",), lpips_nets=("alex",))
PICTURES = [photo(64, 48, left=left) for left in (0, 60, 120, 180)]


@pytest.fixture
def run(tmp_path: Path, lpips: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(evaluate_module, "rate_figure", lambda report, path: None)

    def evaluation(*pictures: Any, **models: Autoencoder) -> Report:
        options = {"data_name": "photos", "lpips": lpips, "plan": METRICS, "overwrite": True}
        return evaluate(models, Photos(*(pictures or PICTURES)), tmp_path / "report", **options)

    return evaluation


def kl() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderKL(**BLOCKS, latent_channels=4), name="kl")


def vq() -> Autoencoder:
    torch.manual_seed(0)
    net = VQModel(**BLOCKS, latent_channels=4, num_vq_embeddings=8, vq_embed_dim=4)
    return Autoencoder(net, name="vq")


def test_each_half_is_coded_with_the_components_of_the_other(run: Any) -> None:
    model = kl()
    report = run(m=model)
    images = [
        to_8bit(torch.from_numpy(np.asarray(p)).movedim(2, 0)[None] / 127.5 - 1) for p in PICTURES
    ]
    values = []
    for position, image in enumerate(images):
        moments = PatchMoments(model.f)
        for other in images[1 - position % 2 :: 2]:
            moments.update(other)
        code = moments.linear_code(4)
        recon = to_8bit(code.decode(code.encode(image), size=(48, 64)))
        values.append(psnr(image, recon).item())
    row = report.models["linear"]
    assert row.metrics.psnr.mean == pytest.approx(np.mean(values), rel=1e-5)
    assert row.metrics.ssim is not None and row.metrics.lpips_alex is not None
    assert row.info == {"class": "LinearCode", "f": model.f, "latent_channels": 4}
    assert row.rate.raw_bpp == report.models["m"].rate.raw_bpp

    # an untrained network is worse, and is told so
    [warning] = [text for text in report.models["m"].warnings if "linear code" in text]
    assert "The network needs more training" in warning


def test_a_tokenizer_is_not_compared_with_numbers(run: Any) -> None:
    assert list(run(t=vq()).models) == ["t"]
    report = run(m=kl(), t=vq())
    assert list(report.models) == ["m", "t", "linear"]
    assert not any("linear code" in text for text in report.models["t"].warnings)


def test_too_few_patches_leave_the_row_out(run: Any) -> None:
    model = kl()
    small = photo(2 * model.f, model.f)
    assert list(run(small, m=model).models) == ["m"]
    assert list(run(small, *PICTURES[:1], m=model).models) == ["m", "linear"]


def test_one_image_is_coded_with_its_own_fit_and_says_so(run: Any) -> None:
    [warning] = run(PICTURES[0], m=kl()).models["linear"].warnings
    assert "fitted on the images that it codes" in warning


def test_its_state_can_be_saved(lpips: Any) -> None:
    from latentvae.evaluation.measures import Judge
    from latentvae.evaluation.picture_source import Pictures

    judge = Judge(lpips)
    pictures = Pictures(Photos(*PICTURES), range(4))
    first, second = (LinearBaseline("linear", f=4, d=3, judge=judge) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert second.halves == []
    assert first.fit(pictures)
    original = judge.original("0.png", 0, pictures.read(0))
    first.update(original)
    second.load_state_dict(first.state_dict())
    assert second.report() == first.report() and second.update(original) == first.update(original)


def test_a_model_of_the_rows_name_is_refused(run: Any) -> None:
    with pytest.raises(UserError, match="cannot be called 'linear', because the linear code"):
        run(linear=kl())
    assert list(run(linear=vq()).models) == ["linear"]  # there is no such row
