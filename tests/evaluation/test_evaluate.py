"""The report of models that are known exactly."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, VQModel
from PIL import Image

from latentvae.autoencoder import Autoencoder
from latentvae.coding.image_codecs import available_codecs, bits_per_pixel
from latentvae.coding.token_codec import encode_tokens
from latentvae.errors import UserError
from latentvae.evaluation import METRICS_ONLY, Plan, evaluate
from latentvae.losses.perceptual import PerceptualLoss, load_lpips
from latentvae.models import DiscreteAutoencoder
from latentvae.report import Report
from latentvae.report.schema import SCHEMA_FILE, json_schema
from tests.evaluation.conftest import Photos, evaluate_module, photo
from tests.evaluation.pixel_networks import Fault, Pixels, pixels
from tests.tiny import vqvae2

METRICS = replace(METRICS_ONLY, lpips_nets=("alex",))
SMALL = replace(METRICS, qualities=(20, 90), noise_psnr=(20, 40), prior_images=2, gain_images=1)
PHOTOS = Photos(photo(), photo(96, 40, left=20), photo(50, 50, left=200), photo(left=150))
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


@pytest.fixture
def run(tmp_path: Path, lpips: dict[str, PerceptualLoss], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluates without the figure, which has tests of its own and costs most of the time."""
    monkeypatch.setattr(evaluate_module, "rate_figure", lambda report, path: None)

    def evaluation(
        model: Autoencoder, *pictures: Image.Image | None, plan: Plan = METRICS, **options: Any
    ) -> Report:
        source, name = Photos(*pictures) if pictures else PHOTOS, "photos"
        models = {"m": model}
        options = {"data_name": name, "lpips": lpips, "overwrite": True} | options
        return evaluate(models, source, tmp_path / "report", plan=plan, **options)

    return evaluation


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_psnr_of_a_shift_by_three_levels_is_exact(run: Any) -> None:
    report = run(pixels(Fault(offset=3 * 2 / 255)))
    metrics = report.models["m"].metrics
    assert metrics.psnr.mean == pytest.approx(20 * np.log10(255 / 3), rel=1e-4)
    assert metrics.psnr_pooled == pytest.approx(20 * np.log10(255 / 3), rel=1e-4)
    assert metrics.ms_ssim is None and metrics.lpips_vgg is None
    assert report.models["m"].rate.raw_bpp == 3 * 16
    assert report.models["m"].info["class"] == "Pixels"


def test_pooled_psnr_is_of_all_pixels_together(run: Any) -> None:
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderTiny(**TINY), name="tiny")
    report = run(model, photo(), photo(16, 96))
    squares, pixels_seen = 0.0, 0
    for picture in (photo(), photo(16, 96)):
        recon = np.asarray(model.reconstruct(picture), dtype=float)
        squares += np.square(recon - np.asarray(picture, dtype=float)).sum()
        pixels_seen += recon.size
    expected = 10 * np.log10(255**2 * pixels_seen / squares)
    metrics = report.models["m"].metrics
    assert metrics.psnr_pooled == pytest.approx(expected, rel=1e-5)
    assert metrics.psnr.mean != pytest.approx(expected, rel=1e-4)


def test_a_perfect_copy(run: Any, tmp_path: Path) -> None:
    perceptual = {net: PerceptualLoss(load_lpips(net)) for net in ("alex", "vgg")}
    plan = replace(METRICS, lpips_nets=("alex", "vgg"))
    report = run(pixels(Fault(offset=0.3 * 2 / 255)), plan=plan, lpips=perceptual)  # rounds away
    model = report.models["m"]
    assert model.metrics.psnr.mean == model.metrics.psnr_pooled == float("inf")
    assert model.metrics.psnr.infinite == len(PHOTOS)
    assert model.metrics.ssim.mean == pytest.approx(1.0, abs=1e-6)
    assert model.metrics.lpips_alex.mean == model.metrics.lpips_vgg.mean == 0.0
    assert model.distribution.kd_vgg == 0.0 and model.distribution.fd_vgg is None
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["models"]["m"]["metrics"]["psnr"]["mean"] == "Infinity"
    assert Report.read(tmp_path / "report" / "report.json") == report


