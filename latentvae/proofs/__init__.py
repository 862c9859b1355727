"""Proofs about a run: `preflight` of its wiring, `verify_resume` of its resume."""
