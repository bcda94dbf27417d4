"""What came before what: the order of each user's ratings, which splits and sequences are made by.

A rating is placed by its second. Where seconds are unknown (0), ``Ratings.position`` may still say what came
before what; without it, what is unknown is older than all that is known. Ratings of one second tie,
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
ELAPSED = (0, 0, 0, 1, 2, 3, 0)
"""What a request says of the time since a user's last rating, by the class of gaps: within an hour or
unknown, within a day, within 30 days, or longer. Nothing finer: a held-out rating is its own request, and
that it was given in the same second as the one before is known afterwards alone."""
ELAPSED_CLASSES = 4
GAP_NAMES = ("same second", "up to a minute", "up to an hour", "up to a day", "over a day")
"""What results by class are called; those of more than a day, which few users are in, are one."""


def time_keys(ratings: Ratings) -> tuple[Int64Array, Int64Array]:
    """Two keys ``[N]``, the more important one first: a user's rows are in order of time by both.

    Rows with equal keys tie. The second key puts rows of known time after others at the same place, so the
    latest rating of a user is one whose second is known, if any such is of the last second.
    """
    n = len(ratings)
    time = np.zeros(n, dtype=np.int64) if ratings.timestamp is None else ratings.timestamp.cpu().numpy()
    known = time != 0
    if ratings.position is not None:
        return ratings.position.cpu().numpy(), known.astype(np.int64)
    # A time before 1970 is negative, and comes after unknown ones all the same.
    return np.where(known, time, np.iinfo(np.int64).min), known.astype(np.int64)


def tied_positions(user: Int64Array, position: Int64Array, time: Int64Array) -> Int64Array:
    """``position`` ``[N]``, 0, 1, ... in order of time for the rows of each user, equal where a second is.

    ``time`` is 0 where unknown. Such a row is of a known second where that is the one before it and the one
    after it, or where no known one follows it, and otherwise of a second of its own. O(N log N).
    """
    order = np.lexsort((position, user))
    user, place, time = user[order], position[order], time[order]
    before, after = _filled(time, user), _filled(time[::-1], user[::-1])[::-1]
    pinned = (before != 0) & ((before == after) | (after == 0))
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (user[1:] != user[:-1]) | (before[1:] != before[:-1]) | ~pinned[1:] | ~pinned[:-1]
    first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    tied = np.empty_like(place)
    tied[order] = place[first]
    return tied


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
    place, known = time_keys(ratings)
    order: Int64Array = np.lexsort((draw, known, place, user))
    return order


def gaps_since(before: Ratings, latest: Ratings) -> npt.NDArray[np.uint8]:
    """The class of the time since a user's last rating in ``before``, uint8 ``[H]``, of rows that follow it.

    ``latest`` has at most one row of a user, of the same ids, and none is older than those in ``before``: one
    that ties with any is of the class of the same second. O(N log N).
    """
    parts = (before, latest)
    user = np.concatenate([part.user.cpu().numpy() for part in parts])
    keys = [time_keys(part) for part in parts]
    place, known = (np.concatenate([key[n] for key in keys]) for n in (0, 1))
    time = np.concatenate(
        [np.zeros(len(p), np.int64) if p.timestamp is None else p.timestamp.cpu().numpy() for p in parts]
    )
    order = np.lexsort((np.arange(len(user)) >= len(before), known, place, user))
    found = np.empty(len(user), dtype=np.uint8)
    found[order] = gap_classes(user[order], time[order])
    return found[len(before) :]


def gap_classes(user: Int64Array, time: Int64Array) -> npt.NDArray[np.uint8]:
    """The class of the time since the user's rating before, uint8 ``[N]``, of rows in order of time.

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
