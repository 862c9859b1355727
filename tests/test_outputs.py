from dataclasses import fields

import torch
from accelerate.utils.operations import convert_to_fp32

from latentvae.outputs import AutoencoderOutput


def test_accelerate_converts_every_field_to_float32() -> None:
    names = [field.name for field in fields(AutoencoderOutput)]
    half = torch.ones(2, 2, dtype=torch.bfloat16)
    out = convert_to_fp32(AutoencoderOutput(**dict.fromkeys(names, half)))
    assert isinstance(out, AutoencoderOutput)
    for name in names:
        assert getattr(out, name).dtype == out[name].dtype == torch.float32
