"""Autoencoders whose encoder and decoder are vision transformers."""
