"""What a data file may take, and what is said of one that cannot be used.

It may come from anybody, so its size is bounded before it is in memory: no file is read that has, or
unpacks to, more than :func:`~lunet_fast.training.outside.max_bytes`, nor one that unpacks to more than
:data:`~lunet_fast.training.outside.RATIO` times its own size.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import os
import zlib
from pathlib import Path

from lunet_fast.training.outside import LIMIT_VARIABLE, max_bytes, most_unpacked

MEMORY_SHARE = 8
"""The share of the memory that a file may have where $LUNET_FAST_MAX_BYTES does not say: an eighth."""
_BLOCK = 1 << 20


class DataError(ValueError):
    """A file cannot be used; the message names it, where in it, and the fix."""


def check_size(path: Path, size: int, what: str = "has") -> None:
    """DataError where ``size`` bytes are more than are read; ``what`` the file does with them."""
    limit = max_bytes(MEMORY_SHARE)
    if size > limit:
        raise DataError(
            f"{path}: {what} {size:,} bytes, more than the {limit:,} that are read on this machine: take "
            f"fewer rows, or set ${LIMIT_VARIABLE} to a larger number"
        )


def read_bytes(path: Path) -> bytes:
    """The content of a file that is not too large (:func:`check_size`); OSError as ``open``."""
    limit = max_bytes(MEMORY_SHARE)
    with path.open("rb") as stream:
        check_size(path, os.fstat(stream.fileno()).st_size)
        data = stream.read(limit + 1)  # a pipe has no size
    check_size(path, len(data))
    return data


def unpacked(path: Path, data: bytes, most: int | None = None) -> bytes:
    """``data`` of gzip, xz or bzip2, known by its first bytes, without the packing; other data as it is.

    DataError where it is damaged or unpacks to more than may be read, RATIO times its size, or ``most``. No
    more than that is in memory.
    """
    limit = min(max_bytes(MEMORY_SHARE), most_unpacked(len(data)))
    limit = limit if most is None else min(limit, most)
    try:
        if data[:2] == b"\x1f\x8b":
            found = _gunzip(data, limit)
        elif data[:6] == b"\xfd7zXZ\0":
            # xz may ask for a dictionary of 4 GiB.
            found = _inflated(lzma.LZMADecompressor(memlimit=128 << 20), data, limit)
        elif data[:3] == b"BZh":
            found = _inflated(bz2.BZ2Decompressor(), data, limit)
        else:
            return data
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({brief(error)}): fetch it again") from error
    if len(found) > limit:
        raise DataError(
            f"{path}: its {len(data):,} bytes unpack to more than {limit:,}: if you trust it, unpack it and "
            f"give the unpacked file; ${LIMIT_VARIABLE} sets how much is read"
        )
    return found


def _inflated(packed: lzma.LZMADecompressor | bz2.BZ2Decompressor, data: bytes, limit: int) -> bytes:
    found = packed.decompress(data, limit + 1)
    if not packed.eof and len(found) <= limit:
        raise EOFError("the file is cut short")
    return found


def _gunzip(data: bytes, limit: int) -> bytes:
    """All members of a gzip file, to one byte more than ``limit``."""
    pieces, size = [], 0
    while data and size <= limit:
        member = zlib.decompressobj(31)
        piece = member.decompress(data, limit + 1 - size)
        pieces.append(piece)
        size += len(piece)
        if not member.eof and size <= limit:
            raise EOFError("the file is cut short")
        data = member.unused_data.lstrip(b"\0")
    return b"".join(pieces)


def digest(path: Path) -> str:
    """A file's name and SHA-256, for the results."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            found.update(block)
    return f"{path.name}, SHA-256 {found.hexdigest()}"


def brief(value: object, most: int = 120) -> str:
    """``value`` for a message: control characters are written out, and what is too long is cut."""
    text = str(value) or type(value).__name__
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
