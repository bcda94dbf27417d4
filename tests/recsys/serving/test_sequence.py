"""Recipe sequence as a person uses it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast.recsys.data.ids import IdMap
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.model.model_files import TrainedSequences
from lunet_fast.recsys.model.sequence_config import SequenceConfig
from lunet_fast.recsys.model.sequence_training import train_sequence
from lunet_fast.recsys.model.sequences import Sequences
from lunet_fast.recsys.model.state_network import StateNetwork
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.recsys.synthetic import cyclic_ratings, quick_sequence_config

RATINGS = cyclic_ratings()


@pytest.fixture(scope="module")
def recommender() -> LUNetRecommender:
    settings = {**quick_sequence_config(epochs=20).to_dict(), "split": "none"}
    settings = {name: value for name, value in settings.items() if name not in ("recipe", "seed")}
    return LUNetRecommender("sequence", **settings).fit(RATINGS)


def steps(user: int) -> list[int]:
    rows = (RATINGS.user == user).nonzero().squeeze(1)
    assert RATINGS.timestamp is not None
    return RATINGS.item[rows[RATINGS.timestamp[rows].argsort()]].tolist()


def test_the_next_item_is_the_best(recommender: LUNetRecommender) -> None:
    for user in (0, 1):
        before, last = steps(user)[-2:]
        wanted = (2 * last - before) % RATINGS.n_items
        frame = recommender.recommend(user, 3)
        assert list(frame.columns) == ["user", "rank", "item", "score"]
        assert frame["item"][0] == wanted
        assert frame["rank"].tolist() == [1, 2, 3]
        assert frame["score"].is_monotonic_decreasing
        assert not set(frame["item"]) & set(steps(user))
        np.testing.assert_array_equal(frame["score"], recommender.score(user, frame["item"]))


def test_a_session_of_a_users_ratings_is_that_user(recommender: LUNetRecommender) -> None:
    rows = (RATINGS.user == 4).nonzero().squeeze(1)
    assert RATINGS.timestamp is not None
    frame = pd.DataFrame(
        {"item": RATINGS.item[rows], "rating": RATINGS.rating[rows], "timestamp": RATINGS.timestamp[rows]}
    )
    session = recommender.session(frame)
    pd.testing.assert_frame_equal(
        session.recommend(5), recommender.recommend(4, 5).drop(columns="user"), rtol=1e-5
    )
    one = recommender.session()
    for row in frame.sort_values("timestamp").itertuples():
        one.add(row.item, row.rating, row.timestamp)  # type: ignore[arg-type]
    np.testing.assert_array_equal(one.score([3, 5]), session.score([3, 5]))


def test_next_items_go_on_where_the_last_ones_ended(recommender: LUNetRecommender) -> None:
    assert recommender.next_items([5, 6, 7, 8], k=1)["item"].tolist() == [9]
    session = recommender.session([8, 7, 6, 5])
    assert session.recommend(1)["item"].tolist() == [4]
    session.add(4)
    assert session.recommend(1)["item"].tolist() == [3]
    assert len(session) == 5


def test_ratings_by_item_are_a_session(recommender: LUNetRecommender) -> None:
    given = {5: 3.0, 6: 4.0, 7: 2.0}
    with pytest.raises(ValueError, match=r"use session\(\)"):
        recommender.fold_in(given)
    pd.testing.assert_frame_equal(
        recommender.session(given).recommend(2),
        recommender.session(pd.DataFrame({"item": [5, 6, 7], "rating": [3.0, 4.0, 2.0]})).recommend(2),
    )


def test_who_is_unknown_gets_what_is_popular(recommender: LUNetRecommender) -> None:
    counts = torch.bincount(RATINGS.item)
    frame = recommender.recommend(["nobody", 3], 4, exclude_seen=False)
    assert frame["user"].tolist() == ["nobody"] * 4 + [3] * 4
    assert counts[frame["item"].to_numpy()[0]] == counts.max()
    assert recommender.session(["no such item"]).recommend(4)["item"].tolist() == frame["item"].tolist()[:4]
    with pytest.raises(RuntimeError, match="no item"):
        recommender.session().state()


def test_items_to_choose_from(recommender: LUNetRecommender) -> None:
    frame = recommender.recommend([0, 1], 5, exclude_seen=False, items=[3, 7, "no such item"])
    assert sorted(frame["item"]) == [3, 3, 7, 7]
    scores = recommender.score(0, [3, "no such item"])
    assert scores[1] == recommender.score([0] * RATINGS.n_items, range(RATINGS.n_items)).min()


def test_saved_and_loaded(recommender: LUNetRecommender, tmp_path: Path) -> None:
    recommender.save(tmp_path)
    loaded = LUNetRecommender.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.recommend([2, 9], 6), recommender.recommend([2, 9], 6))
    assert loaded.recipe == "sequence"
    assert loaded.config == recommender.config
    again = loaded.fit(RATINGS)  # with the settings of the file
    pd.testing.assert_frame_equal(again.recommend([2, 9], 6), recommender.recommend([2, 9], 6))


def test_interactions_alone() -> None:
    frame = pd.DataFrame({"user": RATINGS.user, "item": RATINGS.item, "timestamp": RATINGS.timestamp})
    settings = {"embedding_size": 8, "length": 6, "batch_size": 200, "epochs": 2}
    fitted = LUNetRecommender("sequence", **settings).fit(frame, rating=None)
    assert len(fitted.recommend(0, 3)) == 3
    assert fitted.sequences.model.sequences.n_levels == 1


def test_what_another_recipe_does(recommender: LUNetRecommender) -> None:
    for call in (lambda: recommender.predict(0, 1), lambda: recommender.trained):
        with pytest.raises(ValueError, match="recipe 'sequence' ranks"):
            call()
    best = LUNetRecommender("best", members=1, epochs=1, embedding_size=2).fit(RATINGS)
    with pytest.raises(ValueError, match="knows no order"):
        best.session()
    with pytest.raises(ValueError, match="not of 'sequence'"):
        _ = best.sequences


@pytest.mark.parametrize("recent", ["film", 3, pd.DataFrame({"film": [1]}), [3, (4, 5.0)]])
def test_what_is_no_session(recommender: LUNetRecommender, recent: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="recent"):
        recommender.session(recent)


def test_ratings_of_a_session(recommender: LUNetRecommender) -> None:
    expected = recommender.session({5: 1.0, 6: 4.0}).recommend(4)
    for recent in (pd.Series([1.0, 4.0], index=[5, 6]), [(5, 1.0), (6, 4.0)], [(5, 1.0, 0), (6, 4.0, 0)]):
        pd.testing.assert_frame_equal(recommender.session(recent).recommend(4), expected)


def test_the_held_out_item_is_not_recommended_again(tmp_path: Path) -> None:
    result = train_sequence(RATINGS, quick_sequence_config(epochs=1), out=tmp_path / "run")
    loaded = LUNetRecommender.load(tmp_path / "run")
    everyone = loaded.recommend(loaded.users.ids, k=RATINGS.n_items)
    rated = set(zip(RATINGS.user.tolist(), RATINGS.item.tolist(), strict=True))
    assert len(RATINGS) > len(result.trained.model.sequences.items)
    assert not rated & set(zip(everyone["user"], everyone["item"], strict=True))
    assert len(everyone) == RATINGS.n_users * RATINGS.n_items - len(rated)


def test_the_state_comes_back(recommender: LUNetRecommender) -> None:
    session, model = recommender.session([5, 6, 7]), recommender.sequences.model
    x = session.state()
    torch.testing.assert_close(model.inverse(model.latent(x.unsqueeze(0)))[0], x)


def test_a_session_answers_at_once() -> None:
    """4,000 items, 250 chosen, the default sizes: milliseconds, here with room for a busy machine."""
    ratings = cyclic_ratings(users=10, items=4000, each=250)
    model = StateNetwork(SequenceConfig(), Sequences.of(ratings, 0)).eval()
    fitted = LUNetRecommender("sequence")
    fitted._set_trained(TrainedSequences(model, ratings.users, ratings.items, ratings.scale))
    session = fitted.session(steps_of(ratings, 0))
    session.recommend(10)
    spent = []
    for item in range(11):
        began = time.process_time()
        session.add(item)
        session.recommend(10)
        spent.append(time.process_time() - began)
    assert sorted(spent)[5] < 0.05


def test_a_session_looks_its_ids_up_together(
    recommender: LUNetRecommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, a session of 200 items would take longer to begin than to answer."""
    looked_up, index = [], IdMap.index
    monkeypatch.setattr(IdMap, "index", lambda ids, some: looked_up.append(some) or index(ids, some))
    together = recommender.session([5, "no such item", 6, 7])
    assert looked_up == [[5, "no such item", 6, 7]]
    alone = recommender.session()
    for item in (5, "no such item", 6, 7):
        alone.add(item)
    assert len(alone) == 3
    assert torch.equal(together.state(), alone.state())


