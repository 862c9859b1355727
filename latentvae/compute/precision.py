"""Choose the precision of multiplications: full float32, or bfloat16 where that is faster.

By default torch computes the convolutions of float32 networks in TensorFloat-32 (TF32) on NVIDIA
GPUs since Ampere. TF32 has 10 mantissa bits instead of 23. Latents on a GPU then differ by about
0.2% from latents on a CPU, and a latent near the boundary between two codes can get another token.
Training keeps torch's default, because TF32 is faster and errors of this size do not matter in
training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch TF32 off in a `with` block, or in a decorated function.

    torch's flags apply to all threads of the process. Afterwards the flags have their earlier
    values again. A network in bfloat16 or float16 is not affected.
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
