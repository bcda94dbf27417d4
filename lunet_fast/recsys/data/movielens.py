"""MovieLens 100K and 1M: where their files come from, and how they become :class:`~.ratings.Ratings`.

The data is GroupLens Research's (F. M. Harper and J. A. Konstan, "The MovieLens Datasets", ACM TiiS 5(4):19,
2015), under GroupLens' own licence, which the README inside each zip holds. It is never part of this package.

Sources, in the order in which :func:`locate` tries them:

1. ``data_dir`` (``--data-dir``). A folder given there must hold the data set: nothing else is tried. 2. The
folder ``$LUNET_FAST_DATA``; where it lacks the data set, the search goes on. 3. The cache:
``$LUNET_FAST_CACHE``, or the platform's cache folder. 4. GroupLens' zip over HTTPS, checked against the MD5
that GroupLens publishes; needs pooch. 5. For ML-100K, the copy inside the wheel ``recbole==1.2.1``, by ``pip
download``, checked against a pinned SHA-256.

In the folders 1 and 2 the data set may be ``ml-100k/ml-100k.zip``, ``ml-100k.zip``, or unpacked as
``ml-100k/u.data``, ``ml-100k/ml-100k/u.data`` or ``u.data`` (``ml-1m`` and ``ratings.dat`` likewise).
Whatever the source, the files inside are checked: by their SHA-256, or, for the ratings of ML-1M, by their
counts. Zips are read member by member in memory and nothing is extracted; one that has a name outside its
own folder (``/x``, ``../x``), a link, more than MAX_MEMBERS names, or a member of another size than it
states, is refused.

The ratings in the wheel are those of ``u.data``, row for row. Its titles lack the year and its genres are
separated by blanks; both are put back as in ``u.item``. Titles lose white space at their ends (three have
some in ``u.item``).
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import secrets
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pandas as pd

from lunet_fast.recsys.data.ratings import (
    IdMap,
    RatingFileError,
    Ratings,
    brief,
    cause,
    parse_text,
    read_bytes,
)

__all__ = ["DATASETS", "DataNotFoundError", "Located", "load", "locate", "read_like"]

logger = logging.getLogger(__name__)

DATA_VARIABLE = "LUNET_FAST_DATA"
CACHE_VARIABLE = "LUNET_FAST_CACHE"
MAX_MEMBER_BYTES = 64 << 20  # the largest file that is read has 24.6 MB
MAX_ARCHIVE_BYTES = 32 << 20  # the largest that is read has 5.9 MB
MAX_MEMBERS = 10_000  # the wheel has some hundreds; zipfile makes an object of each
CONNECT_SECONDS = 10
READ_SECONDS = 30
PIP_SECONDS = 180
SCALE = (1.0, 5.0)


class DataNotFoundError(FileNotFoundError):
    """No source has the data set; the message lists each one, why it failed, and which file to put where."""


@dataclass(frozen=True)
class Counts:
    """What a ratings file that is not byte for byte the known one must still amount to."""

    users: int
    items: int
    histogram: Mapping[float, int]


@dataclass(frozen=True)
class Wheel:
    """A wheel on the Python package index that holds a copy of a data set."""

    requirement: str
    file: str
    sha256: str
    folder: str
    members: Mapping[str, str]  # name -> SHA-256


@dataclass(frozen=True)
class DataSet:
    """What is published about a data set: its files, their checksums, and where they are."""

    name: str
    sep: str
    ratings: str
    movies: str
    people: str
    sha256: Mapping[str, str]
    counts: Counts | None
    url: str
    md5: str
    wheel: Wheel | None = None

    @property
    def zip(self) -> str:
        return f"{self.name}.zip"

    @property
    def files(self) -> tuple[str, str, str]:
        return self.ratings, self.movies, self.people


DATASETS: dict[str, DataSet] = {
    "ml-100k": DataSet(
        name="ml-100k",
        sep="\t",
        ratings="u.data",
        movies="u.item",
        people="u.user",
        sha256={
            "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
            "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
            "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
        },
        counts=None,
        url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        md5="0e33842e24a9c977be4e0107933c0723",
        wheel=Wheel(
            requirement="recbole==1.2.1",
            file="recbole-1.2.1-py3-none-any.whl",
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            folder="recbole/dataset_example/ml-100k",
            members={
                "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
            },
        ),
    ),
    "ml-1m": DataSet(
        name="ml-1m",
        sep="::",
        ratings="ratings.dat",
        movies="movies.dat",
        people="users.dat",
        sha256={
            # A re-packed copy in circulation, with some timestamps set to 0; the original passes by its
            # counts.
            "ratings.dat": "7362743e57c16f514c1835f1fa3ebcc41d099374e0cfed5f46eac6aa44724a7e",
            "movies.dat": "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9",
            "users.dat": "1dc3a95300cb19f7c10e027daf29b8cdf1d908dab65b5edfb45950aa389a10a3",
        },
        counts=Counts(6040, 3706, {1.0: 56174, 2.0: 107557, 3.0: 261197, 4.0: 348971, 5.0: 226310}),
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        md5="c4d9eecfca2ab87c1945afe126590906",
    ),
}


@dataclass(frozen=True)
class Located:
    """The files of a data set, read and checked: name -> content, and the place they came from."""

    dataset: str
    source: str
    files: Mapping[str, bytes]


def load(dataset: str, data_dir: str | os.PathLike[str] | None = None) -> Ratings:
    """MovieLens ``"ml-100k"`` or ``"ml-1m"`` with titles, genres and user columns; rows as in the file.

    Sources and their order: see the module. ``source`` of the result and the log (level INFO) say which it
    was. ``user_info`` has age, gender, occupation and zip; age and occupation of ML-1M are GroupLens' codes.
    A timestamp of 0 is unknown. ``item_info`` or ``user_info`` is None where an unpacked folder lacks that
    file.

    Raises DataNotFoundError where no source has the data set, ValueError for an unknown name.
    """
    spec = _spec(dataset)
    located = locate(dataset, data_dir)
    if f"{spec.name}.inter" in located.files:
        ratings = _wheel_ratings(spec, located)
        movies: pd.DataFrame | None = _wheel_movies(located.files[f"{spec.name}.item"])
        people: pd.DataFrame | None = _wheel_people(located.files[f"{spec.name}.user"])
    else:
        ratings = _parse(spec, located.files[spec.ratings], located.source)
        movies = _movies(spec, located.files.get(spec.movies))
        people = _people(spec, located.files.get(spec.people))
    return replace(
        ratings,
        item_info=None if movies is None else movies.reindex(ratings.items.ids).reset_index(drop=True),
        user_info=None if people is None else people.reindex(ratings.users.ids).reset_index(drop=True),
        source=located.source,
    )


def read_like(
    dataset: str,
    path: str | os.PathLike[str],
    *,
    users: IdMap | None = None,
    items: IdMap | None = None,
) -> Ratings:
    """The ratings in a file laid out as ``u.data`` (``"ml-100k"``) or ``ratings.dat`` (``"ml-1m"``).

    For the folds that GroupLens ships (``u1.base``, ``u1.test``) and files of one's own. ``users`` and
    ``items`` index by given maps, such as those of ``load(dataset)``. Raises RatingFileError as
    :func:`~.ratings.read_ratings` does, also for a rating outside 1 to 5, FileNotFoundError, and ValueError
    for an unknown data set.
    """
    file = Path(path)
    spec = _spec(dataset)
    ratings = parse_text(
        str(file), read_bytes(file), spec.sep, name=file.name, scale=SCALE, users=users, items=items
    )
    return replace(ratings, source=str(file))


def locate(dataset: str, data_dir: str | os.PathLike[str] | None = None) -> Located:
    """Finds, reads and checks the files of a data set; the sources and errors of :func:`load`."""
    spec = _spec(dataset)
    failures: list[str] = []
    if data_dir is not None:
        located = _from_folder(spec, Path(data_dir), failures)
        if located is None:
            raise DataNotFoundError(
                f"{dataset} is not in the given data folder:\n{_listed(failures)}\n"
                f"Put {spec.zip} (from {spec.url}) there, or give no folder to have it fetched."
            )
        return _logged(located)

    folder = os.environ.get(DATA_VARIABLE, "")
    if not folder:
        failures.append(f"data folder: neither --data-dir nor ${DATA_VARIABLE} is given")
    else:
        in_folder: list[str] = []
        located = _from_folder(spec, Path(folder), in_folder)
        if located is not None:
            return _logged(located)
        failures += [f"${DATA_VARIABLE}: {reason}" for reason in in_folder]

    archives = _archives(spec)
    for archive in archives:
        try:
            return _logged(_from_cache(spec, archive))
        except _Unavailable as reason:
            failures.append(f"cache: {reason}")
    for archive in archives:
        try:
            return _logged(_from_network(spec, archive))
        except _Unavailable as reason:
            failures.append(f"{archive.origin}: {reason}")
    raise DataNotFoundError(
        f"{dataset} was found in none of its sources:\n{_listed(failures)}\n"
        f"Download {spec.url} and put it, as it is, at {cache_folder() / spec.zip}, or as {spec.zip} into a "
        f"folder that --data-dir or ${DATA_VARIABLE} names."
    )


def cache_folder() -> Path:
    """``$LUNET_FAST_CACHE``, or the platform's cache folder (``~/.cache/lunet-fast`` on Linux)."""
    given = os.environ.get(CACHE_VARIABLE, "")
    if given:
        return Path(given)
    try:
        import pooch
    except ImportError:
        return Path("~/.cache/lunet-fast").expanduser()
    return Path(pooch.os_cache("lunet-fast"))


