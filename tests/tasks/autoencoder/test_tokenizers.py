"""Runs with a discrete bottleneck: they learn, go on to the bit, and are exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file

import latentvae
from latentvae.bottlenecks.gradients import GRADIENTS
from latentvae.engine.log import read_rows
from latentvae.errors import UserError
from latentvae.models.conv.vq import VQModelConfig
from latentvae.tasks.autoencoder import train
from latentvae.tasks.autoencoder.fine_tuning import open_base, with_shape_of
from latentvae.tasks.autoencoder.run_export import export_folder
from tests.tasks.autoencoder.small import broken_off, small_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
CODEBOOK = {"num_codes": 32, "code_channels": 4, "restart_threshold": 0.2, "kmeans_iterations": 2}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "vq": {"type": "vq", **CODEBOOK},
    "vq_average": {"type": "vq", "codebook_decay": 0.8, "gradient": "rotation", **CODEBOOK},
    "vq_sphere": {"type": "vq", "l2_normalize": True, "entropy_weight": 0.1, **CODEBOOK},
    "residual": {"type": "residual", "num_levels": 2, "codebook_decay": 0.8, **CODEBOOK},
    "fsq": {"type": "fsq", "levels": [4, 3, 3]},
    "lfq": {"type": "lfq", "num_bits": 6, "entropy_weight": 0.1},
    "gumbel": {"type": "gumbel", "num_codes": 32, "code_channels": 4, "temperature_steps": 3},
    "simvq": {"type": "simvq", "num_codes": 32, "code_channels": 4},
}
STOCK = {"vq", "vq_average", "vq_sphere", "lfq", "simvq"}


def tokenizer(name: str, **options: Any) -> dict[str, Any]:
    return {
        "architecture": "vq",
        "block_out_channels": [8, 8, 16],
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 4,
        "quantizer": QUANTIZERS[name],
        **options,
    }


def run(folder: Path, name: str, **options: Any) -> Path:
    shape = {"learn_logvar": False, "lr_scheduler": "constant"} | options
    return train(small_config(folder, model=tokenizer(name), **shape))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("vq_average", "gumbel") else [pytest.mark.slow])
        for name in QUANTIZERS  # the contract tests look at each in the fast suite
    ],
)
def test_a_run_goes_on_to_the_bit_and_loads(name: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", name, max_train_steps=3, log_steps=1)
    broken_off(tmp_path / "whole", tmp_path / "broken", update=2)
    broken = run(tmp_path / "broken", name, max_train_steps=3, log_steps=1)
    expected, found = load_file(whole / WEIGHTS), load_file(broken / WEIGHTS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    export_folder(tmp_path / "broken", out=tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(value, again[key]) for key, value in found.items())

    kind = json.loads((broken / "config.json").read_text())["_class_name"]
    assert kind == ("VQModel" if name in STOCK else "DiscreteAutoencoder")
    assert f"{kind}.from_pretrained" in (broken / "README.md").read_text()
    model, images = latentvae.load(broken), torch.rand(2, 3, 32, 40) * 2 - 1
    indices = model.encode_tokens(images)
    assert indices.shape == ((2, 2, 8, 10) if name == "residual" else (2, 8, 10))
    recon = model.decode_tokens(indices)
    assert torch.allclose(torch.as_tensor(recon), model.reconstruct(images), atol=1e-5)
    rows = read_rows(tmp_path / "whole" / "log.jsonl")
    validated = [row for row in rows if "validation/psnr" in row][-1]
    assert 0 < validated["validation/usage"] <= 1
    tokens = validated["validation/images"] * indices[0].numel() * (8 * 8) // (8 * 10)
    assert validated["validation/tokens"] == tokens  # of 32 px, where `images` are 32 x 40
    assert 1 <= validated["validation/perplexity"] <= model.num_codes + 1e-6
    assert ("tokens/restarted" in rows[1]) == name.startswith(("vq", "residual"))


def test_the_encoder_learns_through_the_codes(tmp_path: Path) -> None:
    before = run(tmp_path / "one", "fsq", max_train_steps=1, ema_decay=0.0)
    after = run(tmp_path / "two", "fsq", max_train_steps=6, ema_decay=0.0)
    key = "encoder.conv_in.weight"
    assert not torch.equal(load_file(before / WEIGHTS)[key], load_file(after / WEIGHTS)[key])


def test_codes_start_at_what_the_encoder_gives(tmp_path: Path) -> None:
    """k-means puts codes where the vectors are: a random start near zero uses few of them."""
    random = QUANTIZERS["vq"] | {"kmeans_iterations": 0, "restart_threshold": 0.0}
    options = {"max_train_steps": 1, "validation_steps": 1, "ema_decay": 0.0, "learning_rate": 1e-9}
    usage = {}
    for name, quantizer in {"random": random, "kmeans": QUANTIZERS["vq"]}.items():
        model = tokenizer("vq") | {"quantizer": quantizer}
        train(small_config(tmp_path / name, model=model, learn_logvar=False, **options))
        rows = read_rows(tmp_path / name / "log.jsonl")
        usage[name] = next(r["validation/usage"] for r in rows if "validation/usage" in r)
    assert usage["kmeans"] > 1.5 * usage["random"]


def test_logit_laplace_is_the_objective_and_images_come_back(tmp_path: Path) -> None:
    model = tokenizer("gumbel", likelihood="logit_laplace")
    options = {"learn_logvar": False, "kl_scale": 0.1, "kl_warmup_steps": 2, "log_steps": 1}
    export = train(small_config(tmp_path / "run", model=model, max_train_steps=3, **options))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    recon = latentvae.load(export).reconstruct(images)
    assert recon.shape == images.shape
    rows = read_rows(tmp_path / "run" / "log.jsonl")
    assert "latent/kl_nats" in rows[1]  # after the validation before the first update
    assert "likelihood" in (export / "README.md").read_text()


def test_a_stock_vq_model_is_fine_tuned_with_its_tokens_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=16,
        vq_embed_dim=2,
    )
    stock.quantize.embedding.weight.data.normal_()
    stock.save_pretrained(tmp_path / "base")
    model = tokenizer(
        "vq", pretrained_model_name_or_path=str(tmp_path / "base"), freeze_encoder=True
    )
    options = {"learn_logvar": False, "max_train_steps": 3}
    export = train(small_config(tmp_path / "run", model=model, **options))
    base, tuned = (latentvae.load(path) for path in (tmp_path / "base", export))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(base.encode(images), tuned.encode(images))
    assert torch.equal(base.encode_tokens(images), tuned.encode_tokens(images))
    assert tuned.net.config["scaling_factor"] == base.net.config["scaling_factor"]
    assert not torch.equal(base.reconstruct(images), tuned.reconstruct(images))


def test_how_a_pretrained_codebook_goes_on_to_learn_is_the_runs_to_say(tmp_path: Path) -> None:
    """And what it is, the base's: an export of codes on the unit sphere stays there."""
    base = run(tmp_path / "first", "vq_sphere", max_train_steps=2)
    learning = {"type": "vq", "num_codes": 8, "code_channels": 4, "codebook_decay": 0.9}
    model = tokenizer("vq", pretrained_model_name_or_path=str(base))
    model["quantizer"] = learning | {"gradient": "rotation"}
    config = small_config(tmp_path / "run", model=model, learn_logvar=False, max_train_steps=1)
    opened = open_base(config)
    config = with_shape_of(config, opened)
    assert opened is not None and isinstance(config.model, VQModelConfig)
    quantizer = opened.net.quantize
    assert (quantizer.num_codes, quantizer.l2_normalize) == (32, True)
    assert quantizer.ema_decay == 0.9 and quantizer.gradient is GRADIENTS["rotation"]
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    indices = opened.net.eval().tokenize(images).indices
    assert torch.equal(indices, latentvae.load(base).encode_tokens(images))
    assert torch.equal(quantizer.embed_sum, quantizer.weight)
    train(config)  # from the path to the export