def test_the_rate_curve_rises_to_the_models_own_quality(run: Any) -> None:
    model = run(pixels(), plan=SMALL).models["m"]
    low, high = model.rate.points
    assert low.bpp < high.bpp < 3 * 8  # less than the pixels themselves
    assert low.psnr < high.psnr
    # Quantised pixels are the whole error, so it is what the steps were chosen for; wide steps
    # make less of it.
    assert high.psnr == pytest.approx(40, abs=0.5)
    assert low.psnr > 20 - 0.5
    assert low.lpips_alex > high.lpips_alex > 0
    assert [point.noise_psnr for point in model.rate.points] == [20, 40]


def test_a_latent_is_coded_with_what_other_images_taught(run: Any) -> None:
    grey = Image.new("RGB", (64, 48), (128, 128, 128))
    alone = run(pixels(), photo(), plan=SMALL).models["m"].rate.points[1].bpp
    model = run(pixels(), grey, photo(), plan=SMALL).models["m"]
    # The photo's other half knows grey alone, so the photo costs much more than when it knows it.
    assert 2 * model.rate.points[1].bpp > 1.5 * alone


def test_rows_are_of_every_image_and_means_are_over_images(run: Any, tmp_path: Path) -> None:
    report = run(pixels(Fault(offset=0.1)), plan=SMALL)
    table = rows(tmp_path / "report")
    kinds = [(row["kind"], row["setting"]) for row in table if row["image"] == "1.png"]
    assert kinds[:3] == [("model", ""), ("bitstream", "20"), ("bitstream", "40")]
    assert len(kinds) == 3 + (2 + 1) * len(report.codecs)  # two qualities, and the model's rate
    assert {(r["width"], r["height"]) for r in table if r["image"] == "1.png"} == {("96", "40")}
    curve = [row for row in table if row["kind"] == "codec"]
    at_90 = [float(r["bpp"]) for r in curve if (r["coder"], r["setting"]) == ("jpeg", "90")]
    assert report.codecs["jpeg"][1].bpp == pytest.approx(np.mean(at_90))
    ssims = [float(r["ssim"]) for r in table if r["kind"] == "model"]
    assert report.models["m"].metrics.ssim.mean == pytest.approx(np.mean(ssims))
    assert report.models["m"].metrics.ssim.images == len(PHOTOS)


def test_codecs_stand_beside_a_model_at_its_own_rate(run: Any, tmp_path: Path) -> None:
    """24 bits per pixel raw are more than JPEG has, and 0.3 are reached from above."""
    dear = run(pixels(), plan=SMALL).models["m"]
    assert set(dear.codecs_at_rate) == {"jpeg", "webp", "avif"}
    table = [row for row in rows(tmp_path / "report") if row["kind"] == "codec_at_rate"]
    assert {row["setting"] for row in table} == {"100"}  # no quality has so many bits
    assert {row["coder"] for row in table} >= {"jpeg at m"}

    torch.manual_seed(0)
    cheap = Autoencoder(AutoencoderTiny(**TINY, latent_channels=1), name="tiny")  # 16 bits of 2 x 2
    found = run(cheap, plan=SMALL).models["m"]
    point = found.codecs_at_rate["jpeg"]
    bits = {
        row["image"]: (float(row["bpp"]), int(row["setting"]))
        for row in rows(tmp_path / "report")
        if row["coder"] == "jpeg at m"
    }
    assert point.bpp == pytest.approx(np.mean([bpp for bpp, _ in bits.values()]))
    assert found.rate.raw_bpp <= point.bpp < 1.1 * found.rate.raw_bpp
    assert point.images["bpp"] == len(PHOTOS) and point.psnr > 20
    codec, picture = available_codecs()["jpeg"], PHOTOS.read(1)
    bpp, quality = bits["1.png"]
    assert bits_per_pixel(codec.encode(picture, quality=quality), picture) == bpp
    raw = 4.0  # of its 96 x 40 pixels
    below = bits_per_pixel(codec.encode(picture, quality=quality - 1), picture)
    assert below < raw <= bpp


