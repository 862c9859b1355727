"""The objective: the model's loss as a weighted sum of named terms.

The source of the loss is Rombach et al. 2022, arXiv:2112.10752, appendix G.

    error = rec + perceptual_scale * lpips + feature_scale * feature
            + logit_laplace_scale * logit_laplace
    nll = mean(error) / exp(output_logvar) + output_logvar
    loss = nll + weighted losses of the latents + kl_scale * factor * kl + adversarial part

`rec` is the pixel error, and `kl` is the KL of the latents. `output_logvar` is the log-variance of
the output likelihood, and `factor` changes the KL's weight during training. Each term has a name
and a weight. The policy of a term is the rule by which its weight changes during training:

    term            weight                                  policy
    rec             1                                       constant
    lpips           perceptual_scale                        constant
    feature         feature_scale                           constant
    logit_laplace   logit_laplace_scale                     constant
    kl              kl_scale                                constant, warm-up or target. The KL is
                                                            plain, or has free bits or a capacity
    codebook terms  options of the quantizer                constant
    adversarial     disc_scale                              ramp, balanced by ratio of gradients

    objective.py            `Objective`: the terms, their weights and their sum
    loss_values.py          `Loss`: what the objective returns
    kl_forms.py             forms of the KL, and the warm-up of its weight
    kl_target.py            the controller that moves the KL's weight to reach a target
    adversarial_weight.py   ramp and balance of the adversarial term
    build_objective.py      build the objective from the options

Pixel terms are means over image elements. The KL is summed over latent elements, and the sum is
divided by the number of image elements C*H*W. Stable Diffusion uses sums for the pixel terms and
the KL. This project divides the pixel terms and the KL by C*H*W, so Stable Diffusion's KL weight
1e-6 has the same effect. No weight depends on the resolution or the batch size.
"""

from latentvae.losses.objective.loss_values import Loss
from latentvae.losses.objective.objective import Objective

__all__ = ["Loss", "Objective"]
