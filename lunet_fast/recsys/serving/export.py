"""Users' and items' vectors of a trained model as Parquet files, for an index of nearest neighbours.

A model predicts from x = [x_u; x_i], for each of K members: x_u is a user's embedding plus the normalised
sum of its history, x_i an item's likewise, k numbers each. For a pair that is no training rating neither half
depends on the other, so each user and each item has one vector: its halves for member 1, 2, ..., K, one after
the other, K k numbers. (In a training pair, the pair's own entry is left out of both histories.)

What the vectors are for: items near each other are alike to every member's network. What they are not: what
is predicted is read from f(x), so it is neither the product of two vectors nor their distance, and the biases
of user and item are not in them. A vector without training ratings is the random one that training started
from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lunet_fast.recsys.data.ids import IdMap
from lunet_fast.recsys.data.parquet_table import require_pyarrow
from lunet_fast.recsys.model.embeddings import Histories
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from lunet_fast.recsys.serving.vectors import item_vectors, user_vectors
from lunet_fast.training.files import write_atomically

__all__ = ["Written", "export_vectors", "item_vectors", "user_vectors"]

ROWS = 1 << 16
"""Vectors that are computed and written at a time: a row group of the file."""


class Written(NamedTuple):
    """A file, its rows, and the numbers in a vector."""

    path: Path
    rows: int
    size: int


def export_vectors(recommender: LUNetRecommender, directory: Path | str) -> list[Written]:
    """Write ``users.parquet`` and ``items.parquet`` into ``directory``, which is made if needed.

    Columns: ``id`` (int64 or string, as in the training data), ``vector`` (fixed-size list of K k float32,
    see the module), ``training_ratings`` (int64) and, in ``items.parquet`` where the model has titles,
    ``title`` (null where unknown). The files' metadata has ``lunet_fast``, JSON with ``members`` K and
    ``embedding_size`` k. Rows are in the order of :attr:`LUNetRecommender.users` and ``items``. A file that
    is there already is replaced as a whole. Vectors are computed on ``recommender.device``.

    Costs O(K nnz k) once for nnz training ratings, then O(K k) a vector; ROWS of them are in memory at once.

    ``ImportError`` without pyarrow, ``OSError`` where the folder cannot be written.
    """
    require_pyarrow("writing Parquet")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    trained = recommender.trained
    model, info = trained.model.to(recommender.device), trained.item_info
    with torch.no_grad():
        histories = model.histories()
    titles = None if info is None or "title" not in info else info["title"].tolist()
    counts = model.interactions
    return [
        _write(
            folder / "users.parquet", model, histories, trained.users, counts.user_counts, None, item=False
        ),
        _write(
            folder / "items.parquet", model, histories, trained.items, counts.item_counts, titles, item=True
        ),
    ]


def _write(
    path: Path,
    model: RatingModel,
    histories: Histories,
    ids: IdMap,
    counts: Tensor,
    titles: list[Any] | None,
    *,
    item: bool,
) -> Written:
    import pyarrow as pa
    from pyarrow import parquet

    config = model.config
    size = config.members * config.embedding_size
    fields = [
        pa.field("id", pa.int64() if ids.is_integer else pa.string(), nullable=False),
        pa.field("vector", pa.list_(pa.field("element", pa.float32(), nullable=False), size), nullable=False),
        pa.field("training_ratings", pa.int64(), nullable=False),
    ]
    if titles is not None:
        fields.append(pa.field("title", pa.string()))
    about = {"members": config.members, "embedding_size": config.embedding_size}
    schema = pa.schema(fields, metadata={"lunet_fast": json.dumps(about)})

    def write(temporary: Path) -> None:
        with parquet.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(ids), ROWS):
                rows = slice(start, min(start + ROWS, len(ids)))
                index = torch.arange(rows.start, rows.stop, device=counts.device)
                vectors = (item_vectors if item else user_vectors)(model, index, histories).cpu()
                columns = [
                    pa.array(ids.ids[rows].tolist(), fields[0].type),
                    pa.FixedSizeListArray.from_arrays(
                        pa.array(vectors.flatten().numpy()), type=fields[1].type
                    ),
                    pa.array(counts[rows].cpu().numpy()),
                ]
                if titles is not None:
                    columns.append(pa.array([title or None for title in titles[rows]], pa.string()))
                writer.write_table(pa.table(columns, schema=schema))

    write_atomically(path, write)
    return Written(path, len(ids), size)
