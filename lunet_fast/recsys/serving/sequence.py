"""Recipe ``sequence`` as a person uses it: what a user is likely to choose next."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from lunet_fast.recsys.data.objects import is_table, items_frame
from lunet_fast.recsys.data.order import ELAPSED, GAP_SECONDS, gap_classes
from lunet_fast.recsys.data.ratings import from_frame
from lunet_fast.recsys.model.model_files import TrainedSequences
from lunet_fast.recsys.model.sequences import Windows
from lunet_fast.recsys.model.side import NO_SIDE
from lunet_fast.recsys.model.state_network import Items

Entry = tuple[Any, float | None, int]
"""The id of an item, its rating, None where there is none, and its time in seconds, 0 where unknown."""
USERS = 1024
"""Users that are scored at a time: bounds the memory of a recommendation, whatever the number of users."""


class SequenceServing:
    """A trained model of recipe ``sequence``, in the ids of one's own file."""

    def __init__(self, trained: TrainedSequences) -> None:
        self.trained, self._rated = trained, trained.rated()
        sequences = trained.model.sequences
        counts = torch.bincount(sequences.levels.long(), minlength=sequences.n_levels)
        self.usual_level = int(counts.argmax())
        """The class of ratings that most are of; counted once, for it takes as long as a session's answer."""
        with torch.no_grad():
            self.items: Items = trained.model.item_vectors()
        """All items, computed once for sessions."""

    def score(self, users: Any, items: Any) -> npt.NDArray[np.float32]:
        """As ``LUNetRecommender.score``: z·e_i + b_i, comparable within one user."""
        trained = self.trained
        user, item = trained.users.index(users), trained.items.index(items)
        if len(user) != len(item) and 1 not in (len(user), len(item)):
            raise ValueError(f"users has {len(user)} ids and items {len(item)}: give as many of each, or one")
        user, item = np.broadcast_arrays(user, item)
        each, row = np.unique(user, return_inverse=True)
        found = np.empty(len(user), dtype=np.float32)
        for start in range(0, len(each), USERS):
            scores = trained.model.score_users(torch.from_numpy(each[start : start + USERS]))
            inside = (row >= start) & (row < start + USERS)
            found[inside] = _of_items(scores[row[inside] - start], item[inside])
        return found

    def recommend(
        self,
        users: list[Any],
        k: int,
        exclude_seen: bool,
        items: Any,
        exclude: Any,
        at: int | None = None,
    ) -> pd.DataFrame:
        """As ``LUNetRecommender.recommend``, for ids in a list. Unseen items are left out."""
        trained, frames = self.trained, []
        model = trained.model
        index = torch.from_numpy(trained.users.index(users))
        for start in range(0, len(users), USERS):
            some = index[start : start + USERS]
            latest = model.sequences.latest[some.clamp(min=0)] * (some >= 0)
            scores = model.score_users(some, self.elapsed(latest, at))
            if exclude_seen:
                here = torch.where(some >= 0)[0]
                who, seen = self._rated.of_users(some[here])
                scores[here[who], seen] = -torch.inf
            row, rank, frame = self._best(scores, k, items, exclude)
            frame.insert(0, "user", self._user_ids(users, index, row + start))
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def elapsed(self, latest: Tensor, at: int | None) -> Tensor | None:
        """The classes ``[U]`` of the time from ``latest``, int64 ``[U]``, to a request; 0 where unknown.

        ``ValueError`` for a request before, and where the model does not look at it.
        """
        if at is None:
            return None
        if not self.trained.model.config.elapsed:
            raise ValueError(
                f"at={at}: this model was not trained to know when it is asked: train it with elapsed=True"
            )
        passed = torch.where(latest == 0, 0, at - latest)
        if bool((passed < 0).any()):
            raise ValueError(f"at={at} is before {int(latest.max())}, the time of the last choice known")
        gaps = torch.bucketize(passed, torch.tensor(GAP_SECONDS), right=True)
        return torch.tensor(ELAPSED)[gaps]

    def session(self, recent: Any = ()) -> Session:
        """A user from what it chose, in order of time: see ``LUNetRecommender.session``."""
        return Session(self, recent)

    def _user_ids(self, users: list[Any], index: Tensor, rows: npt.NDArray[np.int64]) -> pd.Series:
        known = self.trained.users.ids
        ids = [known[i] if i >= 0 else user for user, i in zip(users, index.tolist(), strict=True)]
        return pd.Series(np.array(ids, dtype=object)[rows], dtype=object).infer_objects()

    def _best(
        self, scores: Tensor, k: int, items: Any, exclude: Any
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], pd.DataFrame]:
        """(row, rank, frame of rank, item, score) of the k best in each row of scores ``[U, n_items]``.

        ``items`` are the ids to choose from, or None for all, but for those of ``exclude``. Of equal scores
        the lower item comes first.
        """
        if exclude is not None:
            known = self.trained.items.index(exclude)
            scores = scores.index_fill(1, torch.from_numpy(known[known >= 0]), -torch.inf)
        if items is not None:
            known = self.trained.items.index(items)
            allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
            allowed[torch.from_numpy(known[known >= 0])] = True
            scores = scores.masked_fill(~allowed, -torch.inf)
        k = min(k, scores.shape[1])
        # All from the k-th best score on: topk alone would not say which of equal ones comes first.
        least = scores.topk(k, dim=1).values[:, -1:]
        row, item = ((scores >= least) & (scores > -torch.inf)).nonzero(as_tuple=True)
        value = scores[row, item].numpy()
        order = np.lexsort((item.numpy(), -value, row.numpy()))
        rows = row.numpy()[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows) + 1
        kept = rank <= k
        rows, rank, order = rows[kept], rank[kept], order[kept]
        ids = self.trained.items.ids[item.numpy()[order]]
        shown = pd.Series(ids, dtype=self.trained.items.ids.dtype).infer_objects()
        return rows, rank, pd.DataFrame({"rank": rank, "item": shown, "score": value[order]})