@pytest.mark.parametrize(
    ("section", "has"),
    [
        ("distortion", {"metrics", "rate"}),
        ("rate", {"rate"}),
        ("latent", {"rate", "latent"}),
        ("passport", {"passport"}),
        ("tiling", {"passport"}),
        ("speed", {"speed"}),
    ],
)
def test_a_section_is_measured_alone(section: str, has: set[str], run: Any, lpips: Any) -> None:
    plan = replace(SMALL, passport_images=1, speed_sizes=(16,)).only([section])
    nets = {net: lpips[net] for net in plan.lpips_nets}
    report = run(pixels(), photo(), photo(left=120), plan=plan, lpips=nets)
    found = report.models["m"].model_dump(exclude_none=True, exclude_defaults=True)
    assert set(found) - {"info", "warnings", "codecs_at_rate"} == has
    assert bool(report.codecs) == bool(found.get("codecs_at_rate")) == (section == "rate")
    points = found.get("rate", {}).get("points", [])
    assert len(points) == (2 if section == "rate" else 0)
    checks = found.get("passport", {})
    assert ("precision" in checks, "tiling" in checks) == (
        section == "passport",
        section == "tiling",
    )


def test_a_section_that_does_not_exist_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"\(got 'disortion'\).*did you mean 'distortion'"):
        Plan().only(["disortion"])
    with pytest.raises(UserError, match="at least one"):
        Plan().only([])


