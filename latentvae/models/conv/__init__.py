"""Convolutional autoencoders: AutoencoderKL, similar classes, and VQGAN with any quantiser."""
