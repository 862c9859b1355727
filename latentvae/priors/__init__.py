"""Generators of tokens. They show how well a model can learn the codes of an autoencoder."""

from latentvae.priors.byte_encoder import ByteTextEncoder
from latentvae.priors.pipeline import TokenPipeline
from latentvae.priors.transformer import TokenTransformer

__all__ = ["ByteTextEncoder", "TokenPipeline", "TokenTransformer"]
