"""True bits: image codecs, and bitstreams of latents and tokens with their entropy models."""
