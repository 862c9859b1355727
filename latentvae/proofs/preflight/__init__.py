"""Check a run before its start. The checks examine the first updates of the user's own run."""

from latentvae.proofs.preflight.preflight import preflight

__all__ = ["preflight"]
