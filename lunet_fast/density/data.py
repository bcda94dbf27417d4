"""Rows to learn a density of: data sets by name, and files of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lunet_fast.density import data_packages, data_published
from lunet_fast.density.data_files import read_file
from lunet_fast.density.data_limits import DataError
from lunet_fast.density.data_rows import Parts, Rows, of_class, source_of, split, split_name
from lunet_fast.density.targets import TARGETS

__all__ = [
    "DIGITS",
    "NAMES",
    "TABULAR",
    "TARGETS",
    "DataError",
    "Parts",
    "Rows",
    "of_class",
    "read",
    "source_of",
    "split",
    "split_name",
]

DIGITS = "digits"
TABULAR = ("breast_cancer", "diabetes", "iris", "wine")
"""Tables that come with scikit-learn; of each, the numbers, with the classes as labels where it has some."""

NAMES = (DIGITS, *TABULAR, *TARGETS, *data_packages.DATASETS, *data_published.DATASETS)
"""What :func:`read` knows by name."""

TARGET_ROWS = 10_000
"""Rows drawn of a density on the plane, for all parts together."""

MOST_LEVELS = 1 << 16
"""Integers of a table from 0 to less than this are taken as levels, unless told otherwise."""

EXACT_LEVELS = 1 << 24
"""More integers than that have no places of their own in float32."""


def read(
    dataset: str,
    *,
    label_column: str | None = None,
    seed: int = 0,
    levels: int | None = None,
    like: Rows | None = None,
    data_dir: str | Path | None = None,
    fetch: bool = True,
) -> Rows:
    """A data set by name (:data:`NAMES`), or the file of that path.

    Files: IDX as MNIST has it (``…-ubyte``, also ``.gz``; the labels are taken from the file beside it whose
    name has ``labels-idx1`` for ``images-idx3``, and with ``train-images…`` the test images from
    ``t10k-images…``), ``.npy``, and ``.csv``, ``.tsv`` or ``.parquet`` with a number in every cell.
    ``label_column`` names a column of classes. Densities on the plane are drawn with ``seed``.

    A table of integers from 0 on has a density without bound, so they are levels, one more than the
    greatest; ``levels`` says how many there are instead, 0 that the numbers of any file are real ones.
    ``like`` are rows beside which these are to be used: features, levels and numbers of labels are theirs.

    ``data_dir`` is where the files of :mod:`~lunet_fast.density.data_published` lie; those of
    :mod:`~lunet_fast.density.data_packages` are looked for there too, or else found, or fetched with
    ``fetch``.

    Raises :class:`DataError` for a file that is damaged or holds anything but finite numbers,
    ``FileNotFoundError`` for one that is not there, ``ImportError`` where scikit-learn, rdata, h5py or
    pyarrow is missing.
    """
    if dataset in NAMES:
        if label_column is not None:
            raise DataError(f"--dataset {dataset}: has its own labels, so --label-column must not be given")
        rows = _named(dataset, seed, None if data_dir is None else Path(data_dir), fetch)
        return rows if like is None else _beside(dataset, rows, like)
    path = Path(dataset)
    if not path.is_file():
        raise FileNotFoundError(
            f"--dataset {dataset}: neither a known data set ({', '.join(NAMES)}) nor an existing file"
        )
    rows = read_file(path, label_column)
    if like is not None:
        # A file beside training rows is a test part itself, whatever lies beside it.
        return _levelled(dataset, _beside(dataset, replace(rows, part=None), like), like.levels or 0)
    return _levelled(dataset, rows, levels)


def _named(name: str, seed: int, data_dir: Path | None, fetch: bool) -> Rows:
    if name in TARGETS:
        target = TARGETS[name]()
        drawn = target.sample(TARGET_ROWS, torch.Generator().manual_seed(seed))
        return Rows(name, drawn.float(), target=target, source=f"drawn with seed {seed}")
    if name in data_packages.DATASETS:
        return data_packages.load(name, data_dir, fetch=fetch)
    if name in data_published.DATASETS:
        return data_published.load(name, data_dir)
    return _scikit(name)


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


def _levelled(path: str, rows: Rows, levels: int | None) -> Rows:
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
    if levels > EXACT_LEVELS:
        raise DataError(f"{path}: {levels} levels are more than the {EXACT_LEVELS} that float32 tells apart")
    if not whole or low < 0 or high >= levels:
        found = f"numbers from {low:g} to {high:g}" if whole else "numbers that are no integers"
        raise DataError(
            f"{path}: must hold integers from 0 to {levels - 1} for {levels} levels, holds {found}"
        )
    return replace(rows, levels=levels)


def _beside(path: str, rows: Rows, like: Rows) -> Rows:
    """The rows with their labels numbered as those of ``like``."""
    if rows.features != like.features:
        raise DataError(f"{path}: has {rows.features} features, and {like.name} {like.features}")
    if rows.labels is None or like.labels is None:
        return rows
    if like.label_names is None or rows.label_names is None:
        if rows.classes > like.classes:
            raise DataError(f"{path}: has the label {rows.classes - 1}, which {like.name} has not")
        return rows
    known = {name: number for number, name in enumerate(like.label_names)}
    new = [name for name in rows.label_names if name not in known]
    if new:
        raise DataError(f"{path}: has the label {new[0]!r}, which {like.name} has not")
    numbers = torch.tensor([known[name] for name in rows.label_names])
    return replace(rows, labels=numbers[rows.labels], label_names=like.label_names)
