"""Real data sets that come in packages of Debian: found on this machine, or fetched by apt, and checked.

Nothing of them is part of this package. :func:`load` looks, in this order, into

1. ``data_dir`` (``--data-dir``); a folder given there must hold the files, and nothing else is tried;
2. the folder ``$LUNET_FAST_DATA``;
3. the folder into which the Debian package, where it is installed, puts its files;
4. the cache: ``$LUNET_FAST_CACHE``, or the platform's cache folder, under the name of the package;
5. ``apt-get download``, which needs no root: apt checks Debian's signatures, and nothing of the package runs.

In 1 and 2 the files may lie in the folder itself or in one below it that is called as the package. What is
checked is what a file holds, not how it is packed: SHA-256 of the unpacked images, and of the table's numbers
and labels.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lunet_fast.density.data_files import PUBLISHED, idx_part, with_test
from lunet_fast.density.data_limits import DataError, brief, read_bytes, unpacked
from lunet_fast.density.data_rda import read_rda
from lunet_fast.density.data_rows import TEST, TRAINING, Rows
from lunet_fast.training.files import write_atomically
from lunet_fast.training.outside import ProgramError, run_program
from lunet_fast.training.places import DATA_VARIABLE, cache_folder

logger = logging.getLogger(__name__)

APT_SECONDS = 600
_PROGRAMS = "/usr/bin:/bin:/usr/local/bin"
"""Where apt-get and dpkg-deb are looked for: never in the current folder, which $PATH may name."""


class DataNotFoundError(FileNotFoundError):
    """No source has the data set; the message lists each, why it failed, and which file to put where."""


class DataDamagedError(DataError):
    """A file of the data set is there, and is not what it should be."""


@dataclass(frozen=True)
class Package:
    """A package of Debian, and where it puts its files."""

    name: str
    folder: str
    licence: str
    origin: str
    """Where the same files can be had without Debian."""


FASHION = Package(
    "dataset-fashion-mnist",
    "usr/share/datasets/fashion-mnist",
    "Expat (Zalando SE)",
    "https://github.com/zalandoresearch/fashion-mnist (data/fashion)",
)
MLBENCH = Package(
    "r-cran-mlbench",
    "usr/lib/R/site-library/mlbench/data",
    "GPL-2; data of the UCI repository",
    "the R package mlbench of CRAN, folder data",
)
KERNLAB = Package(
    "r-cran-kernlab",
    "usr/lib/R/site-library/kernlab/data",
    "GPL-2; data of the UCI repository",
    "the R package kernlab of CRAN, folder data",
)


@dataclass(frozen=True)
class Images:
    """Images for training and for the test, with labels, as IDX."""

    package: Package
    about: str
    files: tuple[str, ...] = tuple(
        f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )


@dataclass(frozen=True)
class Table:
    """A data frame in a file of R's.

    Of each column, the numbers are divided by its unit, the resolution in which it was written down, and
    ``lowest`` is taken off: integers from 0 on. With ``unit`` None they are left as they are, real numbers.
    """

    package: Package
    about: str
    file: str
    label: str
    sha256: str
    unit: float | None = 1.0
    units: Mapping[str, float] = field(default_factory=dict)
    """Of single columns, by name."""
    lowest: int = 0
    leave_out: tuple[str, ...] = ()
    test_from: int | None = None
    """The first row of the publisher's test part, which is the last."""

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,)


_SPAM_UNITS = {
    "capitalAve": 0.001,
    "capitalLong": 1.0,
    "capitalTotal": 1.0,
    "charSemicolon": 0.001,
    "charRoundbracket": 0.001,
    "charSquarebracket": 0.001,
    "charExclamation": 0.001,
    "charDollar": 0.001,
    "charHash": 0.001,
}

