"""The order of ratings in time, and the file that says it of copies whose times are incomplete."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast.recsys.data.errors import RatingFileError
from lunet_fast.recsys.data.order import GAPS, by_time, gap_classes, gaps_since, tied_positions
from lunet_fast.recsys.data.order_file import order_file_beside, read_positions
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.data.splits import leave_one_out

UNKNOWN = GAPS - 1


def timed(times: list[int], positions: list[int] | None = None, user: list[int] | None = None) -> Ratings:
    frame = pd.DataFrame({"user": user or [0] * len(times), "item": range(len(times)), "rating": 3.0})
    frame["timestamp"] = times
    ratings = from_frame(frame, scale=(1, 5), name="timed")
    return replace(ratings, position=None if positions is None else torch.tensor(positions))


def test_users_one_after_the_other_each_by_time() -> None:
    ratings = timed([30, 10, 20, 5, 7], user=[0, 0, 0, 1, 1])
    assert by_time(ratings, 0).tolist() == [1, 2, 0, 3, 4]


def test_unknown_times_are_the_oldest_without_a_position() -> None:
    assert by_time(timed([30, 0, 20]), 0).tolist() == [1, 2, 0]


def test_positions_place_unknown_times() -> None:
    ratings = timed([30, 0, 20, 0, 10], positions=[4, 3, 2, 1, 0])
    assert by_time(ratings, 0).tolist() == [4, 3, 2, 1, 0]
    rest = ratings.select(leave_one_out(ratings, 0).train)
    assert rest.item[leave_one_out(rest, 0).held_out].tolist() == [1], "the second latest has no time"


def test_places_that_tie() -> None:
    user = np.zeros(7, dtype=np.int64)
    time = np.array([0, 10, 0, 10, 0, 20, 0])
    assert tied_positions(user, np.arange(7), time).tolist() == [0, 1, 1, 1, 4, 5, 5]
    ratings = timed(time.tolist(), tied_positions(user, np.arange(7), time).tolist())
    assert ratings.item[leave_one_out(ratings, 0).held_out].tolist() == [5], "the latest has a known time"


def test_ties_are_drawn_whatever_the_order_of_the_rows() -> None:
    ratings = timed([5] * 40)
    shuffled = ratings.select(torch.randperm(40))
    orders = [part.item[torch.from_numpy(by_time(part, 3))].tolist() for part in (ratings, shuffled)]
    assert orders[0] == orders[1]
    assert orders[0] != ratings.item[torch.from_numpy(by_time(ratings, 4))].tolist()
    assert orders[0] != sorted(orders[0])


def test_gaps_since_the_last_in_training() -> None:
    day = 86_400
    ratings = timed([day, 2 * day, 100, 100, 0, 50, 7], user=[0, 0, 1, 1, 2, 2, 3])
    before, latest = ratings.select([0, 2, 4]), ratings.select([3, 6, 1, 5])
    # One that ties, one without any before, a day after, and one after an unknown time.
    assert gaps_since(before, latest).tolist() == [0, UNKNOWN, 3, UNKNOWN]
    turned = gaps_since(before, latest.select([2, 3, 1, 0]))
    assert turned.tolist() == [3, UNKNOWN, UNKNOWN, 0]


def test_classes_of_gaps() -> None:
    hour = 3600
    time = np.array([100, 100, 110, 110 + hour, 0, 110 + hour, 200_000_000, 0, 200_000_100])
    user = np.zeros(len(time), dtype=np.int64)
    found = gap_classes(user, time).tolist()
    assert found == [UNKNOWN, 0, 1, 2, UNKNOWN, 0, 5, UNKNOWN, UNKNOWN]
    assert gap_classes(np.array([0, 1]), np.array([100, 100])).tolist() == [UNKNOWN, UNKNOWN]


def test_a_gap_does_not_depend_on_what_follows() -> None:
    time = np.array([100, 0, 300, 400, 0, 500])
    user = np.zeros(6, dtype=np.int64)
    whole = gap_classes(user, time)
    for end in range(1, 6):
        assert gap_classes(user[:end], time[:end]).tolist() == whole[:end].tolist()


# The file --------------------------------------------------------------------------------------------------


def write(path: Path, **arrays: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: np.asarray(array) for name, array in arrays.items()})
    return path


def test_the_file_beside_the_data(tmp_path: Path) -> None:
    file = write(tmp_path / "order" / "ml-1m-order.npz", position=np.array([0]), known=np.array([True]))
    assert order_file_beside(str(tmp_path / "ml-1m.zip"), "ml-1m") == file
    assert order_file_beside(str(tmp_path / "ml-1m.zip"), "ml-100k") is None


def test_positions_are_read_and_no_estimate_is(tmp_path: Path) -> None:
    ratings = timed([0, 20, 10])
    known = np.array([False, True, True])
    file = write(tmp_path / "o.npz", position=np.array([1, 2, 0], np.int16), known=known, time=[15, 20, 10])
    assert read_positions(file, ratings).tolist() == [1, 2, 0]
    assert ratings.timestamp is not None
    assert ratings.timestamp.tolist() == [0, 20, 10]


@pytest.mark.parametrize(
    ("position", "known", "message"),
    [
        ([1, 2], [False, True], "expected 3 numbers"),
        ([1.0, 2.0, 0.0], [False, True, True], "expected 3 numbers"),
        ([1, 2, 0], [True, True, True], "of another copy"),
        ([1, 3, 0], [False, True, True], "not 0, 1, ..."),
        ([1, 0, 2], [False, True, True], "not in the order of the times"),
        ([-1, 2, 0], [False, True, True], "not 0, 1, ..."),
    ],
)
def test_a_file_of_other_ratings(tmp_path: Path, position: list, known: list, message: str) -> None:
    file = write(tmp_path / "o.npz", position=position, known=known)
    with pytest.raises(RatingFileError, match=message):
        read_positions(file, timed([0, 20, 10]))


def test_damaged_and_hostile_files(tmp_path: Path) -> None:
    file, ratings = tmp_path / "o.npz", timed([0, 20, 10])
    for content in (b"", b"PK\x03\x04", np.array([object()], dtype=object).dumps()):
        file.write_bytes(content)
        with pytest.raises(RatingFileError, match="no order of timed"):
            read_positions(file, ratings)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    for data in (header.getvalue(), bytes(10**6), b"\x93NUMPY\x09\x00"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("position.npy", data)
        with pytest.raises(RatingFileError, match="no order of timed"):
            read_positions(file, ratings)
