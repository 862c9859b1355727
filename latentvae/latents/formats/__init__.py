"""Formats of cached latents and tokens on disk, one file per format.

`shards` is latentvae's own format: safetensors and a manifest. `shard_parquet` writes the copy of
tokens that table readers open.
"""