def test_an_image_is_encoded_once_per_model(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entropy model's images are not encoded again, and the sheet decodes nothing."""
    model, calls = pixels(), {"encode_posterior": 0, "encode": 0}
    for name in calls:
        original = getattr(model, name)

        def counted(*args: Any, _name: str = name, _call: Any = original, **options: Any) -> Any:
            calls[_name] += 1
            return _call(*args, **options)

        monkeypatch.setattr(model, name, counted)
    run(model, plan=SMALL)
    assert calls == {"encode_posterior": len(PHOTOS), "encode": 0}


def test_bd_rates_are_beside_jpeg(run: Any) -> None:
    plan = replace(SMALL, qualities=(5, 30, 60, 95), noise_psnr=(18.0, 24.0, 30.0))
    report = run(pixels(), photo(160, 120), photo(160, 120, left=200), plan=plan)
    assert set(report.bd_rate) == {"webp", "avif", "m"}
    assert -80 < report.bd_rate["avif"].psnr < 0
    assert report.bd_rate["m"].psnr > 100  # pixels, entropy-coded one by one


def test_curves_are_means_over_the_same_images(run: Any, tmp_path: Path) -> None:
    """What JPEG copies exactly and what is too small for LPIPS changes no BD-rate."""
    plan = replace(SMALL, qualities=(5, 40, 95), noise_psnr=())
    photos = [photo(80, 64), photo(80, 64, left=200)]
    alone = run(pixels(), *photos, plan=plan)
    flat, small = Image.new("RGB", (80, 64), (128, 128, 128)), photo(24, 24)
    report = run(pixels(), *photos, flat, small, plan=plan)
    low, *_ = report.codecs["jpeg"]
    assert low.images == {"bpp": 4, "psnr": 3, "lpips_alex": 3}
    assert [point.images for point in low.curves.values()] == [3, 3]
    table = [row for row in rows(tmp_path / "report") if row["setting"] == "5"]
    without = {"psnr": "2.png", "lpips_alex": "3.png"}
    for metric, left_out in without.items():
        found = [r for r in table if r["coder"] == "jpeg" and r["image"] != left_out]
        bpp, value = (np.mean([float(r[name]) for r in found]) for name in ("bpp", metric))
        assert low.curves[metric].bpp == pytest.approx(bpp)
        assert low.curves[metric].value == pytest.approx(value)
    flat_too, small_too = (run(pixels(), *photos, other, plan=plan) for other in (flat, small))
    for coder in ("webp", "avif"):
        expected = alone.bd_rate[coder]
        assert flat_too.bd_rate[coder].psnr == pytest.approx(expected.psnr)
        assert small_too.bd_rate[coder].lpips_alex == pytest.approx(expected.lpips_alex)


def test_no_bd_rate_between_curves_of_different_images(run: Any) -> None:
    plan = replace(METRICS, qualities=(5, 30, 60))
    wide = photo().resize((16400, 8))  # more than WebP can hold
    report = run(pixels(), wide, photo(160, 120), plan=plan)
    assert report.codecs["webp"][0].curves["psnr"].images == 1
    assert report.bd_rate["webp"].psnr is None and report.bd_rate["avif"].psnr is not None
    assert report.bd_rate["webp"].lpips_alex is not None  # the wide one is too small for it


def test_small_images_leave_out_what_they_do_not_allow(run: Any) -> None:
    metrics = run(pixels(), photo(8, 8), photo(40, 40)).models["m"].metrics
    counts = [m.images for m in (metrics.psnr, metrics.ssim, metrics.lpips_alex)]
    assert counts == [2, 1, 1]


def test_resolution_is_shorter_side_and_centre(run: Any, tmp_path: Path) -> None:
    report = run(pixels(), photo(96, 48), plan=replace(METRICS, resolution=32))
    assert {(row["width"], row["height"]) for row in rows(tmp_path / "report")} == {("32", "32")}
    assert "32" in report.protocol["size"] and report.data["commonest_sizes"] == {"32x32": 1}


def test_a_resolution_may_be_height_and_width(run: Any, tmp_path: Path) -> None:
    report = run(pixels(), photo(96, 48), photo(), plan=replace(METRICS, resolution=(32, 48)))
    assert {(row["width"], row["height"]) for row in rows(tmp_path / "report")} == {("48", "32")}
    assert "cover 32 x 48" in report.protocol["size"]


def test_buckets_keep_each_images_shape_as_in_training(run: Any, tmp_path: Path) -> None:
    """32 x 32 pixels in shapes of 1:2, 1:1 and 2:1, by multiples of f."""
    plan = replace(METRICS, resolution=32, buckets=3)
    report = run(pixels(), photo(96, 48), photo(48, 96), photo(60, 64), plan=plan)
    sizes = {
        row["image"]: (int(row["width"]), int(row["height"])) for row in rows(tmp_path / "report")
    }
    assert sizes == {"0.png": (46, 22), "1.png": (22, 46), "2.png": (32, 32)}
    assert "3 shapes of about 32 x 32" in report.protocol["size"]
    with pytest.raises(UserError, match="needs a resolution"):
        replace(METRICS, buckets=3)


def test_samples_are_drawn_where_asked_and_the_same_each_time(run: Any) -> None:
    noisy = pixels(Fault(logvar=float(np.log(0.01))))
    plan = replace(METRICS, latent="sample")
    first, second = (run(noisy, plan=plan).models["m"].metrics.psnr.mean for _ in range(2))
    assert first == second == pytest.approx(10 * np.log10(4 / 0.01), abs=0.5)
    assert run(noisy).models["m"].metrics.psnr.mean == float("inf")


def test_latent_faults_are_warned_of_and_sound_latents_are_not(run: Any) -> None:
    std = np.concatenate([np.asarray(p).ravel() for p in PHOTOS.pictures if p]).std() / 127.5
    mean = np.concatenate([np.asarray(p).ravel() for p in PHOTOS.pictures if p]).mean() / 127.5 - 1
    sound = Autoencoder(Pixels(scaling_factor=1 / std, shift_factor=mean), name="sound")
    assert not any("scal" in text for text in run(sound).models["m"].warnings)
    (warning,) = [w for w in run(pixels(scaling_factor=20)).models["m"].warnings if "20" in w]
    assert f"{1 / std:.3g}" in warning
    dead = run(pixels(Fault(dead=(3, 7)))).models["m"]
    assert any("Dead channels" in text and "3, 7 of 12" in text for text in dead.warnings)
    assert dead.latent["dead_channels"] == [3, 7]


def test_tokens_are_counted_and_coded(run: Any) -> None:
    torch.manual_seed(0)
    net = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=16,
    )
    model = Autoencoder(net, name="vq")
    found = run(model, plan=SMALL).models["m"]
    indices = [model.encode_tokens(picture).flatten() for picture in PHOTOS.pictures if picture]
    counts = torch.cat(indices).bincount(minlength=16).double()
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * share.log2()).sum().item()
    assert found.tokens["entropy_bits"] == pytest.approx(entropy)
    assert found.tokens["usage"] == (counts > 0).double().mean().item()
    assert found.latent is None
    (point,) = found.rate.points
    assert point.psnr == pytest.approx(found.metrics.psnr.mean)  # the very same picture
    assert found.rate.raw_bpp == pytest.approx(4 / 4, rel=0.05)  # 4 bits on 2 x 2 pixels, padded
    assert point.bpp < found.rate.raw_bpp + 0.15


