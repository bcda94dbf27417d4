"""How much a rating file may take: it may come from anybody, so its size is bounded before it is in memory.

A file is refused that is larger, or unpacks to more, than :func:`max_bytes`, a sixteenth of the memory, or
that unpacks to more than RATIO times its own size.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import stat
import zlib
from pathlib import Path
from typing import IO

from lunet_fast.recsys.data.errors import RatingFileError, cause
from lunet_fast.recsys.data.ids import PLAIN_INTEGER

LIMIT_VARIABLE = "LUNET_FAST_MAX_BYTES"
RATIO = 200
"""The most that a packed file may unpack to, as a multiple of its size. Ratings have 3 to 20, bombs 1000."""
RATIO_FREE_BYTES = 64 << 20
"""What any packed file may unpack to: small ones of many equal rows have higher ratios."""
_UNKNOWN_MEMORY = 8 << 30
_BLOCK = 1 << 20


def max_bytes() -> int:
    """The most bytes that a rating file may have, and unpack to.

    ``$LUNET_FAST_MAX_BYTES``, or a sixteenth of the memory of this machine or container, as reading takes 12
    to 20 bytes for each. ValueError where the variable is no whole number.
    """
    given = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not given:
        return _memory() // 16
    if not (PLAIN_INTEGER.fullmatch(given) and int(given) > 0):
        raise ValueError(f"${LIMIT_VARIABLE} must be a whole number of bytes, at least 1, got {given!r}")
    return int(given)


def most_unpacked(size: int) -> int:
    """The most bytes that a file of ``size`` bytes may unpack to, :func:`max_bytes` aside."""
    return max(RATIO_FREE_BYTES, RATIO * size)


def read_bytes(file: Path) -> bytes:
    """What ``file`` holds, unpacked where its name ends in ``.gz``.

    RatingFileError, before more than the limit is in memory, where it is larger than :func:`max_bytes`,
    unpacks to more than that or to more than RATIO times its size, or is damaged; OSError as ``open``.
    """
    limit = max_bytes()
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


def _memory() -> int:
    """Bytes of memory that this process may come to use: the machine's, or less in a container."""
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
            found.append(int(Path(place).read_text(encoding="ascii")))
    return min((size for size in found if size > 0), default=_UNKNOWN_MEMORY)


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
