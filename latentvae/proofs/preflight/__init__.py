"""Check a training before it starts, by its first updates on the user's own images."""

from latentvae.proofs.preflight.preflight import preflight

__all__ = ["preflight"]
