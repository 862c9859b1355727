"""Generative models that learn an autoencoder's tokens or latents, and show how easy this is."""

from latentvae.priors.byte_encoder import ByteTextEncoder
from latentvae.priors.flow_pipeline import FlowPipeline
from latentvae.priors.pipeline import TokenPipeline
from latentvae.priors.transformer import TokenTransformer

__all__ = ["ByteTextEncoder", "FlowPipeline", "TokenPipeline", "TokenTransformer"]