@pytest.mark.parametrize(
    "other", [{"norm_type": "spatial"}, {"act_fn": "relu"}, {"lookup_from_codebook": True}]
)
def test_a_vq_model_of_other_blocks_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    shape: dict[str, Any] = {"block_out_channels": (32,), "norm_num_groups": 32}
    VQModel(**shape, latent_channels=4, **other).save_pretrained(tmp_path / "base")
    model = tokenizer("vq", pretrained_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(UserError, match="is a VQModel, but "):
        open_base(small_config(tmp_path / "run", model=model, learn_logvar=False))


@pytest.mark.parametrize(("name", "lookup"), [("vq", True), ("fsq", False)])
def test_the_lines_of_the_card_run(name: str, lookup: bool, tmp_path: Path) -> None:
    export = run(tmp_path / "run", name, max_train_steps=1, lookup_from_codebook=lookup)
    card = (export / "README.md").read_text().replace("path/to/this/folder", str(export))
    assert "posterior mode" not in card and "`vae=`" not in card
    assert ("aMUSEd" in card) == ("except for rounding" in card) == lookup
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    known: dict[str, Any] = {"images": (images + 1) / 2 if lookup else images}
    with torch.no_grad():
        exec(card.split("```python\n")[1].split("```")[0], known)
    recon = known["recon"] * 2 - 1 if lookup else known["recon"]
    expected = latentvae.load(export).reconstruct(images)
    assert torch.allclose(recon.clamp(-1, 1), expected, atol=1e-4)


def test_few_vectors_for_k_means_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """21 photos of 8 x 8 positions are 1,344 vectors."""
    for num_codes, told in ((1344, False), (1345, True)):
        model = tokenizer("vq") | {"quantizer": QUANTIZERS["vq"] | {"num_codes": num_codes}}
        options = {"learn_logvar": False, "max_train_steps": 1}
        train(small_config(tmp_path / str(num_codes), model=model, **options))
        assert (
            f"k-means has 1,344 vectors for {num_codes:,} codes" in capsys.readouterr().out
        ) == told


def test_indices_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    model = latentvae.load(run(tmp_path / "run", "vq", max_train_steps=1))
    with pytest.raises(UserError, match=r"are in 0\.\.31, not 0\.\.32"):
        model.decode_tokens(torch.arange(33)[None, None])
    with pytest.raises(UserError, match=r"are integers \(B, h, w\), not float32 \(1, 2, 2\)"):
        model.decode_tokens(torch.zeros(1, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_capacity": 0.5}, r"kl_capacity 0.5 has no meaning for the architecture vq \(vq\)"),
        ({"deterministic_posterior": True}, "has no posterior"),
        ({"export_profile": "sd3"}, "export_profile sd3 has no meaning"),
    ],
)
def test_options_without_a_meaning_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        small_config(tmp_path, model=tokenizer("vq"), **options)
