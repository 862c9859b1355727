"""Exported tokenizers: the trained network's tokens and images, in diffusers' class or in ours."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file

import latentvae
import latentvae.export.discrete as export_module
from latentvae.cli.main import main
from latentvae.engine.resume import write_config
from latentvae.errors import UserError
from latentvae.models import DiscreteAutoencoder
from latentvae.models.conv.stock_vq import to_vq_model
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.run_export import export_folder
from tests.export.tokenizers import export
from tests.tasks.autoencoder.small import small_config
from tests.tiny import OTHER, STOCK, photos, tokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"


def stock(folder: Path) -> Any:
    return copy.deepcopy(VQModel.from_pretrained(folder, use_safetensors=True)).eval()


@torch.no_grad()
def stock_tokens(net: Any, images: torch.Tensor) -> torch.Tensor:
    """(B, h, w), by what diffusers' documentation says."""
    features = net.encode(images).latents
    return net.quantize(features)[2][2].view(len(images), *features.shape[2:])


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_a_stock_vq_model_has_the_same_tokens_and_images(name: str, tmp_path: Path) -> None:
    net, images = tokenizer(name), photos(3, 64)
    before = copy.deepcopy(net.state_dict())
    report = export(net, tmp_path / "export")
    loaded, ours = stock(tmp_path / "export"), net.tokenize(images).indices
    assert (report.network, report.reason, report.equal_share) == ("VQModel", "", 1.0)
    assert len(ours.unique()) > 8
    assert torch.equal(stock_tokens(loaded, images), ours)
    codes = loaded.quantize.embedding.weight[ours].movedim(3, 1).contiguous()
    expected = net.decode_indices(ours).sample
    assert torch.equal(loaded.decode(codes, force_not_quantize=True).sample, expected)
    bound = 1e-5 * expected.abs().max().item()  # diffusers' codes are z + (codes - z), rounded
    torch.testing.assert_close(loaded(images).sample, expected, atol=bound, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["sphere", "average_sphere", "lfq", "bsq"])
@torch.no_grad()
def test_features_are_about_as_long_as_the_codes(name: str, tmp_path: Path) -> None:
    net = tokenizer(name)
    report = export(net, tmp_path / "export")
    loaded = stock(tmp_path / "export")
    lengths = loaded.quantize.embedding.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 10**0.5 if name == "lfq" else 1.0))
    ours, theirs = net.encode(photos()).latents, loaded.encode(photos()).latents
    ratio = theirs.norm(dim=1).mean() / lengths[0]
    assert 0.5**0.5 <= ratio <= 2**0.5
    factor = (theirs / ours).unique()
    assert len(factor) == 1 and math.log2(factor.item()) % 1 == 0 and factor != 1
    assert (theirs.std() * loaded.config.scaling_factor).item() == pytest.approx(1.0, rel=1e-2)
    assert loaded.config.scaling_factor == report.scaling_factor


@pytest.mark.parametrize("name", [*OTHER, "likelihood"])
@torch.no_grad()
def test_what_a_vq_model_cannot_express_is_ours(name: str, tmp_path: Path) -> None:
    if name == "likelihood":
        net = tokenizer("gradient", likelihood="logit_laplace")
    else:
        net = tokenizer(name)
    report = export(net, tmp_path / "export")
    assert report.network == "DiscreteAutoencoder" and report.ties == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"not a diffusers VQModel: {report.reason}" in card
    said = {"likelihood": "logit_laplace likelihood", "many_bits": "131,072 codes"}
    assert said.get(name, f"quantiser {name}") in report.reason
    loaded: Any = DiscreteAutoencoder.from_pretrained(tmp_path / "export")
    indices = net.tokenize(photos()).indices
    assert torch.equal(loaded.tokenize(photos()).indices, indices)
    assert torch.equal(loaded.decode_indices(indices).sample, net.decode_indices(indices).sample)


