"""The order of a data set's rows, from a file beside it, for copies of which some times are unknown.

``order/NAME-order.npz`` has two arrays, a number for each row of the ratings file: ``position``, a whole
number, the row's place among its user's in order of time, from 0; and ``known``, bool, whether the time is
known. What else is in the file is not read: estimates of times are no times.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lunet_fast.recsys.data.errors import RatingFileError
from lunet_fast.recsys.data.order import tied_positions
from lunet_fast.recsys.data.ratings import Ratings


def order_file_beside(source: str, name: str) -> Path | None:
    """The order file of the data set ``name`` that was read from the file ``source``, or None."""
    folder = Path(source).parent
    places = (folder / "order", folder, folder / name / "order", folder.parent / "order")
    return next((f for place in places if (f := place / f"{name}-order.npz").is_file()), None)


def read_positions(path: Path, ratings: Ratings) -> Tensor:
    """``Ratings.position``, int64 ``[N]``, of the rows of ``ratings``, which are those of the whole file.

    ``RatingFileError`` where the file is damaged or is not of these ratings: where another number of rows or
    other times are known, the places of a user are not 0, 1, ..., or known times are not in their order.
    Nothing is unpickled, and no more is allocated than N rows take.
    """
    try:
        position = _array(path, "position", len(ratings), "iu").astype(np.int64)
        known = _array(path, "known", len(ratings), "b")
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, NotImplementedError) as error:
        raise RatingFileError(f"{path}: no order of {ratings.name} ({error})") from error
    user = ratings.user.numpy()
    time = np.zeros(len(user), np.int64) if ratings.timestamp is None else ratings.timestamp.numpy()
    if not np.array_equal(known, time != 0):
        row = int(np.flatnonzero(known != (time != 0))[0])
        raise RatingFileError(
            f"{path}: is of another copy of {ratings.name}: in row {row} (from 0) the time is known in one "
            "of them alone"
        )
    order = np.lexsort((position, user))
    first = np.searchsorted(user[order], user[order])
    if not np.array_equal(position[order], np.arange(len(user)) - first):
        raise RatingFileError(f"{path}: position is not 0, 1, ... for the rows of each user")
    rows = order[known[order]]
    if bool(((np.diff(time[rows]) < 0) & (np.diff(user[rows]) == 0)).any()):
        raise RatingFileError(f"{path}: position is not in the order of the times of {ratings.name}")
    return torch.from_numpy(tied_positions(user, position, time))


def _array(path: Path, name: str, rows: int, kinds: str) -> npt.NDArray[np.generic]:
    """One array of an npz file, ``[rows]`` of a dtype whose kind is among ``kinds``."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        most = 8 * rows + 4096
        with archive.open(member) as stream:
            data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{name} is larger than {rows} numbers")
    stream_of_data = io.BytesIO(data)
    version = np.lib.format.read_magic(stream_of_data)
    if version != (1, 0):
        raise ValueError(f"{name} is of version {version} of the format npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream_of_data)
    if shape != (rows,) or dtype.kind not in kinds:
        raise ValueError(f"{name} is {dtype} {list(shape)}, expected {rows} numbers")
    return np.frombuffer(data, dtype, rows, stream_of_data.tell())
