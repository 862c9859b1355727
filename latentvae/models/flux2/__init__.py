"""FLUX.2's autoencoder, which latentvae can use and measure, but not train."""
