"""Zip files from anybody: unpacked in memory within bounds, and nothing extracted.

A zip that has a name outside its own folder (``/x``, ``../x``), a link, more than MAX_MEMBERS names, or a
member of another size than it states, is refused.
"""

from __future__ import annotations

import io
import stat
import zipfile
from pathlib import Path, PurePosixPath

from lunet_fast.recsys.data.errors import RatingFileError, Unavailable, brief, cause
from lunet_fast.recsys.data.limits import MEMORY_SHARE
from lunet_fast.training.outside import max_bytes, most_unpacked

MAX_MEMBERS = 10_000  # a wheel has some hundreds; zipfile makes an object of each
TABLES = (".csv", ".tsv", ".txt", ".inter", ".dat", ".data", ".parquet", ".json", ".jsonl", ".ndjson")
"""Extensions of what may be a table."""
BESIDE = ("readme", "license", "licence", "changelog", "notice", "citation")
"""Names of what lies beside one."""


def opened(data: bytes) -> zipfile.ZipFile:
    """The zip in ``data``; Unavailable."""
    # As many as the directory can have at most, before zipfile makes an object of each.
    if data.count(b"PK\x01\x02") > MAX_MEMBERS:
        raise Unavailable(f"the zip has more than {MAX_MEMBERS:,} members: refused")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # a damaged directory ends in errors of several types
        raise Unavailable(f"not a zip file, or cut short ({cause(error)})") from error
    for member in archive.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or (path.parts[:1] and ":" in path.parts[0]):
            raise Unavailable(f"{brief(member.filename)} in the zip leads out of its folder: refused")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise Unavailable(f"{brief(member.filename)} in the zip is a link: refused")
    return archive


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """What a member holds; Unavailable, also for one of more than ``limit`` bytes."""
    name = brief(member.filename)
    # zipfile reads these two in bounded steps; of others, a few bytes can fill the memory.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Unavailable(f"{name} in the zip is packed by another method than deflate: refused")
    try:
        with archive.open(member) as stream:
            data = stream.read(limit + 1)  # the size that the directory states may be a lie
    except Exception as error:  # of zipfile, zlib and struct
        raise Unavailable(f"{name} in the zip is damaged ({cause(error)})") from error
    if len(data) > limit:
        raise Unavailable(f"{name} in the zip unpacks to more than {limit} bytes: refused")
    if len(data) != member.file_size:
        stated = f"states {member.file_size:,} bytes and has {len(data):,}"
        raise Unavailable(f"{name} in the zip {stated}: refused")
    return data


def table_in(file: Path, data: bytes) -> tuple[str, bytes]:
    """(name, content) of the one table in a zip; of several, the one called ``ratings``. RatingFileError."""
    try:
        with opened(data) as archive:
            paths = {PurePosixPath(m.filename): m for m in archive.infolist() if not m.is_dir()}
            tables = [
                path
                for path in paths
                if path.suffix.lower() in TABLES and "__MACOSX" not in path.parts and path.name[0] != "."
            ]
            tables = [path for path in tables if path.stem.lower() not in BESIDE] or tables
            named = [path for path in tables if path.stem.lower() == "ratings"]
            chosen = tables if len(tables) == 1 else named
            if len(chosen) != 1:
                shown = ", ".join(brief(path, 40) for path in (tables or list(paths))[:10])
                raise RatingFileError(
                    f"{file}: the zip must hold one table ({', '.join(TABLES)}), and it has {len(tables)} "
                    f"({shown}): unpack it and give the right one"
                )
            limit = min(max_bytes(MEMORY_SHARE), most_unpacked(len(data)))
            return chosen[0].name, read_member(archive, paths[chosen[0]], limit)
    except Unavailable as error:
        raise RatingFileError(f"{file}: {error}") from error