def _spec(dataset: str) -> DataSet:
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    return DATASETS[dataset]


def _listed(failures: list[str]) -> str:
    return "\n".join(f"  - {failure}" for failure in failures)


def _logged(located: Located) -> Located:
    logger.info("%s read from %s", located.dataset, located.source)
    return located


# ------------------------------------------------------------------------------------------------------------
# Sources. Each gives the files, checked, or says in one line why it cannot.


class _Unavailable(Exception):
    """Why a source does not have the data set."""


@dataclass(frozen=True)
class _Archive:
    """A zip or wheel that can be fetched and cached."""

    file: str
    origin: str
    fetch: Callable[[], bytes]
    read: Callable[[bytes], dict[str, bytes]]


def _archives(spec: DataSet) -> list[_Archive]:
    archives = [
        _Archive(
            spec.zip, spec.url, lambda: _download(spec.url, spec.md5), lambda data: _read_zip(spec, data)
        )
    ]
    wheel = spec.wheel
    if wheel is not None:
        archives.append(
            _Archive(
                wheel.file,
                f"the wheel {wheel.requirement} by pip",
                lambda: _pip_download(wheel),
                lambda data: _read_wheel(wheel, data),
            )
        )
    return archives


def _from_folder(spec: DataSet, folder: Path, failures: list[str]) -> Located | None:
    zips = [folder / spec.name / spec.zip, folder / spec.zip]
    unpacked = [folder / spec.name, folder / spec.name / spec.name, folder]
    before = len(failures)
    if not folder.is_dir():
        failures.append(f"{folder} is not a folder")
        return None
    for place in [*zips, *unpacked]:
        source = place if place in zips else place / spec.ratings
        try:
            if not source.is_file():
                continue
            if place in zips:
                files = _read_zip(spec, _read_file(place, MAX_ARCHIVE_BYTES))
            else:
                here = [name for name in spec.files if (place / name).is_file()]
                files = {name: _read_file(place / name, MAX_MEMBER_BYTES) for name in here}
                _check(spec, files)
        except (_Unavailable, OSError) as reason:
            failures.append(f"{source}: {reason}")
            continue
        for name in spec.files:
            if name not in files:
                logger.warning("%s: %s is not with it, so its columns are missing", source, name)
        return Located(spec.name, str(source), files)
    if len(failures) == before:
        failures.append(
            f"{folder} holds neither {spec.name}/{spec.zip}, {spec.zip}, {spec.name}/{spec.ratings}, "
            f"{spec.name}/{spec.name}/{spec.ratings} nor {spec.ratings}"
        )
    return None


