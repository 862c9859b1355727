"""From images to shards of tokens or latents, and from shards to pictures."""

from latentvae.caching.decode import decode_folder
from latentvae.caching.encode import encode_folder

__all__ = ["decode_folder", "encode_folder"]