def test_a_rating_that_is_no_number(recommender: LUNetRecommender) -> None:
    session = recommender.session([5])
    for item in (6, "no such item"):
        with pytest.raises(ValueError, match=f"rating=nan of item {item!r}"):
            session.add(item, rating=float("nan"))
    assert len(session) == 1


def steps_of(ratings: Any, user: int) -> list[int]:
    return ratings.item[ratings.user == user].tolist()


def test_a_session_refuses_what_was_before(recommender: LUNetRecommender) -> None:
    session = recommender.session(pd.DataFrame({"item": [5, 6], "timestamp": [100, 200]}))
    session.add(7)  # when, nobody knows
    session.add(8, timestamp=200)
    with pytest.raises(ValueError, match="timestamp=199 of item 9 is before 200"):
        session.add(9, timestamp=199)
    assert len(session) == 4


@pytest.fixture(scope="module")
def told() -> LUNetRecommender:
    """One whose data have two ways to go on, which the time of asking tells apart."""
    settings = {
        **quick_sequence_config(epochs=60, embedding_size=32, elapsed=True).to_dict(),
        "split": "none",
    }
    settings = {name: value for name, value in settings.items() if name not in ("recipe", "seed")}
    return LUNetRecommender("sequence", **settings).fit(with_leaps())


