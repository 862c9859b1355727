"""The distance of images in the features of frozen networks, against a computation by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)

from latentvae.engine.log import read_rows
from latentvae.engine.loop import train
from latentvae.errors import UserError
from latentvae.losses.feature_loss import load_feature_loss
from latentvae.proofs.preflight import preflight
from latentvae.tasks.autoencoder.task import AutoencoderTask
from tests.proofs.injection import around
from tests.tasks.autoencoder.small import small_config
from tests.tiny import photos

pytestmark = pytest.mark.usefixtures("own_accelerate")

SHAPE: Any = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 16}
STAGES: Any = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
NETWORKS: dict[str, Any] = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SHAPE, patch_size=14, image_size=28)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(**STAGES)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SHAPE, patch_size=8, image_size=16)),
}


@pytest.fixture(params=NETWORKS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(request.param, tmp_path)


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    return saved("dinov2", tmp_path)


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    NETWORKS[name]().save_pretrained(folder / name)
    return folder / name


def test_it_is_a_distance_with_a_gradient_to_recon_alone(folder: Path) -> None:
    loss = load_feature_loss(str(folder), sizes=[(32, 32)]).train()
    images, other = photos(2).requires_grad_(), photos(4)[2:].requires_grad_()
    assert loss(images, images).abs().max() < 1e-6
    assert loss(images, -images).min() > 1e-4

    distance = loss(images, other)
    assert distance.shape == (2,) and ((0 < distance) & (distance < 2)).all()
    torch.testing.assert_close(distance[1:], loss(images[1:], other[1:]), rtol=1e-4, atol=1e-6)
    distance.sum().backward()
    assert images.grad is None and other.grad is not None and other.grad.abs().min() > 0
    assert not any(m.training for m in loss.modules())
    assert all(p.grad is None for p in loss.parameters())


def test_it_equals_the_formula_of_its_source(dino: Path) -> None:
    """28 px need no resizing. The source takes means over channels, so it has ours * 2 / C."""
    loss, net = load_feature_loss(str(dino)), Dinov2Model.from_pretrained(dino).eval()
    pair = [photos(2, side=28), photos(4, side=28)[2:]]
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        states = [net((x / 2 + 0.5 - mean) / std, output_hidden_states=True) for x in pair]
        first, second = (s.hidden_states[1:] for s in states)
    assert len(first) == 2 and first[0].shape == (2, 5, 16)
    cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(loss(*pair), 1 - torch.stack(cosines).mean(dim=(0, 2)))
    parts = [
        (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).pow(2).mean(dim=(1, 2))
        for a, b in zip(first, second, strict=True)
    ]
    torch.testing.assert_close(loss(*pair), torch.stack(parts).mean(dim=0) * 16 / 2)


def test_colours_and_sizes_are_those_of_the_network(dino: Path) -> None:
    images, other = photos(2), photos(4)[2:]
    seen = []
    loss = load_feature_loss(str(dino))
    loss.network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    before = loss(images, other)
    assert [x.shape for x in seen] == [(2, 3, 28, 28)] * 2  # 32 px, to the nearest multiple of 14

    # other colours, in the file of the network's processor
    BitImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(dino)
    changed = load_feature_loss(str(dino))
    assert changed.mean.flatten().tolist() == changed.std.flatten().tolist() == [0.5] * 3
    assert (changed(images, other) - before).abs().max() > 1e-4
    assert changed.weights_id != loss.weights_id


def test_networks_that_cannot_serve_are_named(dino: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor the name of a Hub model"):
        load_feature_loss(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a network that transformers can load"):
        load_feature_loss(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="features of images of 4 x 4 px"):
        load_feature_loss(str(saved("convnext", tmp_path)), sizes=[(4, 4)])
    BertModel(BertConfig(**SHAPE, vocab_size=8)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="BertModel, which does not take images"):
        load_feature_loss(str(tmp_path / "bert"))

    # weights are never random
    file = dino / "model.safetensors"
    tensors = load_file(file)
    lost = tensors.pop("encoder.layer.1.norm1.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for 1 tensors .* encoder"):
        load_feature_loss(str(dino))
    save_file({**tensors, "encoder.layer.1.norm1.weight": lost[:3]}, file, {"format": "pt"})
    with pytest.raises(UserError, match="not a network that transformers can load"):
        load_feature_loss(str(dino))
    file.unlink()
    with pytest.raises(UserError, match="not a network that transformers can load"):
        load_feature_loss(str(dino))
    with pytest.raises(UserError, match="feature_scale 2 needs feature_loss too"):
        small_config(tmp_path, feature_scale=2.0)


def test_a_run_learns_from_it_and_resumes_with_the_same_weights_alone(
    dino: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"feature_loss": str(dino), "feature_scale": 0.5, "disc_scale": 0.0}
    options |= {"perceptual_scale": 0.0, "checkpointing_steps": 2, "log_steps": 1}
    run = tmp_path / "run"
    train(AutoencoderTask(small_config(run, max_train_steps=2, **options)))
    values = [row["loss/feature"] for row in read_rows(run / "log.jsonl") if "loss/rec" in row]
    assert len(values) == 2 and all(0 < value < 2 for value in values)
    printed = capsys.readouterr().out
    assert "0.5 feature loss" in printed and "2 layers are compared" in printed
    card = (run / "export" / "README.md").read_text()
    assert "feature_loss: dinov2" in card and str(tmp_path) not in card

    # the same network in another folder is fine, and another network is not
    dino.rename(tmp_path / "moved")
    options["feature_loss"] = str(tmp_path / "moved")
    train(AutoencoderTask(small_config(run, max_train_steps=3, **options)))
    torch.manual_seed(1)
    NETWORKS["dinov2"]().save_pretrained(tmp_path / "moved")
    for other in (options, {**options, "feature_loss": None, "feature_scale": 1.0}):
        with pytest.raises(UserError, match=r"feature_(loss: \w+ then|scale)"):
            train(AutoencoderTask(small_config(run, max_train_steps=4, **other)))


@pytest.mark.parametrize("fault", [False, True])
def test_preflight_follows_its_gradient(
    dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, fault: bool
) -> None:
    if fault:
        forward = around(
            "latentvae.losses.feature_loss:FeatureLoss.forward",
            lambda original, self, images, recon: (
                original(self, images, recon.detach()) + 0 * recon.sum()
            ),
        )
        forward(monkeypatch)
    config = small_config(tmp_path / "run", train_batch_size=2, feature_loss=str(dino))
    assert preflight(config) == fault
    said = capsys.readouterr().out
    assert ("FAILED feature-gradient" in said) == fault and "feature-gradient" in said
    assert said.count("FAILED") == fault
