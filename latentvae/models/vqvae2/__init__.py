"""VQ-VAE-2: a tokenizer with a map of codes for each of several resolutions (levels)."""