class TestWhenItIsAsked:
    def test_the_next_item_depends_on_it(self, told: LUNetRecommender) -> None:
        right = {60: 0, 500_000: 0}
        for user in range(60):
            last, latest = leaping_steps(user)[-1], leaping_time(user)
            for passed, step in ((60, 1), (500_000, 15)):
                found = told.recommend(user, 1, exclude_seen=False, at=latest + passed)
                right[passed] += found["item"].tolist() == [(last + step) % 30]
        assert min(right.values()) > 45, "of 60"

    def test_unknown_is_soon(self, told: LUNetRecommender) -> None:
        soon = told.recommend(0, 3, at=leaping_time(0) + 3600)
        pd.testing.assert_frame_equal(told.recommend(0, 3), soon)
        later = told.recommend(0, 3, at=leaping_time(0) + 3601)
        assert not np.allclose(later["score"], soon["score"])

    def test_a_session_is_asked_as_its_user_is(self, told: LUNetRecommender) -> None:
        ratings = with_leaps()
        rows = (ratings.user == 3).nonzero().squeeze(1)
        assert ratings.timestamp is not None
        columns = {name: getattr(ratings, name)[rows] for name in ("item", "rating", "timestamp")}
        session = told.session(pd.DataFrame(columns))
        for at in (None, leaping_time(3), leaping_time(3) + 90_000, leaping_time(3) + 9_000_000):
            pd.testing.assert_frame_equal(
                session.recommend(5, at=at), told.recommend(3, 5, at=at).drop(columns="user"), rtol=1e-5
            )
        with pytest.raises(ValueError, match="at=5 is before"):
            session.recommend(at=5)

    def test_saved_and_loaded(self, told: LUNetRecommender, tmp_path: Path) -> None:
        told.save(tmp_path)
        at = leaping_time(5) + 500_000
        pd.testing.assert_frame_equal(
            LUNetRecommender.load(tmp_path).recommend(5, at=at), told.recommend(5, at=at)
        )

    def test_where_it_means_nothing(self, told: LUNetRecommender, recommender: LUNetRecommender) -> None:
        with pytest.raises(ValueError, match="at=5 is before"):
            told.recommend(1, at=5)
        with pytest.raises(ValueError, match="elapsed=True"):
            recommender.recommend(1, at=5)
        assert len(told.recommend("nobody", 2, at=5)) == 2


def with_leaps() -> Ratings:
    """Users who step on by 1, and by 15 after each pause of five days, at two places of each."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(60):
        item, time_ = int(rng.integers(30)), 1_000_000
        for step in range(12):
            rows.append((user, item, 3.0, time_))
            leap = bool(rng.random() < 0.3) and step < 11
            item, time_ = (item + (15 if leap else 1)) % 30, time_ + (500_000 if leap else 60)
    frame = pd.DataFrame(rows, columns=["user", "item", "rating", "timestamp"])
    return from_frame(frame.drop_duplicates(["user", "item"]), scale=(1, 5), name="leaps")


def leaping_steps(user: int) -> list[int]:
    ratings = with_leaps()
    rows = (ratings.user == user).nonzero().squeeze(1)
    assert ratings.timestamp is not None
    return ratings.item[rows[ratings.timestamp[rows].argsort()]].tolist()


def leaping_time(user: int) -> int:
    ratings = with_leaps()
    assert ratings.timestamp is not None
    return int(ratings.timestamp[ratings.user == user].max())
