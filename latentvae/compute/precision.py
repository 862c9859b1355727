"""Choose the precision of multiplications: full float32, or bfloat16 where that is faster.

On NVIDIA GPUs since Ampere, torch by default computes the convolutions of float32 networks in
TensorFloat-32 (TF32). TF32 has 10 mantissa bits instead of 23. So latents on a GPU differ by about
0.2% from latents on a CPU. A latent near the boundary between two codes can get another token on a
GPU than on a CPU. Training uses torch's default, because TF32 is faster and errors of this size do
not matter in training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch TF32 off in a `with` block, or in a decorated function.

    torch's flags for TF32 apply to all threads of the process. At the end of the `with` block, the
    flags get their earlier values again. Networks in bfloat16 or float16 are not affected.
    """
    convolutions = torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and has_instructions("avx512_bf16", "amx_bf16")


def has_instructions(*names: str) -> bool:
    """Return whether the processor supports one of the named instruction sets."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in names)
