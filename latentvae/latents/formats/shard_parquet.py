"""Write a shard of tokens as a parquet file, for `datasets.load_dataset(DIR)`.

Columns: `id` string, `label` int64 (where there are labels), `caption` string (where there are
captions), `indices` nested lists of the item's shape.
"""

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

# `datasets` reads this card. Without the card, manifest.json would count as a table too.
CARD = """---
configs:
- config_name: default
  data_files: "*.parquet"
---
Tokens of images, written by `latentvae encode`: `latentvae.TokenDataset(folder)` or
`datasets.load_dataset(folder)` reads them; manifest.json describes the tokens.
"""


def table_bytes(
    indices: Tensor,
    *,
    names: Sequence[str],
    labels: Tensor | None,
    captions: Sequence[str] | None = None,
) -> bytes:
    """Return the bytes of a parquet file of tokens (n, h, w) or (n, L, h, w)."""
    values = pa.array(indices.numpy().reshape(-1))
    for size in reversed(indices.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    columns = {"id": _texts(names)}
    if labels is not None:
        columns["label"] = pa.array(labels.numpy())
    if captions is not None:
        columns["caption"] = _texts(captions)
    buffer = io.BytesIO()
    pq.write_table(pa.table({**columns, "indices": values}), buffer, compression="zstd")
    return buffer.getvalue()


def _texts(texts: Sequence[str]) -> pa.Array:
    # A string in a table must be UTF-8, but a file name may be any bytes.
    whole = [text.encode(errors="surrogateescape").decode(errors="replace") for text in texts]
    return pa.array(whole, pa.string())
