"""Measuring, encoding and exporting compute float32 without TF32. Training keeps it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentvae.autoencoder import Autoencoder
from latentvae.compute.optimization import measure_psnr
from latentvae.compute.precision import full_float32
from latentvae.export import export_network
from latentvae.latents import latent_statistics
from latentvae.latents.encode import encode_folder
from tests.tiny import images, tokenizer

Flags = tuple[bool, str]


def flags() -> Flags:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def test_flags_are_off_inside_and_as_before_afterwards() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        before = flags()
        assert before == (True, "high")
        with pytest.raises(KeyError), full_float32():
            assert flags() == (False, "highest")
            with full_float32():
                pass
            assert flags() == (False, "highest")
            raise KeyError
        assert flags() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def seen_by(net: Any, call: Callable[[], Any]) -> set[Flags]:
    """Return the flags at each call of the network's convolutions, and restore its hooks."""
    seen: set[Flags] = set()
    hooks = [
        module.register_forward_hook(lambda *_: seen.add(flags()))
        for module in (net.encoder, net.decoder)
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def test_every_call_of_an_autoencoder_is_exact(tmp_path: Path) -> None:
    net = tokenizer("gradient").eval()
    model, pictures = Autoencoder(net, name="vq"), images(16, 16)
    indices = model.encode_tokens(pictures)
    z = model.encode(pictures)
    for call in (
        lambda: model.encode(pictures),
        lambda: model.encode_posterior(pictures),
        lambda: model.encode_tokens(pictures),
        lambda: model.decode(z),
        lambda: model.decode_tokens(indices),
        lambda: model.reconstruct(pictures),
        lambda: latent_statistics(net, [pictures]),
        lambda: measure_psnr(net, net),
    ):
        assert seen_by(net, call) == {(False, "highest")}
    assert flags() == (True, "highest")


def test_whole_folders_and_exports_are_exact(tmp_path: Path) -> None:
    net: Any = tokenizer("gradient").eval()
    photos, pictures = tmp_path / "photos", images(16, 16)
    photos.mkdir()
    Image.effect_noise((16, 16), 50).save(photos / "noise.png")
    statistics = latent_statistics(net, [pictures])
    for call in (
        lambda: encode_folder(Autoencoder(net, name="vq"), photos, tmp_path / "o", resolution=16),
        lambda: export_network(
            net, tmp_path / "export", statistics=statistics, sample_size=16, probe=pictures
        ),
    ):
        assert seen_by(net, call) == {(False, "highest")}
