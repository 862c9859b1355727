"""Text encoders of `transformers` by path."""

from pathlib import Path

import torch
from transformers import T5EncoderModel

from latentvae.priors.text import load_text_encoder
from tests.tasks.prior.text_encoder import write_text_encoder


def test_a_frozen_encoder_of_half_precision_computes_in_float32(tmp_path: Path) -> None:
    """Pipelines load it in float32, so a training has to see the same states."""
    folder = write_text_encoder(tmp_path / "encoder", ["a", "cat"])
    T5EncoderModel.from_pretrained(folder, use_safetensors=True).bfloat16().save_pretrained(folder)
    _, encoder = load_text_encoder(str(folder))
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32}
