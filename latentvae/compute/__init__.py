"""Faster or smaller ways to compute the same results. Nothing below imports this package."""
