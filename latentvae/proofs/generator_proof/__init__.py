"""Prove what latents or tokens are worth: train generators on them and on changed copies."""

from latentvae.proofs.generator_proof.prove import prove
from latentvae.proofs.generator_proof.settings import ProofSettings

__all__ = ["ProofSettings", "prove"]
