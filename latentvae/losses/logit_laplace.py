"""The logit-Laplace loss of ViT-VQGAN, on the pixels that a decoder returns.

DALL-E (arXiv:2102.12092, appendix A.3) maps a pixel in [-1, 1] to x in [eps, 1 - eps], eps = 0.1.
The density of x is

    f(x; mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)).

DALL-E's decoder returns six maps, three of mu and three of ln b (`likelihoods.LogitLaplace`).
ViT-VQGAN (arXiv:2110.04627) adds a logit-Laplace loss with weight 0.1 to the L2 loss of its three
output maps. We found no description of ViT-VQGAN's value of b. Three maps can only give mu. So this
module maps each output to x like a pixel, takes the logit of this x as mu, and sets b to 1. Another
constant b would only change the weight of the loss.
"""

import math

import torch
from torch import Tensor

EPS = 0.1


def logit_laplace(recon: Tensor, images: Tensor) -> Tensor:
    """Return the negative logit-Laplace log-likelihood of each pixel, in nats, float32.

    The scale b of the distribution is 1. For decoder outputs outside of [-1, 1], the logit is
    continued by its tangent. So the gradient at these outputs is finite and moves them towards the
    image.

    Args:
        recon: outputs of the decoder, of the same shape as the images.
        images: pixels in [-1, 1], of any shape.
    """
    x, mapped = (0.5 + (0.5 - EPS) * pixels.float() for pixels in (images, recon))
    logit = torch.logit(x)
    return math.log(2.0) + torch.log(x * (1.0 - x)) + (logit - _logit(mapped)).abs()


def _logit(x: Tensor) -> Tensor:
    """Return the logit of x in [eps, 1 - eps], and continue the logit linearly for other x."""
    inside = x.clamp(EPS, 1.0 - EPS)
    return torch.logit(inside) + (x - inside) / (EPS * (1.0 - EPS))