def tokenizer(**quantizer: Any) -> Autoencoder:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_out_channels": (8, 8), "latent_channels": 8}
    net = DiscreteAutoencoder(**shape, norm_num_groups=4, quantizer=quantizer)
    return Autoencoder(net.eval(), name="tokens")


@pytest.mark.parametrize("shared", [True, False])
def test_levels_of_tokens_are_counted_and_coded(run: Any, shared: bool) -> None:
    codebook = {"num_levels": 2, "num_codes": 16, "code_channels": 4, "shared_codebook": shared}
    model = tokenizer(type="residual", **codebook)
    found = run(model, plan=replace(SMALL, passport_images=1)).models["m"]
    assert found.rate.raw_bpp == pytest.approx(2 * 4 / 4, rel=0.05)  # two of 4 bits on 2 x 2 pixels
    (point,) = found.rate.points
    assert point.psnr == pytest.approx(found.metrics.psnr.mean)  # the very same picture
    assert point.bpp < found.rate.raw_bpp + 0.15
    indices = [model.encode_tokens(picture)[0] for picture in PHOTOS.pictures if picture]
    levels = torch.cat([index.flatten(1) for index in indices], dim=1)
    used = [len(level.unique()) for level in levels]
    if shared:
        assert found.tokens["usage"] == len(levels.unique()) / 16 and "levels" not in found.tokens
        return
    assert [level["num_codes_used"] for level in found.tokens["levels"]] == used
    assert found.tokens["usage"] == pytest.approx(sum(used) / 32)
    assert found.tokens["tokens"] == levels.numel()
    perplexities = [level["perplexity"] for level in found.tokens["levels"]]
    assert found.tokens["perplexity"] == pytest.approx(sum(perplexities) / 2)


def test_each_level_of_several_sizes_has_its_bits(run: Any) -> None:
    model = Autoencoder(vqvae2(), name="levels")
    found = run(model, plan=replace(SMALL, passport_images=1)).models["m"]
    (point,) = found.rate.points
    assert point.psnr == pytest.approx(found.metrics.psnr.mean)  # the very same picture
    top, bottom = found.tokens["levels"]
    assert bottom["tokens"] == 4 * top["tokens"]
    pictures = [p for p in PHOTOS.pictures if p]
    expected: list[list[float]] = [[], []]
    for picture in pictures:
        maps = vqvae2().maps(model.encode_tokens(picture))
        for own, level in zip(expected, maps, strict=True):
            content = encode_tokens(level[0].numpy(), num_codes=32)
            own.append(8 * len(content) / (picture.width * picture.height))
    for level, own in zip((top, bottom), expected, strict=True):
        assert level["coded_bpp"] == pytest.approx(sum(own) / len(own))
    assert point.bpp < top["coded_bpp"] + bottom["coded_bpp"]  # one header instead of two


