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
Whatever the source, the files inside are checked, as :mod:`~.archives` says.

The ratings in the wheel are those of ``u.data``, row for row. Its titles lack the year and its genres are
separated by blanks; both are put back as in ``u.item``. Titles lose white space at their ends (three have
some in ``u.item``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from lunet_fast.recsys.data import fetching
from lunet_fast.recsys.data.archives import (
    check,
    read_archive,
    read_unpacked,
    read_wheel,
    read_zip,
)
from lunet_fast.recsys.data.datasets import DATASETS, SCALE, DataSet
from lunet_fast.recsys.data.errors import Unavailable
from lunet_fast.recsys.data.ids import IdMap
from lunet_fast.recsys.data.limits import read_bytes
from lunet_fast.recsys.data.movielens_tables import (
    movies_of,
    parse,
    people_of,
    wheel_movies,
    wheel_people,
    wheel_ratings,
)
from lunet_fast.recsys.data.order_file import order_file_beside, read_positions
from lunet_fast.recsys.data.ratings import Ratings, parse_text
from lunet_fast.training.files import write_atomically
from lunet_fast.training.places import DATA_VARIABLE, cache_folder

__all__ = ["DATASETS", "DataNotFoundError", "Located", "load", "locate", "read_like"]

logger = logging.getLogger(__name__)


class DataNotFoundError(FileNotFoundError):
    """No source has the data set; the message lists each one, why it failed, and which file to put where."""


class Located(NamedTuple):
    """The files of a data set, read and checked: name -> content, and the place they came from."""

    dataset: str
    source: str
    files: Mapping[str, bytes]


def load(dataset: str, data_dir: str | os.PathLike[str] | None = None) -> Ratings:
    """MovieLens ``"ml-100k"`` or ``"ml-1m"`` with titles, genres and user columns; rows as in the file.

    Sources and their order: see the module. ``source`` of the result and the log (level INFO) say which it
    was. ``user_info`` has age, gender, occupation and zip; age and occupation of ML-1M are GroupLens' codes.
    A timestamp of 0 is unknown; where there are such, ``order/NAME-order.npz`` in the data set's folder says
    their order (:mod:`~.order_file`), which GroupLens' own files need not. ``item_info`` or ``user_info`` is
    None where an unpacked folder lacks that file.

    Raises DataNotFoundError where no source has the data set, RatingFileError for an order file that is not
    of these ratings, ValueError for an unknown name.
    """
    spec = _spec(dataset)
    located = locate(dataset, data_dir)
    if f"{spec.name}.inter" in located.files:
        ratings = wheel_ratings(spec, located.files[f"{spec.name}.inter"], located.source)
        movies: pd.DataFrame | None = wheel_movies(located.files[f"{spec.name}.item"])
        people: pd.DataFrame | None = wheel_people(located.files[f"{spec.name}.user"])
    else:
        _, of_movies, of_people = spec.files
        ratings = parse(spec, located.files[spec.ratings], located.source)
        movies = movies_of(spec, located.files.get(of_movies))
        people = people_of(spec, located.files.get(of_people))
    return replace(
        ratings,
        item_info=None if movies is None else movies.reindex(ratings.items.ids).reset_index(drop=True),
        user_info=None if people is None else people.reindex(ratings.users.ids).reset_index(drop=True),
        source=located.source,
        position=_positions(spec, ratings, located.source),
    )


def _positions(spec: DataSet, ratings: Ratings, source: str) -> torch.Tensor | None:
    """The order of the rows where some times are unknown and a file tells it."""
    if ratings.timestamp is None or not bool((ratings.timestamp == 0).any()):
        return None
    file = order_file_beside(source, spec.name)
    if file is None:
        logger.warning(
            "%s: some times are unknown, and there is no order/%s-order.npz: such ratings count as older "
            "than all others of their users",
            source,
            spec.name,
        )
        return None
    return read_positions(file, ratings)


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
        failures.append(f"data folder: neither data_dir=FOLDER nor ${DATA_VARIABLE} is given")
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
        except Unavailable as reason:
            failures.append(f"cache: {reason}")
    for archive in archives:
        try:
            return _logged(_from_network(spec, archive))
        except Unavailable as reason:
            failures.append(f"{archive.origin}: {reason}")
    raise DataNotFoundError(
        f"{dataset} was found in none of its sources:\n{_listed(failures)}\n"
        f"Download {spec.url} and put it, as it is, at {cache_folder() / spec.zip}, or as {spec.zip} into a "
        f"folder that data_dir=FOLDER or ${DATA_VARIABLE} names."
    )


def _spec(dataset: str) -> DataSet:
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    return DATASETS[dataset]


def _listed(failures: list[str]) -> str:
    return "\n".join(f"  - {failure}" for failure in failures)


def _logged(located: Located) -> Located:
    logger.info("%s read from %s", located.dataset, located.source)
    return located


# Sources: each gives the files, checked, or says in one line why it cannot ----------------------------------


class _Archive(NamedTuple):
    """A zip or wheel that can be fetched and cached."""

    file: str
    origin: str
    fetch: Callable[[], bytes]
    read: Callable[[bytes], dict[str, bytes]]


def _archives(spec: DataSet) -> list[_Archive]:
    archives = [
        _Archive(
            spec.zip,
            spec.url,
            lambda: fetching.download(spec.url, spec.md5),
            lambda data: read_zip(spec, data),
        )
    ]
    wheel = spec.wheel
    if wheel is not None:
        archives.append(
            _Archive(
                wheel.file,
                f"the wheel {wheel.requirement} by pip",
                lambda: fetching.pip_download(wheel),
                lambda data: read_wheel(wheel, data),
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
                files = read_zip(spec, read_archive(place))
            else:
                here = [name for name in spec.files if (place / name).is_file()]
                files = {name: read_unpacked(place / name) for name in here}
                check(spec, files)
        except (Unavailable, OSError) as reason:
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
            raise Unavailable(f"there is no {file}")
        data = read_archive(file)
    except OSError as error:
        raise Unavailable(f"{file}: {error}") from error
    try:
        return Located(spec.name, str(file), archive.read(data))
    except Unavailable as reason:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"{file}: {reason}; it cannot be removed ({error})") from error
        logger.warning("removed the unusable %s: %s", file, reason)
        raise Unavailable(f"{file}: {reason}; it has been removed") from reason


def _from_network(spec: DataSet, archive: _Archive) -> Located:
    logger.info(
        "%s: fetching %s (the licence of GroupLens Research applies to the data)", spec.name, archive.origin
    )
    data = archive.fetch()
    files = archive.read(data)
    file = cache_folder() / archive.file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda temporary: temporary.write_bytes(data))
    except OSError as error:
        logger.warning("%s: cannot be kept in the cache, it will be fetched again (%s)", file, error)
    return Located(spec.name, archive.origin, files)
