"""Entropy of the choice of codes (MAGVIT-v2, arXiv:2310.05737, section 3.1; LlamaGen): low for each
vector, high for the batch.

p(k | v) = softmax_k(-|v - c_k|^2 / temperature)

`N` vectors, `K` codes, `D` their width. The N x K probabilities exist in parts only, and are
computed again in the backward pass.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latentvae.distributed import all_reduce_mean

CPU_CHUNK, GPU_CHUNK = 2**21, 2**24  # probabilities at a time; a GPU has launches to save
SMALLEST = 1e-30  # whose logarithm has a finite gradient


def code_entropies(
    vectors: Tensor,
    codebook: Tensor,
    *,
    temperature: float,
    over_ranks: bool,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean entropy of p(k | v) over vectors, and entropy of its mean: two scalars, nats.

    Args:
        vectors: (N, D), float32.
        codebook: (K, D), float32.
        temperature: above 0, in squared units of the vectors.
        over_ranks: take the mean over all ranks' vectors (as many on each). A gradient that is
            then averaged over ranks, as DDP does, is that of the joined batch.
        chunk: how many probabilities are held at a time; left out, 2^21 on the CPU and 2^24
            elsewhere.
    """
    chunk = chunk or (CPU_CHUNK if vectors.device.type == "cpu" else GPU_CHUNK)
    entropy, probability = vectors.new_zeros(()), vectors.new_zeros(len(codebook))
    for part in vectors.split(max(chunk // len(codebook), 1)):
        sums = checkpoint(
            _sums, part, codebook, temperature, use_reentrant=False, preserve_rng_state=False
        )
        assert isinstance(sums, tuple)
        entropy, probability = entropy + sums[0], probability + sums[1]
    entropy, probability = entropy / len(vectors), probability / len(vectors)
    if over_ranks:
        joined = all_reduce_mean(probability)
        probability = probability + (joined - probability).detach()
    batch = -(probability * probability.clamp(min=SMALLEST).log()).sum()
    return entropy, batch


def _sums(part: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Over the vectors of a part: of the entropy, a scalar, and of the probabilities, (K,)."""
    # |v|^2 is the same for all codes.
    logits = torch.addmm(-codebook.square().sum(1), part, codebook.t(), alpha=2.0) / temperature
    log_p = logits.log_softmax(1)  # (n, K)
    p = log_p.exp()
    return -(p * log_p).sum(), p.sum(0)
