"""The discrete autoencoder beside its training: indices, another quantiser, stock VQModels."""

from typing import Any

import pytest
import torch
from diffusers import VQModel

from latentvae.errors import UserError
from latentvae.models import FAMILIES, DiscreteAutoencoder
from latentvae.models.conv.stock_vq import from_vq_model
from tests.tiny import images

VQ = {"type": "vq", "num_codes": 16, "code_channels": 4}


def tiny(quantizer: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_out_channels": (8, 8), "latent_channels": 4}
    return DiscreteAutoencoder(**shape, norm_num_groups=4, quantizer=quantizer).eval()


def test_the_defaults_are_a_network() -> None:
    with torch.device("meta"):
        net: Any = DiscreteAutoencoder()
    assert net.config["quantizer"]["num_codes"] == net.quantize.num_codes == 1024


@pytest.mark.parametrize(
    "quantizer", [VQ, {"type": "fsq", "levels": [8, 5, 5]}, {"type": "lfq", "num_bits": 6}]
)
def test_indices_of_any_integer_type_decode(quantizer: dict[str, Any]) -> None:
    net = tiny(quantizer)
    indices = net.tokenize(images(8, 12)).indices
    expected = net.decode_indices(indices).sample
    for dtype in (torch.uint8, torch.uint16, torch.int16, torch.int32):
        assert torch.equal(net.decode_indices(indices.to(dtype)).sample, expected)
    with pytest.raises(UserError, match="must be integers"):
        net.decode_indices(indices.float())


def test_another_quantiser_takes_the_mode_and_precision_of_the_one_before() -> None:
    net = tiny(VQ).to(torch.bfloat16)
    codebook = net.quantize.weight.clone()
    net.requantize({**VQ, "ema_decay": 0.9})
    assert not net.quantize.training and net.quantize.weight.dtype == torch.bfloat16
    assert torch.equal(net.quantize.weight, codebook)
    net.train().requantize(VQ)
    assert net.quantize.training


def test_another_restart_threshold_starts_the_averages_of_use_anew() -> None:
    """A base trained without restarts has averages of 0, so every code would restart at once."""
    net = tiny(VQ)
    assert net.quantize.usage.max() == 0
    net.requantize({**VQ, "restart_threshold": 0.1})
    assert torch.equal(net.quantize.usage, torch.full((16,), net.quantize.start_usage))
    assert net.quantize.start_usage > 0.1


@pytest.mark.parametrize(
    ("down", "up", "fits"),
    [("", "", True), ("Attn", "Attn", True), ("Attn", "", False), ("", "Attn", False)],
)
def test_attention_of_a_vq_model_is_on_both_sides_or_none(down: str, up: str, fits: bool) -> None:
    network: Any = VQModel  # diffusers types widths as one-element tuples
    net = network(
        down_block_types=("DownEncoderBlock2D", f"{down}DownEncoderBlock2D"),
        up_block_types=(f"{up}UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        num_vq_embeddings=8,
    )
    assert (from_vq_model(net) is not None) == fits
    assert (FAMILIES["vq"].adapt(net, {}) is not None) == fits
