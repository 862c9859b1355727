"""Proof of the wiring before a run: what the user's own run does in its first updates, checked."""

from latentvae.proofs.preflight.preflight import preflight

__all__ = ["preflight"]
