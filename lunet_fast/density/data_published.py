"""POWER, GAS, HEPMASS, MINIBOONE and BSDS300 from a user's own files, as the published tables have them.

The files and their preprocessing are those of G. Papamakarios, T. Pavlakou and I. Murray, "Masked
Autoregressive Flow for Density Estimation" (https://github.com/gpapamak/maf, ``datasets``), which later
papers took over: the same rows for training, validation and test, the same columns left out, the same noise
and standardisation, quirks included (GAS is standardised by all rows, those of the test too). Likelihoods are
in nats, of the standardised rows; of BSDS300, of the patches as they are.

Where ``DIR/train.npy``, ``DIR/val.npy`` and ``DIR/test.npy`` are, these are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lunet_fast.density.data_files import check_finite, read_npy
from lunet_fast.density.data_limits import DataError, brief, check_size, digest
from lunet_fast.density.data_parquet import read_parquet
from lunet_fast.density.data_rows import TEST, TRAINING, VALIDATION, Rows
from lunet_fast.density.data_text import numbers, read_text

Array = npt.NDArray[Any]
Arrays = tuple[Array, Array, Array]
"""Training, validation and test rows [N, D]."""

_VALIDATION_NAMES = ("val.npy", "validation.npy", "valid.npy")
_GAS_SENSORS = 16


@dataclass(frozen=True)
class Published:
    """A data set, the sizes of its parts, and test log-likelihoods in nats from papers."""

    files: tuple[str, ...]
    """Any of these groups, joined by " and ", in a folder of this name or in the one given."""
    read: Callable[[Path], Arrays]
    features: int
    rows: tuple[int, int, int]
    figures: dict[str, float] = field(default_factory=dict)


def load(name: str, data_dir: Path | None) -> Rows:
    """A data set of :data:`DATASETS` from the user's files in ``data_dir``, or a folder of its name there.

    Raises ``FileNotFoundError`` where they are not there, which says what to put where, and
    :class:`DataError` for files that cannot be used.
    """
    spec = DATASETS[name]
    wanted = "; or ".join((*spec.files, "train.npy and val.npy and test.npy"))
    if data_dir is None:
        raise FileNotFoundError(
            f"--dataset {name}: its files are not fetched: name their folder with --data-dir DIR, which "
            f"holds {wanted}, in the layout of https://github.com/gpapamak/maf"
        )
    if not data_dir.is_dir():
        raise FileNotFoundError(f"--data-dir {data_dir}: is no folder; it must hold {wanted}")
    folders = [data_dir / own for own in (name, name.upper(), name.lower()) if (data_dir / own).is_dir()]
    for folder in (*folders, data_dir):
        split = _split_files(folder)
        if split is not None:
            return _rows(name, spec, _read_split(split), split)
        for group in spec.files:
            files = [folder / file for file in group.split(" and ")]
            if all(file.is_file() for file in files):
                return _rows(name, spec, spec.read(files[0]), files)
    pickled = [folder for folder in (*folders, data_dir) if (folder / "ethylene_CO.pickle").is_file()]
    if name == "gas" and pickled:
        raise DataError(
            f"{pickled[0] / 'ethylene_CO.pickle'}: a pickle may run any program and is not read: convert it, "
            'if you trust it, by  python -c "import pandas; '
            "pandas.read_pickle('ethylene_CO.pickle').to_parquet('ethylene_CO.parquet')\""
        )
    raise FileNotFoundError(f"--data-dir {data_dir}: holds no {name}; put there {wanted}")


def told_of_sizes(name: str, rows: Rows) -> str:
    """ "" where the rows are as many as the published figures were measured on, else what differs."""
    spec = DATASETS[name]
    assert rows.part is not None
    found = tuple(int((rows.part == part).sum()) for part in (TRAINING, VALIDATION, TEST))
    if found == spec.rows and rows.features == spec.features:
        return ""
    shown, wanted = (" + ".join(f"{count:,}" for count in counts) for counts in (found, spec.rows))
    return (
        f"{name}: {shown} rows of {rows.features} features, and the published figures are of {wanted} rows "
        f"of {spec.features}: not the same data"
    )


def _rows(name: str, spec: Published, parts: Arrays, files: list[Path]) -> Rows:
    widths = {part.shape[1] for part in parts}
    if len(widths) != 1 or not all(len(part) for part in parts):
        shapes = ", ".join(str(part.shape) for part in parts)
        raise DataError(
            f"{files[0]}: the parts must have rows of as many features, they have shapes {shapes}"
        )
    marks = (TRAINING, VALIDATION, TEST)
    part = torch.cat(
        [torch.full((len(p),), mark, dtype=torch.int8) for p, mark in zip(parts, marks, strict=True)]
    )
    values = np.concatenate([np.asarray(p, np.float32) for p in parts])
    check_finite(files[0], values)
    source = "; ".join(digest(file) for file in files)
    return Rows(name, torch.from_numpy(values), source=source, part=part)


def _split_files(folder: Path) -> list[Path] | None:
    for middle in _VALIDATION_NAMES:
        files = [folder / "train.npy", folder / middle, folder / "test.npy"]
        if all(file.is_file() for file in files):
            return files
    return None


def _read_split(files: list[Path]) -> Arrays:
    first, second, third = (read_npy(file) for file in files)
    return first, second, third


# The preprocessing of each ----------------------------------------------------------------------------------


def _last_tenths(data: Array) -> Arrays:
    """The last tenth for the test, the last tenth of the rest for validation."""
    held = int(0.1 * len(data))
    rest, test = data[: len(data) - held], data[len(data) - held :]
    held = int(0.1 * len(rest))
    return rest[: len(rest) - held], rest[len(rest) - held :], test


def _standardised(path: Path, parts: Arrays) -> Arrays:
    """By mean and standard deviation of the rows for training and validation together."""
    known = np.concatenate(parts[:2])
    shift, scale = known.mean(0), known.std(0)
    _check_spread(path, scale)
    training, validation, test = ((part - shift) / scale for part in parts)
    return training, validation, test


def _check_spread(path: Path, scale: Array) -> None:
    flat = np.flatnonzero(~(scale > 0))
    if len(flat):
        raise DataError(
            f"{path}: column {flat[0]} (from 0, of those kept) is constant: not the published file"
        )


def _wide(path: Path, data: Array, *widths: int) -> None:
    if data.shape[1] not in widths:
        raise DataError(
            f"{path}: has {data.shape[1]} columns, expected {' or '.join(map(str, widths))}: not the "
            "published file"
        )


def _power(path: Path) -> Arrays:
    """Seven columns and the time: shuffled, two left out, and each number jittered within its last digit."""
    data = read_npy(path, np.float64)
    _wide(path, data, 8)
    generator = np.random.RandomState(42)  # what the published rows are drawn with
    generator.shuffle(data)
    data = np.delete(data, [1, 3], axis=1)
    rows = len(data)
    voltage, active = 0.01 * generator.rand(rows, 1), 0.001 * generator.rand(rows, 1)
    meters = generator.rand(rows, 3)
    data += np.hstack([active, voltage, meters, np.zeros((rows, 1))])
    return _standardised(path, _last_tenths(data))


def _gas(path: Path) -> Arrays:
    """Sixteen sensors after time and two concentrations; of sensors that follow each other one is kept."""
    if path.suffix == ".npy":
        data = read_npy(path, np.float64)
    else:
        data = _table_values(path)
    _wide(path, data, _GAS_SENSORS, _GAS_SENSORS + 3)
    data = data[:, -_GAS_SENSORS:]
    _check_spread(path, data.std(0))
    kept = list(range(_GAS_SENSORS))
    related = np.corrcoef(data, rowvar=False) > 0.98
    while len(first := [k for k in kept if related[k, kept].sum() > 1]):
        kept.remove(first[0])
    data = data[:, kept]
    return _last_tenths((data - data.mean(0)) / data.std(0, ddof=1))


def _table_values(path: Path) -> Array:
    if path.suffix == ".parquet":
        return read_parquet(path, None)[0].astype(np.float64)
    text = read_text(path)
    return numbers(path, text, range(len(text.names)), np.float64)


_HEPMASS_COLUMNS = 28


def _hepmass(path: Path) -> Arrays:
    """Signal rows of both files; columns whose least value comes more than five times are left out.

    The test file has one column more, which no other has.
    """
    training, test = (_signal(file) for file in (path, path.with_name("1000_test.csv")))
    shift, scale = training.mean(0), training.std(0, ddof=1)
    _check_spread(path, scale)
    training, test = (training - shift) / scale, (test - shift) / scale
    kept = (training == training.min(0)).sum(0) <= 5
    training, test = training[:, kept], test[:, kept]
    held = int(0.1 * len(training))
    return training[: len(training) - held], training[len(training) - held :], test


def _signal(path: Path) -> Array:
    """The features of the rows whose first column, the label, is 1."""
    text = read_text(path, width_may_differ=True)
    if not _HEPMASS_COLUMNS <= text.width <= _HEPMASS_COLUMNS + 1:
        raise DataError(
            f"{path}: has {text.width} columns, expected {_HEPMASS_COLUMNS}, or one more: not the "
            "published file"
        )
    data = numbers(path, text, range(_HEPMASS_COLUMNS), np.float64)
    data = data[data[:, 0] == 1, 1:]
    if len(data) < 20:
        raise DataError(f"{path}: has {len(data)} rows with 1 in its first column: not the published file")
    return data


def _miniboone(path: Path) -> Arrays:
    """Cleaned already when it was saved."""
    return _standardised(path, _last_tenths(read_npy(path, np.float64)))


def _bsds300(path: Path) -> Arrays:
    """8 x 8 patches without their mean and last pixel: three arrays of an HDF5 file, taken as they are."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path}: reading HDF5 needs h5py: pip install 'lunet-fast[density]'") from error
    try:
        with h5py.File(path, "r") as file:
            first, second, third = (_h5_array(path, file, k) for k in ("train", "validation", "test"))
    except DataError:
        raise
    except Exception as error:  # of h5py, by what is damaged
        raise DataError(f"{path}: the HDF5 file is damaged or cut short ({brief(error)})") from error
    return first, second, third


