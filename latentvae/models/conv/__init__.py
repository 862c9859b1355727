"""Convolutional networks: AutoencoderKL and its kin, and VQGAN's around any bottleneck."""
