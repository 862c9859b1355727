"""Convolutional networks: AutoencoderKL and similar, and VQGAN's with any bottleneck."""