def test_more_codes_than_a_file_can_hold_have_no_bitstream(run: Any) -> None:
    found = run(tokenizer(type="lfq", num_bits=21), plan=SMALL).models["m"]
    assert found.rate.points == [] and found.tokens["raw_bits"] == 21
    assert found.rate.raw_bpp == pytest.approx(21 / 4, rel=0.05)
    (warning,) = [text for text in found.warnings if "bitstream" in text]
    assert "at most 1,048,576 codes (the model has 2,097,152)" in warning


def test_an_unreadable_image_is_named_and_left_out(run: Any, capfd: Any) -> None:
    report = run(pixels(), None, photo(), photo(48, 64), plan=SMALL)
    assert report.data["unreadable"] == ["0.png"] and report.data["num_images"] == 2
    assert "left out: cannot read image '0.png'" in capfd.readouterr().err
    with pytest.raises(UserError, match="none of the"):
        run(pixels(), None, None)


def test_a_model_that_overflows_is_left_out_and_the_others_measured(
    tmp_path: Path, lpips: dict[str, PerceptualLoss], capfd: Any
) -> None:
    bright = photo().point(lambda value: min(255, value + 40))
    models = {"good": pixels(Fault(offset=0.1)), "bad": pixels(Fault(overflow=0.75))}
    options = {"data_name": "photos", "lpips": lpips, "plan": replace(SMALL, noise_psnr=(40,))}
    out = tmp_path / "report"
    report = evaluate(models, Photos(photo(), bright, photo()), out, **options)  # type: ignore[arg-type]
    assert report.models["good"].metrics.psnr.images == 3
    bad = report.models["bad"]
    assert bad.metrics.psnr is None and bad.rate is None
    assert bad.warnings == ["Not measured: 'pixels' overflows in float32, on 1.png."]
    assert "overflows" in capfd.readouterr().err
    assert Report.read(out / "report.json") == report


def test_a_single_image_says_that_its_bits_are_too_few(run: Any) -> None:
    (warning,) = [w for w in run(pixels(), photo(), plan=SMALL).models["m"].warnings if "bits" in w]
    assert "there are no other images" in warning
    warnings = run(pixels(), photo(), photo(left=120), plan=SMALL).models["m"].warnings
    assert not any("bits" in warning for warning in warnings)


