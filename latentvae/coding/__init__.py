"""Code images, latents and tokens to real files: codecs, entropy models and bitstreams."""
