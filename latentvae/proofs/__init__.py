"""Proofs about a run: `preflight` checks its wiring, `verify_resume` checks its resume."""
