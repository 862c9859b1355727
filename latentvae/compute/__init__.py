"""Compute the same results faster or in less memory."""
