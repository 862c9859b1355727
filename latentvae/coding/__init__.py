"""Encode images, latents and tokens as files: codecs, entropy models and bitstreams."""
