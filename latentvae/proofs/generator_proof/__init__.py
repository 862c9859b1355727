"""Measure how well latents or tokens suit a generator: train on them and on changed copies."""

from latentvae.proofs.generator_proof.prove import prove
from latentvae.proofs.generator_proof.settings import ProofSettings

__all__ = ["ProofSettings", "prove"]
