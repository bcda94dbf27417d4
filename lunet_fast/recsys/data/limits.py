"""How much a rating file may take: it may come from anybody, so its size is bounded before it is in memory.

A file is refused that is larger, or unpacks to more, than :func:`~lunet_fast.training.outside.max_bytes`, a
sixteenth of the memory, or that unpacks to more than :data:`~lunet_fast.training.outside.RATIO` times its own
size.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from pathlib import Path
from typing import IO

from lunet_fast.recsys.data.errors import RatingFileError, cause
from lunet_fast.training.outside import LIMIT_VARIABLE, max_bytes, most_unpacked

MEMORY_SHARE = 16
"""The share of the memory that a file may have where $LUNET_FAST_MAX_BYTES does not say: a sixteenth, as
reading ratings takes 12 to 20 bytes for each."""
_BLOCK = 1 << 20


def read_bytes(file: Path) -> bytes:
    """What ``file`` holds, unpacked where its name ends in ``.gz``.

    RatingFileError, before more than the limit is in memory, where it is larger than ``max_bytes``,
    unpacks to more than that or to more than RATIO times its size, or is damaged; OSError as ``open``.
    """
    limit = max_bytes(MEMORY_SHARE)
    with file.open("rb") as stream:
        about = os.fstat(stream.fileno())
        if stat.S_ISREG(about.st_mode) and about.st_size > limit:
            raise RatingFileError(f"{file}: has {about.st_size:,} bytes, {too_many(limit)}")
        if file.suffix.lower() != ".gz":
            data = _within(stream, limit)
            if data is None:
                raise RatingFileError(f"{file}: has more bytes, {too_many(limit)}")
            return data
        by_ratio = most_unpacked(about.st_size)
        try:
            with gzip.GzipFile(fileobj=stream, mode="rb") as unpacked:
                data = _within(unpacked, min(limit, by_ratio))
        except (OSError, EOFError, zlib.error) as error:
            raise RatingFileError(
                f"{file}: the gzip file is damaged or cut short ({cause(error)})"
            ) from error
    if data is not None:
        return data
    if by_ratio < limit:
        raise RatingFileError(
            f"{file}: its {about.st_size:,} bytes unpack to more than {by_ratio:,}, as no ratings do: if you "
            "trust it, unpack it (gunzip) and give the unpacked file"
        )
    raise RatingFileError(f"{file}: unpacks to more bytes, {too_many(limit)}")


def too_many(limit: int) -> str:
    return (
        f"more than the {limit:,} that are read on this machine: give it in parts or on a machine with more "
        f"memory, or set ${LIMIT_VARIABLE} to a larger number"
    )


def _within(stream: IO[bytes] | gzip.GzipFile, limit: int) -> bytes | None:
    """The rest of ``stream``, or None where it is more than ``limit`` bytes, of which no more is read."""
    kept = io.BytesIO()
    while block := stream.read(_BLOCK):
        if kept.tell() + len(block) > limit:
            return None
        kept.write(block)
    return kept.getvalue()
