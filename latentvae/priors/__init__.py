"""Generative models of an autoencoder's tokens or latents, to see how easy these are to learn."""

from latentvae.priors.byte_encoder import ByteTextEncoder
from latentvae.priors.flow_pipeline import FlowPipeline
from latentvae.priors.pipeline import TokenPipeline
from latentvae.priors.transformer import TokenTransformer

__all__ = ["ByteTextEncoder", "FlowPipeline", "TokenPipeline", "TokenTransformer"]