def _h5_array(path: Path, file: Any, name: str) -> Array:
    import h5py

    # A link to another file, or storage in one, would read what the user did not name.
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise DataError(f"{path}: has no array {name!r} of its own")
    found = file[name]
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise DataError(f"{path}: {name!r} is no array in this file")
    if len(found.shape) != 2 or found.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: {name!r} holds {found.dtype} of shape {found.shape}, not numbers [rows, features]"
        )
    check_size(path, found.size * max(4, found.dtype.itemsize), f"holds in {name!r} numbers of")
    return np.asarray(found[()], np.float32)


def _figures(column: int) -> dict[str, float]:
    return {model: values[column] for model, values in _TABLE.items()}


#: Test log-likelihoods, nats: POWER, GAS, HEPMASS, MINIBOONE, BSDS300. From C. Durkan et al., "Neural Spline
#: Flows", arXiv 1906.04032, and W. Grathwohl et al., "FFJORD", arXiv 1810.01367.
_TABLE = {
    "RQ-NSF, coupling": (0.64, 13.09, -14.75, -9.67, 157.54),
    "RQ-NSF, autoregressive": (0.66, 13.09, -14.01, -9.22, 157.31),
    "FFJORD": (0.46, 8.59, -14.92, -10.43, 157.40),
    "MAF": (0.45, 12.35, -17.03, -10.92, 156.95),
    "RealNVP": (0.17, 8.33, -18.71, -13.55, 153.28),
}

DATASETS = {
    "power": Published(("data.npy",), _power, 6, (1_659_917, 184_435, 204_928), _figures(0)),
    "gas": Published(
        ("ethylene_CO.npy", "ethylene_CO.parquet", "ethylene_CO.csv"),
        _gas,
        8,
        (852_174, 94_685, 105_206),
        _figures(1),
    ),
    "hepmass": Published(
        ("1000_train.csv and 1000_test.csv",), _hepmass, 21, (315_123, 35_013, 174_987), _figures(2)
    ),
    "miniboone": Published(("data.npy",), _miniboone, 43, (29_556, 3_284, 3_648), _figures(3)),
    "bsds300": Published(("BSDS300.hdf5",), _bsds300, 63, (1_000_000, 50_000, 250_000), _figures(4)),
}
