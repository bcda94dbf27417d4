"""What came before what: the order of each user's ratings, which splits and sequences are made by.

A rating is placed by its second. Where the second is unknown (0), ``Ratings.position`` may still say which
ratings it stands between; where nothing does, it is older than every known one. Ratings of one second tie,
and nothing here or in a file says which of them was first: whoever needs a first one draws it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lunet_fast.recsys.data.ids import Int64Array
from lunet_fast.recsys.data.ratings import Ratings

GAP_SECONDS = (1, 61, 3601, 86_401, 30 * 86_400)
"""Where the classes of time between a user's ratings begin: the same second, a minute, an hour, a day, 30
days, more."""
GAPS = len(GAP_SECONDS) + 2
"""Classes of time since the rating before: those of GAP_SECONDS, and the last one, unknown."""


def time_keys(ratings: Ratings) -> tuple[Int64Array, Int64Array]:
    """Two keys ``[N]``, the more important one first: a user's rows are in order of time by both.

    Rows with equal keys tie. An unknown row counts as of a known second where that is the one before and the
    one after it, or where no known one follows; it comes before the rows known to be of that second, so the
    latest rating of a user is one whose second is known, if any is. O(N log N).
    """
    n = len(ratings)
    time = np.zeros(n, dtype=np.int64) if ratings.timestamp is None else ratings.timestamp.cpu().numpy()
    known = time != 0
    if ratings.position is None:
        return time, known.astype(np.int64)
    user, position = ratings.user.cpu().numpy(), ratings.position.cpu().numpy()
    order = np.lexsort((position, user))
    before = _filled(time[order], user[order])
    after = _filled(time[order][::-1], user[order][::-1])[::-1]
    second, place = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    second[order] = before
    place[order] = np.where((before == after) | (after == 0), 0, 2 + position[order])
    place[known] = 1
    place[second == 0] = position[second == 0]
    return second, place


def _filled(time: Int64Array, user: Int64Array) -> Int64Array:
    """``time`` with each 0 replaced by the user's last known one before it; rows in order, 0 for none."""
    row = np.arange(len(time))
    last = np.maximum.accumulate(np.where(time != 0, row, -1))
    there = (last >= 0) & (user[last] == user)
    return np.where(there, time[last], 0)


def by_time(ratings: Ratings, seed: int) -> Int64Array:
    """Rows ``[N]`` by user, and of each user by time; those that tie in an order drawn by the seed.

    The draws, ``default_rng((seed, 5))``, go to the rows in the order of (user, item): they do not depend on
    the order of the rows.
    """
    user, item = ratings.user.cpu().numpy(), ratings.item.cpu().numpy()
    draw = np.empty(len(user), dtype=np.int64)
    draw[np.lexsort((item, user))] = np.random.default_rng((seed, 5)).permutation(len(user))
    second, place = time_keys(ratings)
    order: Int64Array = np.lexsort((draw, place, second, second != 0, user))
    return order


def gap_classes(user: Int64Array, time: Int64Array) -> npt.NDArray[np.uint8]:
    """The class of the time since the user's rating before, uint8 ``[N]``, of rows that :func:`by_time` ordered.

    ``time`` is 0 where unknown. Only the past counts: a row's class does not depend on later rows. It is
    unknown for a user's first row, for a row of unknown time, and for one after such a row, whose gap has no
    lower bound, unless the last known time is of the same second.
    """
    before = np.zeros_like(time)
    before[1:] = _filled(time, user)[:-1]
    same = np.zeros(len(user), dtype=bool)
    same[1:] = user[1:] == user[:-1]
    passed = time - before
    exact = np.zeros(len(user), dtype=bool)
    exact[1:] = time[:-1] != 0
    there = same & (time != 0) & (before != 0) & (exact | (passed == 0))
    classes = np.where(there, np.digitize(passed, GAP_SECONDS), GAPS - 1)
    return classes.astype(np.uint8)
