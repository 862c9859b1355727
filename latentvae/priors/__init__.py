"""Generators of tokens and latents, which show how well an autoencoder's codes can be learned."""

from latentvae.priors.byte_encoder import ByteTextEncoder
from latentvae.priors.flow_pipeline import FlowPipeline
from latentvae.priors.pipeline import TokenPipeline
from latentvae.priors.transformer import TokenTransformer

__all__ = ["ByteTextEncoder", "FlowPipeline", "TokenPipeline", "TokenTransformer"]
