import torch
from accelerate.utils.operations import convert_to_fp32

from latentvae.outputs import AutoencoderOutput


def test_accelerate_converts_every_field_to_float32() -> None:
    half = torch.ones(2, dtype=torch.bfloat16)
    out = convert_to_fp32(AutoencoderOutput(recon=half, z=half, kl=half, output_logvar=half))
    assert isinstance(out, AutoencoderOutput)
    for name in ("recon", "z", "kl", "output_logvar"):
        assert getattr(out, name).dtype == out[name].dtype == torch.float32