def test_codes_that_a_float32_search_confuses_are_no_vq_model(tmp_path: Path) -> None:
    """Codes that have not learned, 1 / K long beside features of length 5."""
    net = tokenizer("gradient")
    with torch.no_grad():
        net.quantize.weight.copy_(torch.rand(32, 4) * 1e-6)
    report = export(net, tmp_path / "export")
    assert report.network == "DiscreteAutoencoder"
    assert "than VQModel's search can resolve" in report.reason


def midway(net: DiscreteAutoencoder, *, step: float) -> DiscreteAutoencoder:
    """Every feature is midway between code 3 and code 5, and nearer to 3 by `step` of the way."""
    with torch.no_grad():
        codes = net.quantize.weight
        net.quant_conv.weight.zero_()
        codes.sub_(codes.mean(0))  # so that the search loses no digits to an offset
        codes[3], codes[5] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
        net.quant_conv.bias.copy_((0.5 + step) * codes[3] + (0.5 - step) * codes[5])
    return net


def take(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a loaded VQModel find that code, wherever ours finds 3."""
    tokenize = export_module.calls.tokenize

    def other(net: Any, z: torch.Tensor) -> torch.Tensor:
        found = tokenize(net, z)
        return found if isinstance(net, DiscreteAutoencoder) else torch.full_like(found, code)

    monkeypatch.setattr(export_module.calls, "tokenize", other)


def test_a_tie_is_counted_and_a_worse_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    images = photos()
    compare = export_module._compare_indices
    for step, code, fails in ((2e-6, 5, False), (1e-4, 5, True), (2e-6, 7, True)):
        net = midway(tokenizer("gradient"), step=step)
        written = to_vq_model(net)
        assert compare(net, written, images, factor=1.0) == (1.0, 0)
        with monkeypatch.context() as patch:
            take(code, patch)
            if fails:
                with pytest.raises(RuntimeError, match="trained tokenizer: the squared distances"):
                    compare(net, written, images, factor=1.0)
            else:
                assert compare(net, written, images, factor=1.0) == (
                    0.0,
                    2 * 64,
                )  # at 32 x 32 and 33 x 35


def test_a_damaged_export_raises_and_leaves_the_earlier_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "export"
    export(tokenizer("gradient"), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    load_back = export_module.load_back

    def damaged(part: str) -> Any:
        def load(folder: Path, cls: type[Any]) -> Any:
            net = load_back(folder, cls)
            with torch.no_grad():
                net.get_parameter(part).copy_(net.get_parameter(part).roll(1, 0))
            return net

        return load

    for part, said in (
        ("quantize.embedding.weight", "takes another code"),
        ("post_quant_conv.bias", "from the same indices differ"),
    ):
        monkeypatch.setattr(export_module, "load_back", damaged(part))
        with pytest.raises(RuntimeError, match=said):
            export(tokenizer("average"), out, overwrite=True)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("name", "width"), [("gradient", 8), ("sphere", 8), ("lfq", 10)])
@torch.no_grad()
def test_lookup_from_codebook(name: str, width: int, tmp_path: Path) -> None:
    """Codes by index, of the width by which aMUSEd shapes them, and pixels in [0, 1]."""
    net, images = tokenizer(name), photos(2, 64)
    report = export(net, tmp_path / "export", lookup_from_codebook=True)
    loaded = stock(tmp_path / "export")
    config = loaded.config
    assert report.unit_range and config.lookup_from_codebook
    assert config.latent_channels == config.vq_embed_dim == width
    indices = net.tokenize(images).indices
    shape = (*indices.shape, width)
    pixels = loaded.decode(indices, force_not_quantize=True, shape=shape).sample
    expected = net.decode_indices(indices).sample / 2 + 0.5
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)
    first = loaded.encoder.conv_in((images + 1) / 2) - net.encoder.conv_in(images)
    assert first[..., 1:-1, 1:-1].abs().max() < 1e-6  # all but what sees black beyond the edge
    card = (tmp_path / "export" / "README.md").read_text()
    assert "shape=shape).sample  # in [0, 1]" in card and "AmusedPipeline" in card
    model = latentvae.load(tmp_path / "export")
    torch.testing.assert_close(
        model.decode_tokens(indices), (expected * 2 - 1).clamp(-1, 1), atol=1e-4, rtol=0
    )


def test_lookup_is_refused_where_there_is_no_vq_model(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"of VQModel, but this network cannot be a VQModel: the quantiser fsq"
    ):
        export(tokenizer("fsq"), tmp_path / "export", lookup_from_codebook=True)
    model = {"architecture": "vq", "quantizer": {"type": "lfq", "num_bits": 18}}
    with pytest.raises(UserError, match=r"its 262,144 codes are too many to list"):
        small_config(tmp_path, model=model, learn_logvar=False, lookup_from_codebook=True)
    assert not (tmp_path / "export").exists()


def test_lookup_of_a_run_that_has_ended(tmp_path: Path) -> None:
    shape = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    run = tmp_path / "run"
    model = {"architecture": "vq", "latent_channels": 4, **shape, "quantizer": STOCK["sphere"]}
    options: dict[str, Any] = {"learn_logvar": False, "lr_scheduler": "constant"}
    train(small_config(run, model=model, max_train_steps=1, **options))
    main(["export", str(run), "--out", str(tmp_path / "amused"), "--lookup_from_codebook"])
    configs = [
        json.loads((f / "config.json").read_text()) for f in (run / "export", tmp_path / "amused")
    ]
    assert [config["lookup_from_codebook"] for config in configs] == [False, True]
    saved = run / "config.yaml"
    saved.write_text(saved.read_text().replace("num_codes: 32", "num_codes: 64"))
    changed = copy.deepcopy(model) | {"quantizer": STOCK["sphere"] | {"num_codes": 64}}
    with pytest.raises(UserError, match=r"not of this configuration: size mismatch for .*quantize"):
        export_folder(run, out=tmp_path / "other")
    with pytest.raises(UserError, match=r"not of this configuration: size mismatch for .*quantize"):
        train(small_config(run, model=changed, max_train_steps=2, **options))
    kl = tmp_path / "kl"
    kl.mkdir()
    write_config(small_config(kl), kl / "config.yaml")
    with pytest.raises(UserError, match="lookup_from_codebook needs a tokenizer"):
        export_folder(kl, out=tmp_path / "other", lookup_from_codebook=True)


@pytest.mark.parametrize("name", ["gradient", "residual"])
def test_a_config_of_another_k_is_one_sentence(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export(tokenizer(name), folder)
    text = (folder / "config.json").read_text()
    for key in ("num_vq_embeddings", "num_codes"):
        text = text.replace(f'"{key}": 32', f'"{key}": 33')
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        latentvae.load(folder)
    assert "quantize" in str(caught.value) and "\n" not in str(caught.value)
    weights = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in weights.items() if "quantize" not in k}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"missing keys \(\d, first quantize"):
        latentvae.load(folder)


def test_images_smaller_than_f_and_foreign_indices_are_refused(tmp_path: Path) -> None:
    net = tokenizer("lfq")
    with pytest.raises(UserError, match="images of 3 x 40 pixels are smaller than the"):
        net.tokenize(torch.zeros(1, 3, 3, 40))
    for low, high in ((-1, 0), (0, 1024)):
        with pytest.raises(UserError, match=rf"in 0..1023 \(got {low}..{high}"):
            net.decode_indices(torch.tensor([[[low, high]]]))
    export(net, tmp_path / "export")
    model = latentvae.load(tmp_path / "export")
    with pytest.raises(UserError, match="images of 3 x 40 pixels are too small"):
        model.encode_tokens(torch.zeros(1, 3, 3, 40))
    assert model.encode_tokens(torch.zeros(1, 3, 4, 41)).shape == (1, 1, 11)
