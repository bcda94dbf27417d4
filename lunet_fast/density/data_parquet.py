"""Numbers of a Parquet file, a batch at a time, so that what it unpacks to is counted as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lunet_fast.density.data_limits import DataError, brief, check_size
from lunet_fast.density.data_text import column_place

_BATCH = 1 << 16
_TEXTS = ("string", "large_string", "binary", "large_binary")


def read_parquet(path: Path, label_column: str | None) -> tuple[npt.NDArray[np.float32], list[str] | None]:
    """([N, D] of all columns but that of labels; the labels as texts, where one is named).

    :class:`DataError` for a damaged file, for columns of anything but numbers, and, with its row from 1, for
    a value that is missing or not finite. ``ImportError`` without pyarrow.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    check_size(path, path.stat().st_size)
    try:
        schema = parquet.read_schema(path)
    except Exception as error:  # pyarrow reports damage by errors of a dozen types
        raise DataError(f"{path}: the Parquet file is damaged or cut short ({brief(error)})") from error
    names = _checked(path, schema, label_column)
    try:
        # A dictionary of texts: a page can name one of a megabyte a million times.
        packed = [n for n in ([label_column] if label_column else []) if str(schema.field(n).type) in _TEXTS]
        file = parquet.ParquetFile(path, read_dictionary=packed)
        rows = file.metadata.num_rows
        check_size(path, 4 * rows * len(names), "holds numbers of")
        read = file.iter_batches(_BATCH, columns=[*names, *([label_column] if label_column else [])])
        values, texts, found = [], [], 0
        for batch in read:
            found += len(batch)
            if found > rows:
                break
            values.append(_numbers(path, batch, names, found - len(batch)))
            if label_column is not None:
                texts += ["" if v is None else str(v).strip() for v in batch.column(label_column).to_pylist()]
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: the Parquet file is damaged or cut short ({brief(error)})") from error
    if found != rows:
        raise DataError(f"{path}: the Parquet file is damaged: it states {rows:,} rows and holds others")
    if not rows:
        raise DataError(f"{path}: has no row")
    return np.concatenate(values), texts if label_column is not None else None


def _checked(path: Path, schema: Any, label_column: str | None) -> list[str]:
    """The columns of numbers, by name."""
    import pyarrow.types as kinds  # type: ignore[import-untyped,unused-ignore]

    names = [str(name) for name in schema.names]
    if len(set(names)) != len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise DataError(f"{path}: the column {brief(twice)!r} occurs twice: rename one")
    if label_column is not None:
        column_place(path, names, label_column)
    # pandas stores the index of a frame so.
    names = [name for name in names if name != label_column and not name.startswith("__index_level_")]
    for name in names:
        kind = schema.field(name).type
        if not (kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind)):
            raise DataError(
                f"{path}: column {brief(name)!r} holds {brief(kind)}, not numbers: leave it out, or name it "
                "with --label-column if it holds classes"
            )
    if label_column is not None and schema.field(label_column).type.num_fields:
        kind = schema.field(label_column).type
        if not kinds.is_dictionary(kind):
            raise DataError(f"{path}: the label column {brief(label_column)!r} holds {brief(kind)}")
    if not names:
        raise DataError(f"{path}: has no column of numbers")
    return names


def _numbers(path: Path, batch: Any, names: list[str], first: int) -> npt.NDArray[np.float32]:
    found = np.empty((len(batch), len(names)), np.float32)
    for place, name in enumerate(names):
        column = batch.column(name)
        values = column.to_numpy(zero_copy_only=False)
        if column.null_count:  # of integers and truth values, objects or floats
            values = values.astype(np.float64)
        bad = np.flatnonzero(~(np.abs(values.astype(np.float64)) <= np.finfo(np.float32).max))
        if len(bad):
            told = "missing" if column[int(bad[0])].as_py() is None else values[bad[0]]
            raise DataError(
                f"{path}, row {first + int(bad[0]) + 1}: column {brief(name)!r} is {told}: "
                "leave such rows out"
            )
        found[:, place] = values
    return found
