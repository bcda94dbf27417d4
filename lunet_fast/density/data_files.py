"""Rows of a file: ``.npy``, ``.csv``, ``.tsv``, ``.parquet``, and images as IDX.

Headers are only claims: sizes are compared with the file, and with what is read on this machine, before
anything is allocated.
"""

from __future__ import annotations

import hashlib
import math
import struct
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lunet_fast.density.data_limits import (
    DataError,
    brief,
    check_size,
    digest,
    read_bytes,
    unpacked,
)
from lunet_fast.density.data_rows import TEST, TRAINING, Rows
from lunet_fast.density.data_text import column_place, numbers, read_text

TABLES = (".csv", ".tsv", ".parquet")

MOST_CLASSES = 1000
"""Of a column of labels; more are a sign of ids, or of numbers."""

#: SHA-256 of the unpacked content of files (github.com/zalandoresearch/fashion-mnist, and MNIST's) → what
#: they are. However they were packed, it is the same.
PUBLISHED = {
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db": "MNIST, training images",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5": "MNIST, training labels",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7": "MNIST, test images",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2": "MNIST, test labels",
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888": "Fashion-MNIST, training images",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9": "Fashion-MNIST, training labels",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b": "Fashion-MNIST, test images",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34": "Fashion-MNIST, test labels",
}


def read_file(path: Path, label_column: str | None = None) -> Rows:
    """The rows of a file, as integers with levels only if it is one of images.

    Raises :class:`DataError` for a file that is damaged or holds anything but finite numbers,
    ``ImportError`` where pyarrow is missing.
    """
    if path.suffix in TABLES:
        rows = _table(path, label_column)
    elif label_column is not None:
        raise DataError(f"{path}: has no columns with names, so that --label-column names none")
    elif path.suffix == ".npy":
        rows = Rows(path.stem, torch.from_numpy(read_npy(path)), source=digest(path))
    elif "idx3" in path.name:
        rows = _idx_images(path)
    else:
        raise DataError(
            f"{path}: give a .npy, .csv, .tsv or .parquet file, or images as IDX, with idx3 in the name"
        )
    if rows.values.numel() == 0:
        raise DataError(f"{path}: is empty, shape {tuple(rows.values.shape)}")
    return rows


# Arrays -----------------------------------------------------------------------------------------------------


