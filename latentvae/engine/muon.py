"""Train matrices by Muon, and all other parameters by AdamW, with one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) keeps a moving average of the
gradients of each matrix. Among the matrices whose singular values are all about 1, the step is the
one nearest to this average. So all directions of a matrix learn equally fast. A convolution's
weight (O, I, k, k) counts as a matrix (O, I k k).

The step is scaled by 0.2 sqrt(max(rows, columns)). The root mean square of the step is then about
as large as in AdamW (Liu et al. 2025, arXiv:2502.16982). So AdamW's learning rates also suit Muon.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b and c of the iteration, from Jordan's post
ITERATIONS = 5
MATCHES_ADAMW = 0.2
EPSILON = 1e-7


class MuonWithAdamW(optim.AdamW):
    """An optimizer that trains matrices by Muon, and all other parameters by AdamW.

    Each parameter group has the key `muon`. For the matrices, the key holds Muon's learning rate
    divided by AdamW's learning rate. For all other parameters, the key holds None.

    Args:
        matrices: weights of two or more dimensions.
        others: all other parameters.
        lr: learning rate of AdamW.
        muon_lr: learning rate of Muon.
        momentum: decay of Muon's average of gradients.
        options: other options of AdamW. Muon uses AdamW's weight decay.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        *,
        lr: float,
        muon_lr: float,
        momentum: float = 0.95,
        **options: Any,
    ) -> None:
        groups = [
            {"params": list(others), "muon": None},
            {"params": list(matrices), "muon": muon_lr / lr},
        ]
        self.momentum = momentum
        super().__init__([group for group in groups if group["params"]], lr=lr, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
        # Hide the groups of Muon while AdamW steps.
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["muon"] is None]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups

        for group in groups:
            if group["muon"] is not None:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Update the matrices of a parameter group. Matrices of the same shape are batched."""
        rate = group["lr"] * group["muon"]
        by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["exp_avg"] = torch.zeros_like(weight)
            average = state["exp_avg"].lerp_(weight.grad, 1 - self.momentum)
            looked_ahead = weight.grad.lerp(average, self.momentum)  # Nesterov
            by_shape.setdefault(tuple(weight.shape), []).append((weight, looked_ahead.flatten(1)))

        for found in by_shape.values():
            steps = orthogonalized(torch.stack([matrix for _, matrix in found]))
            scale = MATCHES_ADAMW * max(steps.shape[1:]) ** 0.5
            for (weight, _), step in zip(found, steps, strict=True):
                weight.mul_(1 - rate * group["weight_decay"])
                weight.sub_(step.view(weight.shape), alpha=rate * scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices (N, R, S) with their singular values moved to between about 0.7 and 1.2.

    N is the number of matrices, each with R rows and S columns. A singular value below about 0.0015
    times the Frobenius norm of its matrix stays below 0.7.

    The iteration X <- a X + b (X X') X + c (X X')^2 X uses the `COEFFICIENTS` a, b and c. X' is the
    transpose of X. Each step multiplies X by a polynomial of G = X X'. So the function computes
    these polynomials from G alone, which is cheaper if X is not square.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + EPSILON)

    gram = x @ x.mT
    identity = torch.eye(gram.shape[1], device=x.device)
    total = identity.expand_as(gram)
    for _ in range(ITERATIONS):
        factor = a * identity + b * gram + c * (gram @ gram)
        total = factor @ total
        gram = factor @ gram @ factor
    x = total @ x
    return x.mT if tall else x
