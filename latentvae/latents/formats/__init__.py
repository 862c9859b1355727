"""Formats in which latents and tokens are stored on disk, one module per format.

`shards` is latentvae's own format: safetensors and a manifest. `shard_parquet` writes a copy of the
tokens as parquet files, for programs that read tables.
"""