class Session:
    """Someone whom training has not seen, by what it has chosen, which may grow: :meth:`add`.

    ``recent`` are ids of items, the oldest first, or a frame with the column ``item`` and, where they are
    known, ``rating`` and ``timestamp``, by which it is then ordered. Items that training has not seen say
    nothing and raise no error. Without a rating an item counts as rated the way most are.
    """

    def __init__(self, serving: SequenceServing, recent: Any = ()) -> None:
        self._serving = serving
        self._sequences = serving.trained.model.sequences
        self._items: list[int] = []
        self._levels: list[int] = []
        self._times: list[int] = []
        self._append(_entries(recent))

    def add(self, item: Any, rating: float | None = None, timestamp: int = 0) -> None:
        """One more item that was chosen, after all others; ``timestamp`` in Unix seconds, 0 for unknown.

        Raises ``ValueError`` for a rating that is not finite, and for a time before that of an item already
        there: begin a new session with all of them in a frame, which is then ordered.
        """
        latest = max(self._times, default=0)
        if timestamp and timestamp < latest:
            raise ValueError(
                f"timestamp={timestamp} of item {item!r} is before {latest}, that of an earlier one: begin a "
                "session with all of them in a frame, which is ordered by time"
            )
        self._append([(item, rating, timestamp)])

    def recommend(
        self,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        items: Any = None,
        exclude: Any = None,
        at: int | None = None,
    ) -> pd.DataFrame:
        """The k best next items, best first: columns ``rank``, ``item``, ``score``.

        ``items`` are the ids to choose from, by default all, but for those of ``exclude``; ``exclude_seen``
        omits those chosen; ``at`` is the time of asking, in Unix seconds, for a model with ``elapsed`` (by
        default soon after the last).
        Without a known item the most popular are best. Cost: O((n + L K) d + K d² + n_items d) for n items
        chosen, of which the order of the last L is read.
        """
        scores = self._scores(at)
        if exclude_seen and self._items:
            scores[0, self._items] = -torch.inf
        return self._serving._best(scores, k, items, exclude)[2]

    def score(self, items: Any) -> npt.NDArray[np.float32]:
        """Scores ``[N]`` of one or many items, as ``LUNetRecommender.score``."""
        item = self._serving.trained.items.index(items)
        return _of_items(self._scores().expand(len(item), -1), item)

    @torch.no_grad()
    def state(self) -> Tensor:
        """x ``[K d]`` of K members, what f is applied to; ``RuntimeError`` without a known item."""
        if not self._items:
            raise RuntimeError("this session has no item that training has seen, and so no state: add one")
        return self._serving.trained.model.states(self._windows(None), self._serving.items)[0]

    def _append(self, entries: list[Entry]) -> None:
        """All of ``entries``, whose ids are looked up together: one by one takes most of the time."""
        for item, rating, _ in entries:
            if rating is not None and not np.isfinite(rating):
                raise ValueError(f"rating={rating!r} of item {item!r} must be a finite number")
        index = self._serving.trained.items.index([item for item, _, _ in entries]).tolist()
        rated = torch.tensor([0.0 if rating is None else float(rating) for _, rating, _ in entries])
        levels = torch.bucketize(rated, self._sequences.bounds, right=True).tolist()
        for (_, rating, time), item, level in zip(entries, index, levels, strict=True):
            if item >= 0:
                self._items.append(item)
                self._levels.append(self._serving.usual_level if rating is None else level)
                self._times.append(int(time))

    def _windows(self, at: int | None) -> Windows:
        last = slice(-self._serving.trained.model.config.length, None)
        gaps = gap_classes(np.zeros(len(self._items), np.int64), np.array(self._times, np.int64))
        before = self._items[: last.start]
        columns = (torch.tensor([self._items[last]]), torch.tensor([self._levels[last]]))
        elapsed = torch.zeros_like(columns[0])
        asked = self._serving.elapsed(torch.tensor([self._times[-1]]), at)
        if asked is not None:
            elapsed[0, -1] = asked
        return Windows(
            *columns,
            torch.from_numpy(gaps[last].astype(np.int64)).unsqueeze(0),
            elapsed,
            torch.tensor([columns[0].shape[1]]),
            torch.tensor(before, dtype=torch.int64),
            torch.tensor([len(before)]),
            torch.tensor([-1]),
            NO_SIDE,
        )

    @torch.no_grad()
    def _scores(self, at: int | None = None) -> Tensor:
        model, items = self._serving.trained.model, self._serving.items
        if not self._items:
            return model.popularity().unsqueeze(0)
        return model.scores(model.latent(model.states(self._windows(at), items)), items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"Session({len(self)} of {len(self._serving.trained.items)} items)"


def _entries(recent: Any) -> list[Entry]:
    """What a session begins with, in order of time."""
    frame = items_frame(recent, "recent")
    rated, timed = "rating" in frame.columns, "timestamp" in frame.columns
    if not is_table(recent) and not timed:
        ratings = frame["rating"].tolist() if rated else [None] * len(frame)
        return list(zip(frame["item"].tolist(), ratings, [0] * len(frame), strict=True))
    if "item" not in frame.columns:
        raise ValueError(f"recent has no column 'item', only {', '.join(map(str, frame.columns))}")
    table = from_frame(
        frame.assign(user=0),
        rating="rating" if rated else None,
        timestamp="timestamp" if timed else None,
    )
    times = [0] * len(table) if table.timestamp is None else table.timestamp.tolist()
    order = np.argsort(np.array(times), kind="stable").tolist()
    ids = table.items.ids[table.item.numpy()]
    ratings = table.rating.tolist() if rated else [None] * len(table)
    return [(ids[n], ratings[n], times[n]) for n in order]


def _of_items(scores: Tensor, item: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The scores ``[N]`` of one item in each row ``[N, n_items]``; of an unknown one, -1, the lowest."""
    found = scores.gather(1, torch.from_numpy(item).clamp(min=0).unsqueeze(1)).squeeze(1)
    unseen = torch.from_numpy(item < 0)
    if bool(unseen.any()):
        found = torch.where(unseen, scores.amin(1), found)
    result: npt.NDArray[np.float32] = found.float().numpy()
    return result