def _from_cache(spec: DataSet, archive: _Archive) -> Located:
    file = cache_folder() / archive.file
    try:
        if not file.is_file():
            raise _Unavailable(f"there is no {file}")
        data = _read_file(file, MAX_ARCHIVE_BYTES)
    except OSError as error:
        raise _Unavailable(f"{file}: {error}") from error
    try:
        return Located(spec.name, str(file), archive.read(data))
    except _Unavailable as reason:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise _Unavailable(f"{file}: {reason}; it cannot be removed ({error})") from error
        logger.warning("removed the unusable %s: %s", file, reason)
        raise _Unavailable(f"{file}: {reason}; it has been removed") from reason


def _from_network(spec: DataSet, archive: _Archive) -> Located:
    logger.info(
        "%s: fetching %s (the licence of GroupLens Research applies to the data)", spec.name, archive.origin
    )
    data = archive.fetch()
    files = archive.read(data)
    file = cache_folder() / archive.file
    try:
        _write_atomically(file, data)
    except OSError as error:
        logger.warning("%s: cannot be kept in the cache, it will be fetched again (%s)", file, error)
    return Located(spec.name, archive.origin, files)


def _write_atomically(file: Path, data: bytes) -> None:
    """Another process sees the whole file or none: it is written under a name of its own, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _download(url: str, md5: str) -> bytes:
    try:
        import pooch
    except ImportError as error:
        raise _Unavailable("pooch is not installed: pip install 'lunet-fast[train]'") from error
    pooch_logger = pooch.get_logger()
    level = pooch_logger.level
    pooch_logger.setLevel(logging.WARNING)  # it would report the temporary file
    try:
        with tempfile.TemporaryDirectory(prefix="lunet-fast-") as folder:
            downloader = pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS))
            path = pooch.retrieve(url, f"md5:{md5}", fname="download.zip", path=folder, downloader=downloader)
            return _read_file(Path(path), MAX_ARCHIVE_BYTES)
    except Exception as error:  # of requests, urllib3, ssl, the file system, or pooch's on another checksum
        raise _Unavailable(_one_line(f"{type(error).__name__}: {error}")) from error
    finally:
        pooch_logger.setLevel(level)


def _pip_download(wheel: Wheel) -> bytes:
    """The wheel through pip, which knows the mirrors, proxies and certificates of this machine."""
    # What the user has set for a slow mirror stays; without it, a machine without network must not wait
    # minutes.
    environment = {"PIP_DEFAULT_TIMEOUT": "15", "PIP_RETRIES": "1", **os.environ}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    with tempfile.TemporaryDirectory(prefix="lunet-fast-") as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--dest",
            folder,
            "-r",
            str(wanted),
        ]
        command = [sys.executable, "-m", "pip", "download", *options]
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=PIP_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _Unavailable(f"pip download did not end within {PIP_SECONDS} s") from error
        except OSError as error:
            raise _Unavailable(f"pip cannot be run: {error}") from error
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no message"]
            errors = [line for line in said if line.startswith("ERROR")] or said[-1:]
            raise _Unavailable(_one_line(f"pip download failed: {' '.join(errors)}"))
        try:
            return _read_file(Path(folder) / wheel.file, MAX_ARCHIVE_BYTES)
        except OSError as error:
            raise _Unavailable(f"pip download left no {wheel.file}") from error


def _one_line(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


# ------------------------------------------------------------------------------------------------------------
# Archives and checksums


def _read_file(file: Path, limit: int) -> bytes:
    with file.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise _Unavailable(f"has more than {limit} bytes: not a MovieLens file")
    return data


def _read_zip(spec: DataSet, data: bytes) -> dict[str, bytes]:
    """The files of the data set in a zip, official or re-packed, in whatever folder of the zip they lie."""
    wanted: dict[str, zipfile.ZipInfo] = {}
    with _opened(data) as archive:
        for member in sorted(archive.infolist(), key=lambda m: len(m.filename)):
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.name in spec.files and (path.name not in wanted or path.parent.name == spec.name):
                wanted[path.name] = member
        files = {name: _read_member(archive, member) for name, member in wanted.items()}
    if spec.ratings not in files:
        raise _Unavailable(f"the zip has no {spec.ratings}")
    _check(spec, files, official=hashlib.md5(data, usedforsecurity=False).hexdigest() == spec.md5)
    return files


def _read_wheel(wheel: Wheel, data: bytes) -> dict[str, bytes]:
    digest = hashlib.sha256(data).hexdigest()
    if digest != wheel.sha256:
        raise _Unavailable(f"{wheel.file} has the SHA-256 {digest}, expected {wheel.sha256}")
    with _opened(data) as archive:
        try:
            members = {name: archive.getinfo(f"{wheel.folder}/{name}") for name in wheel.members}
        except KeyError as error:
            raise _Unavailable(f"{wheel.file}: {error}") from error
        files = {name: _read_member(archive, member) for name, member in members.items()}
    for name, expected in wheel.members.items():
        _check_sha256(name, files[name], expected)
    return files


def _opened(data: bytes) -> zipfile.ZipFile:
    # As many as the directory can have at most, before zipfile makes an object of each.
    if data.count(b"PK\x01\x02") > MAX_MEMBERS:
        raise _Unavailable(f"the zip has more than {MAX_MEMBERS:,} members: refused")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # a damaged directory ends in errors of several types
        raise _Unavailable(f"not a zip file, or cut short ({cause(error)})") from error
    for member in archive.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or (path.parts[:1] and ":" in path.parts[0]):
            raise _Unavailable(f"{brief(member.filename)} in the zip leads out of its folder: refused")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise _Unavailable(f"{brief(member.filename)} in the zip is a link: refused")
    return archive


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    name = brief(member.filename)
    # zipfile reads these two in bounded steps; of others, a few bytes can fill the memory.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _Unavailable(f"{name} in the zip is packed by another method than deflate: refused")
    try:
        with archive.open(member) as stream:
            data = stream.read(MAX_MEMBER_BYTES + 1)  # the size that the directory states may be a lie
    except Exception as error:  # of zipfile, zlib and struct
        raise _Unavailable(f"{name} in the zip is damaged ({cause(error)})") from error
    if len(data) > MAX_MEMBER_BYTES:
        raise _Unavailable(f"{name} in the zip unpacks to more than {MAX_MEMBER_BYTES} bytes: refused")
    if len(data) != member.file_size:
        stated = f"states {member.file_size:,} bytes and has {len(data):,}"
        raise _Unavailable(f"{name} in the zip {stated}: refused")
    return data


def _check_sha256(name: str, data: bytes, expected: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected:
        raise _Unavailable(f"{name} is not GroupLens' file: its SHA-256 is {digest}, expected {expected}")


def _check(spec: DataSet, files: Mapping[str, bytes], official: bool = False) -> None:
    """Checks each file by its SHA-256; ratings may pass by their counts, or as part of the official zip."""
    for name, data in files.items():
        try:
            _check_sha256(name, data, spec.sha256[name])
        except _Unavailable:
            if name != spec.ratings or spec.counts is None:
                raise
            if not official:
                _check_counts(spec, data, spec.counts)


def _check_counts(spec: DataSet, data: bytes, counts: Counts) -> None:
    try:
        ratings = _parse(spec, data, spec.ratings)
    except RatingFileError as error:
        raise _Unavailable(str(error)) from error
    found = Counts(ratings.n_users, ratings.n_items, ratings.describe()["histogram"])
    if found != counts:
        raise _Unavailable(f"{spec.ratings} is not GroupLens' file: it has {found}, expected {counts}")


# ------------------------------------------------------------------------------------------------------------
# Contents. The tables of movies and users are indexed by id; None where the file is not there.

# fmt: off
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on


def _parse(spec: DataSet, data: bytes, source: str) -> Ratings:
    return parse_text(source, data, spec.sep, name=spec.name, scale=SCALE)


def _wheel_ratings(spec: DataSet, located: Located) -> Ratings:
    header, _, rows = located.files[f"{spec.name}.inter"].partition(b"\n")
    assert header.split(b"\t") == [b"user_id:token", b"item_id:token", b"rating:float", b"timestamp:float"]
    return parse_text(located.source, rows, "\t", name=spec.name, scale=SCALE)


def _fields(data: bytes, sep: str, encoding: str) -> list[list[str]]:
    return [line.split(sep) for line in data.decode(encoding).replace("\r\n", "\n").split("\n") if line]


def _movies(spec: DataSet, data: bytes | None) -> pd.DataFrame | None:
    if data is None:
        return None
    if spec.movies == "u.item":
        rows = [
            (
                int(f[0]),
                f[1].strip(),
                "|".join(g for g, flag in zip(GENRES_100K, f[5:], strict=True) if flag == "1"),
            )
            for f in _fields(data, "|", "latin-1")
        ]
    else:
        rows = [
            (int(number), title.strip(), genres) for number, title, genres in _fields(data, "::", "latin-1")
        ]
    return pd.DataFrame(rows, columns=["id", "title", "genres"]).set_index("id")


def _people(spec: DataSet, data: bytes | None) -> pd.DataFrame | None:
    if data is None:
        return None
    if spec.people == "u.user":
        return _people_table(_fields(data, "|", "latin-1"))
    rows = [
        [number, age, gender, job, code] for number, gender, age, job, code in _fields(data, "::", "latin-1")
    ]
    return _people_table(rows).astype({"occupation": "int64"})


def _people_table(rows: list[list[str]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["id", "age", "gender", "occupation", "zip"])
    return table.astype({"id": "int64", "age": "int64"}).set_index("id")


def _wheel_movies(data: bytes) -> pd.DataFrame:
    """Titles with the year and genres separated by "|", as in u.item."""
    rows = []
    for number, title, year, genres in _fields(data, "\t", "utf-8")[1:]:
        # One film has no title; the wheel misspells "unknown" and repeats it as the year.
        full = "unknown" if title == "unkonwn" else f"{title} ({year})"
        rows.append((int(number), full, genres.replace(" ", "|")))
    return pd.DataFrame(rows, columns=["id", "title", "genres"]).set_index("id")


def _wheel_people(data: bytes) -> pd.DataFrame:
    return _people_table(_fields(data, "\t", "utf-8")[1:])
