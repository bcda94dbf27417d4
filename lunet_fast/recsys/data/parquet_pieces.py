"""Parquet files read a piece at a time: which files, what their columns hold, what is wrong with a row."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lunet_fast.recsys.data.errors import RatingFileError, brief, cause
from lunet_fast.recsys.data.ids import Int64Array
from lunet_fast.recsys.data.parquet_table import TEXTS, check_sizes
from lunet_fast.recsys.data.table import MAX_FIELD, used_columns

PIECE_ROWS = 1 << 17
"""Rows decoded at a time."""

READ_BYTES = 1 << 20
"""Bytes of a column read at a time; without it pyarrow reads a row group's columns whole."""

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PieceFile:
    """A file whose columns are those of ratings."""

    path: Path
    rows: list[int]
    """Of each row group."""
    size: int
    changed: int
    """``st_mtime_ns``"""
    texts: dict[str, str]
    """By role, the columns of texts: a page can name one of a megabyte a million times."""
    names: dict[str, str]
    """By role, all columns that are read."""

    @classmethod
    def of(cls, path: Path, columns: dict[str, str | None]) -> PieceFile:
        """The file, with its types and sizes checked."""
        from pyarrow import parquet

        state = path.stat()
        if state.st_size == 0:
            raise RatingFileError(f"{path}: the file is empty")
        try:
            with parquet.ParquetFile(path) as content:
                schema, metadata = content.schema_arrow, content.metadata
                rows = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        except Exception as error:  # pyarrow reports damage by errors of a dozen types
            damaged(path, error)
        used = used_columns(str(path), list(schema.names), columns)
        texts = {}
        for role, place in used.items():
            if _is_text(path, role, schema.field(place)):
                texts[role] = schema.field(place).name
        places = [place for role, place in used.items() if role != "timestamp"]
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if check_sizes(path, data, places, streamed=True) != sum(rows):
                raise RatingFileError(f"{path}: the Parquet file is damaged: its numbers of rows differ")
        names = {role: schema.field(place).name for role, place in used.items()}
        return cls(path, rows, state.st_size, state.st_mtime_ns, texts, names)

    def check(self) -> None:
        """RatingFileError where the file is not the one that was opened."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise RatingFileError(f"{self.path}: cannot be read any more ({error})") from error
        if (now.st_size, now.st_mtime_ns) != (self.size, self.changed):
            raise RatingFileError(f"{self.path}: has changed since it was opened: open the stream again")


def find_files(path: Path, columns: dict[str, str | None]) -> list[PieceFile]:
    """The file, or those of a folder in the order of their names, which together have a row."""
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() == ".parquet" and p.is_file())
        if not found:
            raise RatingFileError(f"{path}: there is no .parquet file in this folder")
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    elif path.suffix.lower() != ".parquet":
        raise RatingFileError(
            f"{path}: ratings are streamed from Parquet alone, and the extension is {path.suffix!r}: convert "
            "the file, or read it whole with read_ratings"
        )
    else:
        found = [path]
    files = [PieceFile.of(file, columns) for file in found]
    if not any(sum(file.rows) for file in files):
        raise RatingFileError(f"{path}: there is no row")
    return files


def names_in(files: list[PieceFile], columns: dict[str, str | None]) -> dict[str, str | None]:
    """``columns`` as the files have them, usual names too; RatingFileError where two files differ."""
    found: dict[str, str] = {}
    for file in files:
        for role, name in file.names.items():
            if found.setdefault(role, name) != name:
                raise RatingFileError(
                    f"{file.path}: the {role} column is {name!r}, and {found[role]!r} in {files[0].path}: "
                    "name it the same in all files"
                )
    return columns | found


def _is_text(path: Path, role: str, field: Any) -> bool:
    """Whether a column holds texts; RatingFileError for a type that its role cannot have."""
    from pyarrow import types

    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    is_text = str(kind) in TEXTS
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    wanted = None
    if role in ("user", "item") and not (is_text or types.is_integer(kind)):
        wanted = "store ids as integers or strings"
    elif role == "rating" and not is_number:
        wanted = "store numbers"
    if wanted is not None:
        raise RatingFileError(
            f"{path}: the {role} column {field.name!r} has values of type {brief(kind)}: {wanted}"
        )
    return is_text


def record_batches(file: PieceFile, groups: Sequence[int], columns: dict[str, str | None]) -> Iterator[Any]:
    """The columns that are used, PIECE_ROWS rows at a time, of some row groups in that order."""
    from pyarrow import parquet

    wanted = [name for role, name in columns.items() if name is not None and role != "timestamp"]
    file.check()
    try:
        # Nothing is read before it is needed, and no threads: memory must not grow with a row group.
        with parquet.ParquetFile(
            file.path, buffer_size=READ_BYTES, pre_buffer=False, read_dictionary=list(file.texts.values())
        ) as content:
            for batch in content.iter_batches(
                PIECE_ROWS, row_groups=list(groups), columns=wanted, use_threads=False
            ):
                if len(batch):
                    yield batch
    except Exception as error:
        damaged(file.path, error)


def column_of(batch: Any, name: str | None) -> Any:
    """The column of a record batch."""
    return batch.column(batch.schema.get_field_index(name))


def integers(column: Any) -> Int64Array:
    """The values ``[n]`` of a column of integers."""
    import pyarrow as pa

    return _decoded(column).cast(pa.int64()).to_numpy(zero_copy_only=False)


def texts_of(file: PieceFile | None, role: str, column: Any) -> tuple[Int64Array, list[str]]:
    """Codes ``[n]`` of a column of texts, and by code the text; each is there once before it is stripped.

    RatingFileError, where ``file`` is given, for one of more than MAX_FIELD characters.
    """
    import pyarrow as pa
    from pyarrow import types

    encoded = column if types.is_dictionary(column.type) else column.dictionary_encode()
    # A dictionary is a row group's, and a text that no row of this piece names may be in no row at all.
    used, codes = np.unique(encoded.indices.to_numpy(zero_copy_only=False), return_inverse=True)
    texts = [text or "" for text in encoded.dictionary.take(pa.array(used)).cast(pa.string()).to_pylist()]
    longest = max(texts, key=len)
    if file is not None and len(longest) > MAX_FIELD:
        raise RatingFileError(
            f"{file.path}: {role} {brief(longest)} has more than {MAX_FIELD:,} characters: give it a shorter "
            "one"
        )
    return codes.reshape(-1), [text.strip() for text in texts]


def _decoded(column: Any) -> Any:
    from pyarrow import types

    return column.dictionary_decode() if types.is_dictionary(column.type) else column


def ratings_of(batch: Any, name: str | None) -> Float32Array:
    """Ratings ``[n]``, infinite where float32 cannot hold one."""
    import pyarrow as pa
    from pyarrow import types

    if name is None:
        return np.ones(len(batch), dtype=np.float32)
    column = _decoded(column_of(batch, name))
    if not types.is_float32(column.type):
        column = column.cast(pa.float64(), safe=False)
    with np.errstate(over="ignore"):
        return column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)


def first_null(column: Any) -> int:
    """The first row without a value, from 0."""
    return int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))


def wrong_row(file: PieceFile, row: int, problem: str) -> NoReturn:
    """Raises RatingFileError for the row ``row`` (from 0)."""
    group = int(np.searchsorted(np.cumsum(file.rows), row, side="right"))
    raise RatingFileError(f"{file.path}, row {row + 1} (row group {group}): {problem}")


def damaged(path: Path, error: Exception) -> NoReturn:
    """Raises RatingFileError for what pyarrow could not read."""
    raise RatingFileError(f"{path}: the Parquet file is damaged or cut short ({cause(error)})") from error


def release_memory() -> None:
    """Gives what pyarrow keeps for later back to the system."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