DATASETS: dict[str, Images | Table] = {
    "fashion-mnist": Images(FASHION, "70,000 pictures of clothes, 28 x 28, 10 classes"),
    "letter": Table(
        MLBENCH,
        "features of printed capital letters",
        "LetterRecognition.rda",
        "lettr",
        "966a5a54bcebb9ec711952e6fc7e511abdcb465184dd95fcbd3d9d0a39d06664",
        test_from=16_000,
    ),
    "shuttle": Table(
        MLBENCH,
        "sensors of the space shuttle (Statlog)",
        "Shuttle.rda",
        "Class",
        "25f3ebd9a46ed89dffc26eb7cdc8cdcd9fffc60f55ef01eeafe437eed53dcce8",
        lowest=-26_739,
        test_from=43_500,
    ),
    "satellite": Table(
        MLBENCH,
        "3 x 3 pixels of Landsat in four bands (Statlog)",
        "Satellite.rda",
        "classes",
        "e49128f0cc4e7d9e58745b1ae9d2616a815fb79ab6d5187ef3ff4a5932159887",
        test_from=4_435,
    ),
    "vehicle": Table(
        MLBENCH,
        "shapes of the silhouettes of cars (Statlog)",
        "Vehicle.rda",
        "Class",
        "a8ac01ddbfc9e3142deac84bf21f7c54b4d36aabb4e9d8a6af22e37991c88d02",
    ),
    "vowel": Table(
        MLBENCH,
        "spoken vowels; the test speakers are others",
        "Vowel.rda",
        "Class",
        "f90fca73d734b2c036dbdecce9ed09a07c2bb56f817bb032f157d4faf3d26282",
        unit=None,
        leave_out=("V1",),
        test_from=528,
    ),
    "pima": Table(
        MLBENCH,
        "women of the Pima, some with diabetes",
        "PimaIndiansDiabetes.rda",
        "diabetes",
        "4208a2b49d6b5664e0e44567b55eaf2ba6ce8ed4435c80e650d4cbc2b29eb51d",
        units={"mass": 0.1, "pedigree": 0.001},
    ),
    "spam": Table(
        KERNLAB,
        "shares of words in e-mails, in per cent",
        "spam.rda",
        "type",
        "320e494461eddf05cbdc963eb32ed7c27636cb34432afcedbfe44f1cfd83aee8",
        unit=0.01,
        units=_SPAM_UNITS,
    ),
}


def load(name: str, data_dir: Path | None = None, *, fetch: bool = True) -> Rows:
    """A data set of :data:`DATASETS`, checked; ``source`` says where it was found.

    Raises :class:`DataNotFoundError` where no source has it, and :class:`DataDamagedError` for a file that is
    not the published one, ``ImportError`` where a table is to be read and rdata is missing. Without ``fetch``
    nothing is fetched.
    """
    spec = DATASETS[name]
    folder = folder_of(name, data_dir, fetch=fetch)
    logger.info("%s read from %s", name, folder)
    rows = _images(folder) if isinstance(spec, Images) else _table(spec, folder / spec.file)
    return replace(rows, name=name)


def fetch_package(name: str) -> Path:
    """Fetch the package of a data set by apt; its checked files are in the cache folder that is returned.

    All data sets of the package are kept. Raises :class:`DataNotFoundError` where that cannot be done.
    """
    package = DATASETS[name].package
    folder = cache_folder() / package.name
    logger.info("%s: fetching Debian's package %s (%s)", name, package.name, package.licence)
    with tempfile.TemporaryDirectory(prefix="lunet-fast-") as temporary:
        place = Path(temporary)
        _run(["apt-get", "download", "-q", package.name], place)
        packed = sorted(place.glob(f"{package.name}_*.deb"))
        if len(packed) != 1:
            raise DataNotFoundError(f"apt-get download {package.name} left no .deb file")
        _run(["dpkg-deb", "-x", packed[0].name, "unpacked"], place)
        whole = place / "unpacked" / package.folder
        for other, spec in DATASETS.items():
            if spec.package is package:
                _check(other, spec, whole)
        folder.mkdir(parents=True, exist_ok=True)
        for spec in DATASETS.values():
            for file in spec.files if spec.package is package else ():
                data = read_bytes(whole / file)
                write_atomically(folder / file, partial(_write, data))
    return folder


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def folder_of(name: str, data_dir: Path | None = None, *, fetch: bool = True) -> Path:
    """The first folder that has all files of a data set; what they hold is not looked at yet.

    Raises :class:`DataNotFoundError` where none has and it cannot be fetched.
    """
    spec = DATASETS[name]
    package = spec.package
    listed = ", ".join(spec.files)
    if data_dir is not None:
        for place in (data_dir, data_dir / package.name):
            if _has(place, spec):
                return place
        raise DataNotFoundError(f"{name}: --data-dir {data_dir} does not hold {listed}: {_help(spec)}")
    given = os.environ.get(DATA_VARIABLE, "")
    places = [Path(given), Path(given) / package.name] if given else []
    places += [Path("/") / package.folder, cache_folder() / package.name]
    for place in places:
        if _has(place, spec):
            return place
    if not fetch:
        looked = ", ".join(map(str, places))
        raise DataNotFoundError(
            f"{name}: {listed} is in none of {looked}: get it by  lunet-fast density data fetch {name}"
        )
    try:
        return fetch_package(name)
    except DataNotFoundError as error:
        raise DataNotFoundError(f"{name}: {error}. {_help(spec)}") from error


def _has(folder: Path, spec: Images | Table) -> bool:
    return all((folder / file).is_file() for file in spec.files)


