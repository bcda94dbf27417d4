"""Rows to learn a density of: data sets by name, and files of one's own. The one place that knows formats."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lunet_fast.density.targets import TARGETS, Target

DIGITS = "digits"
TABULAR = ("breast_cancer", "diabetes", "iris", "wine")
"""Tables that come with scikit-learn; of each, the numbers, with the classes as labels where it has some."""

NAMES = (DIGITS, *TABULAR, *TARGETS)
"""What :func:`read` knows by name."""

TARGET_ROWS = 10_000
"""Rows drawn of a density on the plane, for all parts together."""

MOST_LEVELS = 1 << 16
"""Integers of a table from 0 to less than this are taken as levels, unless told otherwise."""

MOST_IDX_BYTES = 1 << 31
"""Of an unpacked IDX file; MNIST's largest has 47 million."""

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
"""Of all rows: held out for the test, and for choosing when to stop."""

#: MD5 of the files as they are published (http://yann.lecun.com/exdb/mnist, github.com/zalandoresearch/
#: fashion-mnist) → what they are.
PUBLISHED = {
    "f68b3c2dcbeaaa9fbdd348bbdeb94873": "MNIST, training images",
    "d53e105ee54ea40749a09fcbcd1e9432": "MNIST, training labels",
    "9fb629c4189551a2d022fa330f9573f3": "MNIST, test images",
    "ec29112dd5afa0611ce80d1b7f02629c": "MNIST, test labels",
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d": "Fashion-MNIST, training images",
    "25c81989df183df01b3e8a0aad5dffbe": "Fashion-MNIST, training labels",
    "bef4ecab320f06d8554ea6380940ec79": "Fashion-MNIST, test images",
    "bb300cfdad3c16e7a12a480ee83cd310": "Fashion-MNIST, test labels",
}


class DataError(ValueError):
    """A file cannot be used; the message names it, where in it, and the fix."""


