"""A Parquet file as a table, read whole by pyarrow once its sizes are known to be bounded."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from mmap import mmap
from pathlib import Path

from lunet_fast.recsys.data.errors import RatingFileError, brief, cause
from lunet_fast.recsys.data.limits import MEMORY_SHARE, too_many
from lunet_fast.recsys.data.parquet_sizes import stated_sizes
from lunet_fast.recsys.data.table import Table, frame_table, used_columns
from lunet_fast.training.outside import max_bytes, most_unpacked

TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
"""Types of columns that hold texts."""


def require_pyarrow(purpose: str) -> None:
    """ImportError saying what to install for ``purpose`` where pyarrow is missing."""
    try:
        import pyarrow  # type: ignore[import-untyped,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{purpose} needs pyarrow: pip install pyarrow") from error


def read_parquet(file: Path, data: bytes, columns: Mapping[str, str | None]) -> Table:
    """The columns of a Parquet file whose content is ``data``. RatingFileError, ImportError."""
    if not data:
        raise RatingFileError(f"{file}: the file is empty")
    require_pyarrow(f"{file}: reading Parquet")
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(io.BytesIO(data))
        names = [str(name) for name in schema.names]
    except Exception as error:  # pyarrow reports damage by errors of a dozen types
        raise RatingFileError(f"{file}: the Parquet file is damaged or cut short ({cause(error)})") from error
    used = used_columns(str(file), names, columns)
    for role, k in used.items():
        if schema.field(k).type.num_fields:
            raise RatingFileError(
                f"{file}: the {role} column {names[k]!r} is of type {brief(schema.field(k).type)}: store a "
                "number, a string or a time"
            )
    places = list(dict.fromkeys(used.values()))  # one may be that of two roles
    rows = check_sizes(file, data, places)
    wanted = [names[k] for k in places]
    # Texts as a dictionary: a page can name one of a megabyte a million times.
    texts = [names[k] for k in used.values() if str(schema.field(k).type) in TEXTS]
    try:
        content = parquet.ParquetFile(io.BytesIO(data), read_dictionary=texts)
        frame = content.read(columns=wanted).to_pandas(ignore_metadata=True)
    except Exception as error:
        raise RatingFileError(
            f"{file}: the Parquet file is damaged or cut short, or has a value that cannot be read "
            f"({cause(error)})"
        ) from error
    if len(frame) != rows:
        raise RatingFileError(
            f"{file}: the Parquet file is damaged: it states {rows:,} rows and holds {len(frame):,}"
        )
    return frame_table(str(file), frame, columns)


def check_sizes(file: Path, data: bytes | mmap, columns: Sequence[int], *, streamed: bool = False) -> int:
    """The rows that a Parquet file states; RatingFileError where they, or the bytes of ``columns``, are more
    than is read. Of a ``streamed`` file only the largest page has to fit, but no more than RATIO times its
    size may come of it either."""
    try:
        rows, values, unpacked, page = stated_sizes(data, columns)
    except ValueError as error:
        raise RatingFileError(f"{file}: the Parquet file is damaged or cut short ({error})") from error
    stated = max(8 * values, unpacked)
    limit, by_ratio = max_bytes(MEMORY_SHARE), most_unpacked(len(data))
    if streamed and page > limit:
        raise RatingFileError(f"{file}: one of its pages is {page:,} bytes, {too_many(limit)}")
    if stated > limit and not streamed:
        raise RatingFileError(f"{file}: its {rows:,} rows are {stated:,} bytes, {too_many(limit)}")
    if stated > by_ratio:
        raise RatingFileError(
            f"{file}: its {len(data):,} bytes state {rows:,} rows of {stated:,} bytes, as no ratings do: if "
            "you trust it, write it anew without compression and dictionary"
        )
    return rows