def _help(spec: Images | Table) -> str:
    """What to do by hand."""
    package = spec.package
    where = cache_folder() / package.name
    return (
        f"Put {', '.join(spec.files)} into {where}, or into a folder that --data-dir or ${DATA_VARIABLE} "
        f"names. They are in Debian's package {package.name} (https://packages.debian.org/{package.name}; "
        f"its .deb unpacks by  dpkg-deb -x  or  ar x), under {package.folder}, and in {package.origin}"
    )


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a program of the system in ``folder``; DataNotFoundError saying why it could not be done."""
    program = shutil.which(command[0], path=_PROGRAMS)
    if program is None:
        raise DataNotFoundError(
            f"{command[0]} is not on this machine, so no package of Debian can be fetched"
        )
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        run_program(
            *([program, *command[1:]], " ".join(command[:3]), folder, environment, APT_SECONDS),
            telling=("E:", "dpkg-deb:"),
        )
    except ProgramError as error:
        hint = " (an old list of packages is renewed by  apt-get update)" if "apt" in command[0] else ""
        raise DataNotFoundError(f"{brief(error, 400)}{hint}") from error


# Reading ----------------------------------------------------------------------------------------------------


def _check(name: str, spec: Images | Table, folder: Path) -> None:
    """DataNotFoundError unless the files in ``folder`` are those of the data set."""
    try:
        if isinstance(spec, Images):
            _check_images(folder)
        else:
            _table(spec, folder / spec.file)
    except (DataError, OSError) as error:
        raise DataNotFoundError(f"Debian's {spec.package.name} has another {name}: {error}") from error


def _check_images(folder: Path) -> None:
    wanted = {
        "train-images-idx3-ubyte.gz": "Fashion-MNIST, training images",
        "train-labels-idx1-ubyte.gz": "Fashion-MNIST, training labels",
        "t10k-images-idx3-ubyte.gz": "Fashion-MNIST, test images",
        "t10k-labels-idx1-ubyte.gz": "Fashion-MNIST, test labels",
    }
    for file, what in wanted.items():
        path = folder / file
        found = hashlib.sha256(unpacked(path, read_bytes(path))).hexdigest()
        if PUBLISHED.get(found) != what:
            raise DataDamagedError(
                f"{path}: is not {what}: SHA-256 {found} of what it unpacks to: fetch it again"
            )


def _images(folder: Path) -> Rows:
    _check_images(folder)
    parts = (idx_part(folder / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k"))
    rows, test = parts
    return with_test(rows, test)


def _table(spec: Table, path: Path) -> Rows:
    frame = read_rda(path)
    wanted = spec.leave_out
    missing = [name for name in (spec.label, *wanted) if name not in frame.columns]
    if missing:
        raise DataDamagedError(
            f"{path}: has no column {missing[0]}: it is not the file of {spec.package.name}"
        )
    marks = [str(label) for label in frame.pop(spec.label)]
    frame = frame.drop(columns=list(wanted))
    try:
        values = frame.to_numpy(np.float64)
    except (TypeError, ValueError) as error:
        raise DataDamagedError(f"{path}: holds other columns than numbers ({brief(error)})") from error
    names = tuple(sorted(set(marks)))
    number = {name: place for place, name in enumerate(names)}
    labels = torch.tensor([number[mark] for mark in marks])
    found = table_digest(values, marks)
    if found != spec.sha256:
        raise DataDamagedError(
            f"{path}: is not the table of {spec.package.name}: its numbers and labels have the SHA-256 "
            f"{found}, expected {spec.sha256}"
        )
    levels = None
    if spec.unit is not None:
        units = np.array([spec.units.get(name, spec.unit) for name in frame.columns])
        values = np.round(values / units) - spec.lowest
        levels = int(values.max()) + 1
    part = None
    if spec.test_from is not None:
        part = torch.full((len(values),), TRAINING, dtype=torch.int8)
        part[spec.test_from :] = TEST
    return Rows(
        path.stem,
        torch.from_numpy(values.astype(np.float32)),
        labels,
        levels,
        source=f"{path.name} of Debian's {spec.package.name}, SHA-256 {found} of its table",
        label_names=names,
        part=part,
    )


def table_digest(values: np.ndarray, labels: Sequence[str]) -> str:
    """SHA-256 of numbers [N, D], as little-endian doubles by rows, and then of the labels, a line each."""
    found = hashlib.sha256(f"{values.shape[0]} {values.shape[1]}\n".encode())
    found.update(np.ascontiguousarray(values, "<f8").tobytes())
    found.update("".join(f"{label}\n" for label in labels).encode())
    return found.hexdigest()
