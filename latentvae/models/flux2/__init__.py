"""FLUX.2's autoencoder."""
