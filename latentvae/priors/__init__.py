"""Generators of tokens and latents, which show what an autoencoder's codes are worth."""

from latentvae.priors.pipeline import TokenPipeline
from latentvae.priors.transformer import TokenTransformer

__all__ = ["TokenPipeline", "TokenTransformer"]
