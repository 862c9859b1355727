"""Measure how well a generator learns from latents or tokens, and from changed copies of them."""

from latentvae.proofs.generator_proof.prove import prove
from latentvae.proofs.generator_proof.settings import ProofSettings

__all__ = ["ProofSettings", "prove"]
