"""Hierarchical VAEs: one top-down network with groups of latents at every resolution."""
