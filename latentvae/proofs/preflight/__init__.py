"""Check the wiring before a run, on the first updates of the user's own run."""

from latentvae.proofs.preflight.preflight import preflight

__all__ = ["preflight"]
