"""Convolutional networks: AutoencoderKL and similar classes, and VQGAN with any quantiser."""
