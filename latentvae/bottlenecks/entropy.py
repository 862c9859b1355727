"""Entropies of the softmax over codes (MAGVIT-v2, arXiv:2310.05737, section 3.1, and LlamaGen).

p(k | v) = softmax_k(-|v - c_k|^2 / temperature)

Training lowers the entropy of p(k | v) for each vector v, so that each vector is clearly nearest to
one code. Training raises the entropy of the mean of p over the batch, so that all codes are used.
The N x K probabilities are never all in memory at the same time. The probabilities are computed for
a few vectors at a time, and computed again in the backward pass.

`N` vectors, `K` codes, `D` code width.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latentvae.distributed import all_reduce_mean

# Number of probabilities in memory at a time. A larger number means fewer kernel launches on a GPU.
CPU_CHUNK, GPU_CHUNK = 2**21, 2**24
SMALLEST = 1e-30  # smallest probability in a logarithm, so that its gradient stays finite


def code_entropies(
    vectors: Tensor,
    codebook: Tensor,
    *,
    temperature: float,
    over_ranks: bool,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean entropy of p(k | v) over vectors, and the entropy of the mean p, in nats.

    p(k | v) is a softmax over codes k of the negative squared distance between vector v and code k.

    Args:
        vectors: N vectors of the encoder with D channels, (N, D), float32.
        codebook: the K codes, (K, D), float32.
        temperature: temperature of the softmax, above 0. The squared distances are divided by it.
        over_ranks: take the mean p over the vectors of all ranks. The mean entropy is still that of
            this rank's vectors. Every rank must have the same number of vectors. DDP averages the
            ranks' gradients. With `over_ranks`, the averaged gradient equals the gradient for one
            large batch of the vectors of all ranks.
        chunk: number of probabilities in memory at a time. The default is 2^21 on the CPU and 2^24
            on other devices.
    """
    chunk = chunk or (CPU_CHUNK if vectors.device.type == "cpu" else GPU_CHUNK)

    # sums over vectors, in parts
    entropy, probability = vectors.new_zeros(()), vectors.new_zeros(len(codebook))
    for part in vectors.split(max(chunk // len(codebook), 1)):
        sums = checkpoint(
            _sums, part, codebook, temperature, use_reentrant=False, preserve_rng_state=False
        )
        assert isinstance(sums, tuple)
        entropy, probability = entropy + sums[0], probability + sums[1]
    entropy, probability = entropy / len(vectors), probability / len(vectors)

    # entropy of the batch
    if over_ranks:
        joined = all_reduce_mean(probability)
        probability = probability + (joined - probability).detach()
    batch = -(probability * probability.clamp(min=SMALLEST).log()).sum()
    return entropy, batch


def _sums(part: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the sums of entropies (a scalar) and of probabilities (one sum per code) over vectors.

    Args:
        part: n vectors of D channels, (n, D).
        codebook: K codes, (K, D).
        temperature: temperature of the softmax over codes.
    """
    # The squared length of a vector is the same for all codes, so the softmax does not need it.
    logits = torch.addmm(-codebook.square().sum(1), part, codebook.t(), alpha=2.0) / temperature
    log_p = logits.log_softmax(1)  # (n, K)
    p = log_p.exp()
    return -(p * log_p).sum(), p.sum(0)