def read_npy(path: Path, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """[N, D] finite numbers of a ``.npy`` file, as ``dtype``. Nothing is unpickled."""
    with path.open("rb") as stream:
        start = stream.read(6)
    if start[:4] == b"PK\x03\x04":
        raise DataError(f"{path}: is an archive (.npz): save one array of it with numpy.save")
    if start != b"\x93NUMPY":
        raise DataError(f"{path}: is no .npy file: it begins with {start.hex() or 'nothing'}")
    shape, kind, offset = _npy_header(path)
    if kind.hasobject:
        raise DataError(
            f"{path}: holds Python objects, which are not read, as they may run any program: save numbers"
        )
    real = np.issubdtype(kind, np.number) and not np.issubdtype(kind, np.complexfloating)
    if len(shape) != 2 or min(shape) < 0 or not real:
        raise DataError(f"{path}: holds {kind} of shape {shape}, not numbers [rows, features]")
    # In Python's integers, which do not overflow.
    stated, found = math.prod(shape) * kind.itemsize, path.stat().st_size - offset
    if stated != found:
        raise DataError(f"{path}: its header states {stated:,} bytes of numbers, and it has {found:,}")
    check_size(path, math.prod(shape) * max(kind.itemsize, np.dtype(dtype).itemsize), "holds numbers of")
    if not math.prod(shape):
        return np.empty(shape, dtype)
    try:
        with np.errstate(over="ignore"):
            values = np.array(np.load(path, mmap_mode="r", allow_pickle=False), dtype=dtype, order="C")
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: {brief(error)}") from error
    check_finite(path, values)
    return values


def _npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """(shape, type, where the numbers start) as a ``.npy`` file states them."""
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers by Python 2
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read is None:
                raise ValueError(f"version {version} of the format is not read")
            shape, _, kind = read(stream)
            return shape, kind, stream.tell()
    except Exception as error:  # of ast, struct and NumPy, by what the header holds
        raise DataError(f"{path}: its header is damaged ({brief(error)})") from error


def check_finite(path: Path, values: npt.NDArray[Any]) -> None:
    """DataError for the first number [N, D] that is NaN or infinite."""
    for first in range(0, len(values), 1 << 16):
        bad = np.argwhere(~np.isfinite(values[first : first + (1 << 16)]))
        if len(bad):
            row, column = int(bad[0][0]) + first, int(bad[0][1])
            raise DataError(
                f"{path}: row {row}, column {column} (from 0) is {values[row, column]}: leave such rows out, "
                "and save numbers that fit into 32 bits"
            )


# Tables -----------------------------------------------------------------------------------------------------


def _table(path: Path, label_column: str | None) -> Rows:
    if path.suffix == ".parquet":
        from lunet_fast.density.data_parquet import read_parquet

        values, texts = read_parquet(path, label_column)
        places: Any = range(1, len(values) + 1)
        unit = "row"
    else:
        text = read_text(path)
        place = None if label_column is None else column_place(path, text.names, label_column)
        values = numbers(path, text, [k for k in range(len(text.names)) if k != place])
        texts = None if place is None else [str(cell).strip() for cell in text.frame([place], str)[place]]
        places, unit = text.lines, "line"
    labels, names = None, None
    if texts is not None:
        if "" in texts:
            where = f"{unit} {places[texts.index('')]}"
            raise DataError(f"{path}, {where}: column {brief(label_column)!r} is empty: leave such rows out")
        labels, names = numbered(path, texts)
    return Rows(path.stem, torch.from_numpy(values), labels, source=digest(path), label_names=names)


def numbered(path: Path, texts: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """(labels [N] from 0 on, their names): in the order of numbers where all are, else of the alphabet."""
    found = set(texts)
    if len(found) > MOST_CLASSES:
        raise DataError(
            f"{path}: the label column holds {len(found):,} different values, more than {MOST_CLASSES:,}: "
            "name a column of classes"
        )
    whole = all(name.lstrip("-").isascii() and name.lstrip("-").isdigit() for name in found)
    # int() of a text of thousands of digits takes long, and of more it raises.
    names = sorted(found, key=int) if whole and max(map(len, found)) < 20 else sorted(found)
    number = {name: place for place, name in enumerate(names)}
    return torch.tensor([number[text] for text in texts]), tuple(names)


# Images -----------------------------------------------------------------------------------------------------


def _idx_images(path: Path) -> Rows:
    """Images, with the test images that lie beside those for training, as MNIST's do."""
    rows = idx_part(path)
    beside = path.with_name(path.name.replace("train-", "t10k-", 1))
    if beside == path or not beside.is_file():
        return rows
    test = idx_part(beside)
    if test.image != rows.image:
        raise DataError(f"{beside}: has images of {test.image} pixels, and {path.name} of {rows.image}")
    if (test.labels is None) != (rows.labels is None):
        raise DataError(f"{beside}: {path.name} and it must both have labels beside them, or neither")
    return with_test(rows, test)


def with_test(rows: Rows, test: Rows) -> Rows:
    """Both as one, each row in its part."""
    part = torch.full((len(rows) + len(test),), TRAINING, dtype=torch.int8)
    part[len(rows) :] = TEST
    labels = None
    if rows.labels is not None and test.labels is not None:
        labels = torch.cat([rows.labels, test.labels])
    values, source = torch.cat([rows.values, test.values]), f"{rows.source}; test: {test.source}"
    return replace(rows, values=values, labels=labels, part=part, source=source)


def idx_part(path: Path) -> Rows:
    """The images of one IDX file, and the labels in the file beside it, if there is one."""
    data = unpacked(path, read_bytes(path))
    count, height, width = _idx_sizes(path, data, 3)
    check_size(path, 4 * count * height * width, "holds numbers of")
    if not height * width:
        raise DataError(f"{path}: is empty, images of {height} x {width} pixels")
    # copied: from_numpy wants memory that may be written
    pixels = np.frombuffer(data, np.uint8, offset=16).reshape(count, height * width).astype(np.float32)
    source, labels = _content(path, data), None
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside != path and beside.is_file():
        marks = unpacked(beside, read_bytes(beside))
        (of_labels,) = _idx_sizes(beside, marks, 1)
        if of_labels != count:
            raise DataError(f"{beside}: has {of_labels} labels, and {path.name} {count} images")
        labels = torch.from_numpy(np.frombuffer(marks, np.uint8, offset=8).astype(np.int64))
        source += f"; {_content(beside, marks)}"
    name = path.name.split("-")[0] if "-" in path.name else path.stem
    return Rows(name, torch.from_numpy(pixels), labels, 256, (height, width), source=source)


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


def _content(path: Path, data: bytes) -> str:
    """What a file is, for the results: SHA-256 of what it unpacks to, and its name if it is published."""
    found = hashlib.sha256(data).hexdigest()
    name = path.name.removesuffix(".gz")
    return f"{name}, SHA-256 {found}" + (f" ({PUBLISHED[found]})" if found in PUBLISHED else "")