def test_a_kernel_distance_takes_evenly_spread_images(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("latentvae.evaluation.model_evaluation.KERNEL_IMAGES", 2)
    monkeypatch.setattr("latentvae.evaluation.model_evaluation.MIN_FRECHET_IMAGES", 4)
    perceptual = {net: PerceptualLoss(load_lpips(net)) for net in ("alex", "vgg")}
    plan = replace(METRICS, lpips_nets=("alex", "vgg"))
    found = run(pixels(Fault(offset=0.2)), plan=plan, lpips=perceptual).models["m"].distribution
    assert found.images == {"fd_vgg": 4, "kd_vgg": 2}
    assert found.fd_vgg > 0


def test_a_picture_too_wide_for_a_codec_is_left_out_of_its_curve(run: Any) -> None:
    wide = photo().resize((16400, 8))
    report = run(pixels(), wide, photo(), plan=replace(METRICS, qualities=(50,)))
    alone = run(pixels(), photo(), plan=replace(METRICS, qualities=(50,)))
    assert report.codecs["webp"] == alone.codecs["webp"]
    assert report.codecs["jpeg"] != alone.codecs["jpeg"]
    assert run(pixels(), wide, plan=replace(METRICS, qualities=(50,))).codecs["webp"] == []


def test_a_sixteen_bit_model_is_measured_too(run: Any) -> None:
    model = Autoencoder(pixels().net.to(torch.bfloat16), name="half")
    plan = replace(SMALL, passport_images=1, speed_sizes=(32,))
    found = run(model, photo(), photo(left=120), plan=plan).models["m"]
    assert found.info["dtype"] == found.speed["dtype"] == "bfloat16"
    assert found.metrics.psnr.mean > 30
    assert found.passport["precision"]["bfloat16"]["finite"]


def test_what_does_not_fit_together_is_told(run: Any, tmp_path: Path, lpips: Any) -> None:
    with pytest.raises(UserError, match="lpips needs the backbones"):
        run(pixels(), plan=replace(METRICS, lpips_nets=("alex", "vgg")))
    options = {"data_name": "photos", "lpips": lpips, "plan": METRICS}
    with pytest.raises(UserError, match="cannot be called 'webp'"):
        evaluate({"webp": pixels()}, PHOTOS, tmp_path / "w", **options)
    with pytest.raises(UserError, match="at least 1"):
        evaluate({"m": pixels()}, PHOTOS, tmp_path / "w", sheet_images=0, **options)
    with pytest.raises(UserError, match="there is no model to measure"):
        evaluate({}, PHOTOS, tmp_path / "w", **options)


def test_the_hash_is_of_the_pixels_in_any_order(run: Any) -> None:
    def digest(*pictures: Image.Image) -> str:
        return run(pixels(), *pictures).data["pixels_sha256_sum"]

    a, b = photo(), photo(left=101)
    assert digest(a, b) == digest(b, a) != digest(a, a)


def test_a_model_of_one_size_needs_that_resolution(run: Any) -> None:
    model = pixels()
    model.fixed_size = 32
    with pytest.raises(
        UserError, match=r"only makes 32 x 32 images\. Measure with --resolution 32"
    ):
        run(model)
    assert run(model, plan=replace(METRICS, resolution=32)).data["num_images"] == len(PHOTOS)


def test_a_resolution_below_f_of_a_tokenizer_is_refused(run: Any) -> None:
    model = pixels()
    model.smallest_side = model.f
    with pytest.raises(UserError, match=f"resolution must be at least {model.f}, the downsampling"):
        run(model, plan=replace(METRICS, resolution=1))


def test_an_image_smaller_than_f_of_a_tokenizer_is_named_before_the_work(
    run: Any, tmp_path: Path
) -> None:
    model = pixels()
    model.smallest_side = 16
    pictures = (photo(), None, photo(40, 15), photo(16, 16))
    with pytest.raises(
        UserError, match=r"at least 16 pixels on a side, .* f of 'pix.*'2\.png' has 40 x 15 pixels"
    ):
        run(model, *pictures)
    assert not (tmp_path / "report" / "per_image.csv").exists()
    report = run(model, *pictures, plan=replace(METRICS, resolution=16))
    assert report.data["num_images"] == 3 and report.data["unreadable"] == ["1.png"]
    assert run(model, photo(), photo(16, 16)).data["num_images"] == 2


def test_the_report_fits_its_schema(run: Any, tmp_path: Path) -> None:
    run(pixels(), plan=SMALL)
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(written, schema)
    assert set(written) >= {"schema_version", "protocol", "data", "models", "codecs"}
    assert set(written["models"]["m"]) >= {"metrics", "rate", "latent"}
    assert set(written["models"]["m"]["metrics"]["psnr"]) >= {"mean", "ci95"}
    broken = written | {"schema_version": 2}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_the_schema_file_is_up_to_date() -> None:
    assert SCHEMA_FILE.read_text() == json_schema(), "run `make schema`"


def test_hostile_names_are_one_cell_that_no_spreadsheet_runs(
    tmp_path: Path, lpips: dict[str, PerceptualLoss], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["=cmd|'/c calc'!A0.png", "@SUM(A1).png", "\udcff\n.png", "\U0001f642 ä.png"]

    class Hostile(Photos):
        def name(self, index: int, /) -> str:
            return names[index]

    source, models = Hostile(photo(), photo(left=120), None, photo(left=200)), {"=m": pixels()}
    options: dict[str, Any] = {"data_name": "photos", "lpips": lpips, "plan": METRICS}
    report = evaluate(models, source, tmp_path / "report", **options)
    cells = {row["image"]: row["coder"] for row in rows(tmp_path / "report")}
    assert cells == dict.fromkeys([f"'{names[0]}", f"'{names[1]}", names[3]], "'=m")
    assert report.data["unreadable"] == [r"\udcff\n.png"]
    assert "left out: cannot read image '\\udcff\\n.png': it is broken" in capsys.readouterr().err
    assert (tmp_path / "report" / "sheet.png").is_file()
