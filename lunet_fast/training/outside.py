"""What comes from outside: how much of a file is read, whether it is text, and what other programs say."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

LIMIT_VARIABLE = "LUNET_FAST_MAX_BYTES"

RATIO = 200
"""The most that a packed file may unpack to, as a multiple of its size. Tables have 3 to 20, bombs 1000."""

RATIO_FREE_BYTES = 64 << 20
"""What any packed file may unpack to: small ones of many equal rows have higher ratios."""

_UNKNOWN_MEMORY = 8 << 30


def max_bytes(share: int) -> int:
    """The most bytes that a file may have, and unpack to.

    ``$LUNET_FAST_MAX_BYTES``, or the memory of this machine or container divided by ``share``. ValueError
    where the variable is no whole number.
    """
    given = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not given:
        return _memory() // share
    if not (re.fullmatch("[0-9]{1,18}", given) and int(given) > 0):
        raise ValueError(f"${LIMIT_VARIABLE} must be a whole number of bytes, at least 1, got {given!r}")
    return int(given)


def _memory() -> int:
    """Bytes of memory that this process may come to use: the machine's, or less in a container."""
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
            found.append(int(Path(place).read_text(encoding="ascii")))
    return min((size for size in found if size > 0), default=_UNKNOWN_MEMORY)


def most_unpacked(size: int) -> int:
    """The most bytes that a file of ``size`` bytes may unpack to, :func:`max_bytes` aside."""
    return max(RATIO_FREE_BYTES, RATIO * size)


def utf8(source: str, data: bytes, error: type[ValueError]) -> bytes:
    """``data`` without a byte order mark, once it is known to be UTF-8 without zero bytes; else ``error``,
    which names ``source`` and the line."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise error(f"{source}, line 1: the text is UTF-16 (byte order mark at byte 0): save it as UTF-8")
    try:
        if not data.isascii():
            data.decode("utf-8")
    except UnicodeDecodeError as found:
        line = data.count(b"\n", 0, found.start) + 1
        raise error(
            f"{source}, line {line}: the text is not UTF-8 (byte 0x{data[found.start]:02x} at offset "
            f"{found.start}): save it as UTF-8"
        ) from found
    zero = data.find(b"\0")
    if zero >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise error(f"{source}, line {line}: a zero byte at offset {zero}: this is not a text file")
    return data.removeprefix(b"\xef\xbb\xbf")


class ProgramError(Exception):
    """Another program did not do what it was asked; the message says why."""


def run_program(
    command: Sequence[str],
    name: str,
    folder: Path,
    environment: Mapping[str, str],
    seconds: float,
    telling: tuple[str, ...],
) -> None:
    """Run ``command`` in ``folder``, where ``-m`` looks for modules first, without input, for ``seconds``.

    :class:`ProgramError` where it cannot be run, does not end in time or fails: with ``name`` and the lines
    of what it said that begin with one of ``telling``, else with its last line.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProgramError(f"{name} did not end within {seconds} s") from error
    except OSError as error:
        raise ProgramError(f"{name} cannot be run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no message"]
        reasons = [line for line in said if line.startswith(telling)] or said[-1:]
        raise ProgramError(f"{name} failed: {' '.join(reasons)}")