@dataclass(frozen=True)
class Rows:
    """Rows of one data set.

    ``values`` [N, D] float32, finite; with ``levels``, integers from 0 to levels − 1. ``labels`` [N] int64
    from 0 on, or None; ``label_names`` what they were called, where they had names. ``image`` is (height,
    width) where a row is a picture. ``target`` is the density that the rows were drawn from, where it is
    known. ``source`` says where they are from, for the results.
    """

    name: str
    values: Tensor
    labels: Tensor | None = None
    levels: int | None = None
    image: tuple[int, int] | None = None
    target: Target | None = None
    source: str = ""
    label_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def features(self) -> int:
        return self.values.shape[1]

    @property
    def classes(self) -> int:
        """How many labels there are, 0 without."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def where(self, chosen: Tensor) -> Rows:
        """The rows at the indices, or with True, in ``chosen``."""
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, values=self.values[chosen], labels=labels)


@dataclass(frozen=True)
class Parts:
    """Training, validation and test rows; no row in two of them."""

    training: Rows
    validation: Rows
    test: Rows


def source_of(rows: Rows, test: Rows | None) -> str:
    """Where the rows of a training and those of its test are from."""
    return rows.source if test is None else f"{rows.source}; test: {test.source}"


def split(rows: Rows, seed: int, test: Rows | None = None) -> Parts:
    """20 % for the test, 10 % for validation, the rest for training; ``seed`` alone says which is which.

    With ``test``, other rows of the same kind, these are the test, and all but the validation's train.

    Raises :class:`DataError` for fewer than 10 rows.
    """
    count = len(rows)
    if count < 10:
        raise DataError(f"{rows.name} has {count} rows: at least 10 are needed for three parts")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held, validation = math.ceil(TEST_SHARE * count), math.ceil(VALIDATION_SHARE * count)
    if test is not None:
        return Parts(rows.where(order[validation:]), rows.where(order[:validation]), test)
    parts = order[held + validation :], order[held : held + validation], order[:held]
    return Parts(*(rows.where(part) for part in parts))


def read(
    dataset: str,
    *,
    label_column: str | None = None,
    seed: int = 0,
    levels: int | None = None,
    like: Rows | None = None,
) -> Rows:
    """A data set by name (:data:`NAMES`), or the file of that path.

    Files: IDX as MNIST has it (``…-ubyte``, also ``.gz``; the labels are taken from the file beside it whose
    name has ``labels-idx1`` for ``images-idx3``), ``.npy``, and ``.csv``, ``.tsv`` or ``.parquet`` with a
    number in every cell. ``label_column`` names a column of classes. Densities on the plane are drawn with
    ``seed``.

    A table of integers from 0 on has a density without bound, so they are levels, one more than the
    greatest; ``levels`` says how many there are instead, 0 that the numbers of any file are real ones.
    ``like`` are rows beside which these are to be used: features, levels and numbers of labels are theirs.

    Raises :class:`DataError` for a file that is damaged or holds anything but finite numbers,
    ``FileNotFoundError`` for one that is not there, ``ImportError`` where scikit-learn or pyarrow is missing.
    """
    if dataset in TARGETS:
        target = TARGETS[dataset]()
        drawn = target.sample(TARGET_ROWS, torch.Generator().manual_seed(seed))
        return Rows(dataset, drawn.float(), target=target, source=f"drawn with seed {seed}")
    if dataset == DIGITS or dataset in TABULAR:
        return _scikit(dataset)
    path = Path(dataset)
    if not path.is_file():
        raise FileNotFoundError(
            f"--dataset {dataset}: neither a known data set ({', '.join(NAMES)}) nor an existing file"
        )
    if path.suffix == ".npy":
        rows = _npy(path)
    elif path.suffix in (".csv", ".tsv", ".parquet"):
        rows = _table(path, label_column)
    elif "idx3" in path.name:
        rows = _idx_images(path)
    else:
        raise DataError(
            f"{path}: give a .npy, .csv, .tsv or .parquet file, or images as IDX, with idx3 in the name"
        )
    if label_column is not None and path.suffix in (".npy", "") and rows.labels is None:
        raise DataError(f"{path}: has no columns with names, so that --label-column names none")
    bad = (~torch.isfinite(rows.values)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise DataError(
            f"{path}: row {row}, column {column} (from 0) is {rows.values[row, column]}: leave such rows out"
        )
    if rows.values.numel() == 0:
        raise DataError(f"{path}: is empty, shape {tuple(rows.values.shape)}")
    if like is not None:
        levels = like.levels or 0
        rows = _numbered_like(path, rows, like)
    return _levelled(path, rows, levels)


def _levelled(path: Path, rows: Rows, levels: int | None) -> Rows:
    """The rows with this number of levels, found if None, 0 for none."""
    if levels == 0:
        return replace(rows, levels=None, image=None)
    values = rows.values
    whole = bool((values == values.round()).all())
    low, high = float(values.min()), float(values.max())
    if levels is None:
        if rows.levels is not None or not whole or low < 0 or high >= MOST_LEVELS or high == 0:
            return rows
        return replace(rows, levels=int(high) + 1)
    if not whole or low < 0 or high >= levels:
        found = f"numbers from {low:g} to {high:g}" if whole else "numbers that are no integers"
        raise DataError(
            f"{path}: must hold integers from 0 to {levels - 1} for {levels} levels, holds {found}"
        )
    return replace(rows, levels=levels)


def _numbered_like(path: Path, rows: Rows, like: Rows) -> Rows:
    """The rows with their labels numbered as those of ``like``."""
    if rows.features != like.features:
        raise DataError(f"{path}: has {rows.features} features, and {like.name} {like.features}")
    if like.label_names is None or rows.label_names is None or rows.labels is None:
        return rows
    known = {name: number for number, name in enumerate(like.label_names)}
    new = [name for name in rows.label_names if name not in known]
    if new:
        raise DataError(f"{path}: has the label {new[0]!r}, which {like.name} has not")
    numbers = torch.tensor([known[name] for name in rows.label_names])
    return replace(rows, labels=numbers[rows.labels], label_names=like.label_names)


def _scikit(name: str) -> Rows:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"--dataset {name} comes with scikit-learn: pip install 'lunet-fast[density]'"
        ) from error
    bunch = getattr(datasets, f"load_{name}")()
    values = torch.from_numpy(np.ascontiguousarray(bunch.data)).float()
    labels = torch.from_numpy(bunch.target).long() if "target_names" in bunch else None
    source = "scikit-learn"
    if name == DIGITS:
        return Rows(name, values, labels, levels=17, image=(8, 8), source=source)
    return Rows(name, values, labels, source=source)


def _npy(path: Path) -> Rows:
    try:
        # allow_pickle stays off: a pickle may run any program.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if values.ndim != 2 or not (np.issubdtype(values.dtype, np.number) and not np.iscomplexobj(values)):
            raise ValueError(f"holds {values.dtype} of shape {values.shape}, not numbers [rows, features]")
        return Rows(path.stem, torch.from_numpy(np.array(values, dtype=np.float32)), source=_digest(path))
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: {error}") from error


def _table(path: Path, label_column: str | None) -> Rows:
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t")
    except ImportError:
        raise
    except Exception as error:  # pandas and pyarrow raise what they like
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    labels, names = None, None
    if label_column is not None:
        if label_column not in table.columns:
            raise DataError(
                f"{path}: has no column {label_column!r}; it has {', '.join(map(str, table.columns))}"
            )
        numbers, found = pd.factorize(table.pop(label_column), sort=True)
        labels, names = torch.from_numpy(numbers.astype(np.int64)), tuple(map(str, found))
        if len(labels) and int(labels.min()) < 0:
            raise DataError(f"{path}: column {label_column!r} is empty in some row: leave such rows out")
    for name in table.columns:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise DataError(
                f"{path}: column {name!r} holds {table[name].dtype}, not numbers: leave it out, or name it "
                "with --label-column if it holds classes"
            )
    try:
        values = torch.from_numpy(table.to_numpy(dtype=np.float32, na_value=np.nan))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: some column does not hold real numbers ({error})") from error
    return Rows(path.stem, values, labels, source=_digest(path), label_names=names)


def _idx_images(path: Path) -> Rows:
    data = _unpacked(path)
    sizes = _idx_sizes(path, data, 3)
    count, height, width = sizes
    # copied: from_numpy wants memory that may be written
    pixels = np.frombuffer(data, np.uint8, offset=16).reshape(count, height * width).astype(np.float32)
    labels = None
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside != path and beside.is_file():
        marks = _unpacked(beside)
        (of_labels,) = _idx_sizes(beside, marks, 1)
        if of_labels != count:
            raise DataError(f"{beside}: has {of_labels} labels, and {path.name} {count} images")
        labels = torch.from_numpy(np.frombuffer(marks, np.uint8, offset=8).astype(np.int64))
    name = path.name.split("-")[0] if "-" in path.name else path.stem
    return Rows(name, torch.from_numpy(pixels), labels, 256, (height, width), source=_digest(path))


def _unpacked(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            data = file.read(MOST_IDX_BYTES + 1)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be unpacked ({error})") from error
    if len(data) > MOST_IDX_BYTES:
        raise DataError(f"{path}: unpacks to more than {MOST_IDX_BYTES >> 30} GiB")
    return data


def _idx_sizes(path: Path, data: bytes, dimensions: int) -> tuple[int, ...]:
    """The sizes in the header of an IDX file of bytes, which must be those of what follows."""
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"{path}: does not begin as an IDX file of bytes with {dimensions} dimensions, "
            f"{bytes((0, 0, 8, dimensions)).hex()}, but with {data[:4].hex() or 'nothing'}"
        )
    sizes = struct.unpack(f">{dimensions}I", data[4:start])
    if math.prod(sizes) != len(data) - start:
        claimed = " x ".join(map(str, sizes))
        raise DataError(f"{path}: claims {claimed} bytes and has {len(data) - start}: fetch it again")
    return sizes


def _digest(path: Path) -> str:
    """What a file is, for the results: its SHA-256, and its name where it is a published one."""
    data = path.read_bytes()
    known = PUBLISHED.get(hashlib.md5(data, usedforsecurity=False).hexdigest())
    return f"{path.name}, SHA-256 {hashlib.sha256(data).hexdigest()}" + (f" ({known})" if known else "")
