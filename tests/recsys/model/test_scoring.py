"""All items' scores for many users, and the recommendations made of them, against the model pair by pair."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lunet_fast.recsys.model import scoring
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.scoring import (
    ItemScorer,
    Seen,
    SplitNet,
    score_all,
    score_topk,
)
from lunet_fast.recsys.serving import recommend
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.recsys.synthetic import latent_frame, latent_ratings, quick_config

N_USERS, N_ITEMS = 60, 40


def model_of(**changes: object) -> RatingModel:
    """A model of random weights on the synthetic ratings; item 39 and user 59 have none."""
    ratings = latent_ratings()
    ratings = ratings.select((ratings.item != N_ITEMS - 1) & (ratings.user != N_USERS - 1))
    model = RatingModel(
        quick_config(**changes), *(ratings.user, ratings.item, ratings.rating), N_USERS, N_ITEMS
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def scorer_of(model: RatingModel) -> ItemScorer:
    with torch.no_grad():
        return ItemScorer(model, model.histories())


def grid(users: Tensor) -> tuple[Tensor, Tensor]:
    return users.repeat_interleave(N_ITEMS), torch.arange(N_ITEMS).repeat(len(users))


@torch.no_grad()
def exact_scores(model: RatingModel, users: Tensor) -> Tensor:
    """Ratings of all items in float64, one pair after another; −inf for training pairs and unrated items."""
    model = RatingModel.from_state(model.config, model.state_dict(), N_USERS, N_ITEMS).double()
    pairs = grid(users)
    rating = model(*pairs)
    rating[model.interactions.contains(*pairs) | (model.interactions.item_counts[pairs[1]] == 0)] = -torch.inf
    return rating.view(len(users), N_ITEMS)


SETTINGS: list[dict[str, Any]] = [
    {"readout": readout, "layers": layers, "members": members}
    for readout, layers, members in itertools.product(("linear", "pair"), (1, 2, 3), (1, 3))
]
SETTINGS += [
    {"biases": False, "user_history": False, "item_history": False, "readout": "linear"},
    {"user_history": False, "history_power": 1.0},
    {"item_history": False, "embedding_size": 1},
    {"embedding_size": 5, "alpha": 0.9},
]


HYBRIDS: list[dict[str, Any]] = [
    {"gamma": gamma, "readout": readout, "layers": layers}
    for gamma, readout, layers in itertools.product((0.0, 0.4), ("linear", "pair"), (1, 2))
]
HYBRIDS += [{"gamma": 0.4, "embedding_size": 5, "interaction_share": 0.8}]


class TestInteractions:
    @pytest.mark.parametrize("settings", HYBRIDS, ids=str)
    def test_each_read_out_is_the_models(self, settings: dict[str, Any]) -> None:
        model = model_of(**settings).double()
        users = torch.tensor([3, 0, 58, 3])
        pairs = grid(users)
        unseen = ~model.interactions.contains(*pairs).view(4, N_ITEMS)
        unseen[:, -1] = False
        with torch.no_grad():
            expected = {"interaction": model.interaction(*pairs)}
            if settings["gamma"] > 0:
                expected["rating"] = model(*pairs)
            for readout, values in expected.items():
                scorer = ItemScorer(model, model.histories(), readout=readout)
                found = scorer.scores(users)
                torch.testing.assert_close(found[unseen], values.view(4, N_ITEMS)[unseen], rtol=0, atol=1e-12)

    def test_ranks_by_interactions_where_it_can(self) -> None:
        for gamma, readout in ((0.0, "interaction"), (0.4, "interaction"), (1.0, "rating")):
            assert scorer_of(model_of(gamma=gamma)).readout == readout

    def test_a_read_out_that_was_not_trained_is_refused(self) -> None:
        model = model_of(gamma=0.0)
        with pytest.raises(ValueError, match="gamma=0: this model was trained without the rating read-out"):
            ItemScorer(model, model.histories(), readout="rating")

    def test_ordinal_scores_become_the_models_ratings(self) -> None:
        model = model_of(loss="ordinal").double()
        users = torch.tensor([3, 0])
        pairs = grid(users)
        unseen = ~model.interactions.contains(*pairs)
        unseen[N_ITEMS - 1 :: N_ITEMS] = False
        with torch.no_grad():
            found = model.rating(scorer_of(model).scores(users).flatten())
            torch.testing.assert_close(found[unseen], model(*pairs)[unseen], rtol=0, atol=1e-12)


class TestItemScorer:
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_scores_are_the_models(self, settings: dict[str, Any]) -> None:
        model = model_of(**settings).double()
        users = torch.tensor([3, 0, 58, 3])
        scores = scorer_of(model).scores(users)
        pairs = grid(users)
        with torch.no_grad():
            expected = model(*pairs).view(4, N_ITEMS)
        unseen = ~model.interactions.contains(*pairs).view(4, N_ITEMS)
        unseen[:, -1] = False
        assert int(unseen.sum()) > 40
        torch.testing.assert_close(scores[unseen], expected[unseen], rtol=0, atol=1e-12)
        assert bool((scores[:, -1] == -torch.inf).all())

    def test_training_pairs_are_another_matter(self) -> None:
        """Why they are left out: their own entry is not in their histories."""
        model = model_of().double()
        rows, items = model.interactions.of_users(torch.tensor([5]))
        with torch.no_grad():
            own = model(torch.full_like(items, 5), items)
        assert float((scorer_of(model).scores(torch.tensor([5]))[0, items] - own).abs().min()) > 1e-4

    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_best_are_those_of_brute_force(self, settings: dict[str, Any]) -> None:
        model = model_of(**settings)
        users = torch.tensor([7, 7, 0, 58, 30])
        scores, items = scorer_of(model).best(users, 6)
        expected = exact_scores(model, users).topk(6)
        assert torch.equal(items, expected.indices)
        torch.testing.assert_close(scores.double(), expected.values, rtol=3e-6, atol=3e-6)

    def test_among_candidates(self) -> None:
        model = model_of()
        users, candidates = torch.arange(59), torch.tensor([0, 3, 4, 17, 29, 38, 39])
        scores, items = scorer_of(model).best(users, 4, candidates)
        exact = exact_scores(model, users)[:, candidates]
        expected = exact.topk(4)
        expected_items = torch.where(expected.values > -torch.inf, candidates[expected.indices], -1)
        assert torch.equal(items, expected_items)
        scores, items = scorer_of(model).best(users, 2, candidates[:0])
        assert bool((items == -1).all())

    def test_training_pairs_of_users(self) -> None:
        model = model_of()
        users = torch.tensor([4, 59, 0, 4])
        rows, items = model.interactions.of_users(users)
        seen = torch.zeros(4, N_ITEMS, dtype=torch.bool)
        seen[rows, items] = True
        assert torch.equal(seen.flatten(), model.interactions.contains(*grid(users)))
        assert torch.equal(rows * N_ITEMS + items, (rows * N_ITEMS + items).unique())
        assert len(model.interactions.of_users(users[:0])[0]) == 0


def arguments(U: int, I: int, D: int, K: int = 2, L: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """p, q, net, user offset, item offset."""
    net = SplitNet(
        torch.randn(K, L, D, D, dtype=dtype) / math.sqrt(D) if L else None,
        torch.randn(K, L, D, dtype=dtype) if L else None,
        (0.1, 0.9, 1.0),
        activated=L == 0,
        readout=torch.randn(K, D, dtype=dtype) / math.sqrt(D),
        curvature=torch.randn(K, D, dtype=dtype) / D,
    )
    sizes = ((K, U, D), (K, I, D), (U,), (I,))
    p, q, user_offset, item_offset = (torch.randn(size, dtype=dtype) for size in sizes)
    return p, q, net, user_offset, item_offset


def random_seen(U: int, I: int, share: float) -> tuple[Seen, Tensor]:
    mask = torch.rand(U, I) < share
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)))
    return Seen(indptr, mask.nonzero()[:, 1].int()), mask


class TestScoreTopk:
    # One pair at a time, some items of one user, some users at once, all at once.
    @pytest.mark.parametrize("block", [1, 100, 2000, 1 << 18])
    @pytest.mark.parametrize("layers", [0, 1, 2])
    def test_any_block_size(self, layers: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        args = arguments(9, 50, 8, L=layers)
        seen, mask = random_seen(9, 50, 0.4)
        exact = score_all(*arguments_in_double(args)).masked_fill(mask, -torch.inf)
        monkeypatch.setattr(scoring, "BLOCK", block)
        scores, items = score_topk(*args, seen, 5)
        expected = exact.topk(5)
        assert torch.equal(items, expected.indices)
        torch.testing.assert_close(scores.double(), expected.values, rtol=2e-6, atol=2e-6)

    @pytest.mark.parametrize("largest", [39.0, 41.0, 3e4])
    def test_large_inputs(self, largest: float) -> None:
        """On both sides of where an exponential of a sum is taken as a product."""
        p, q, *rest = arguments(20, 60, 8, L=1)
        p, q = (largest * side / side.abs().max() for side in (p, q))
        exact = score_all(*arguments_in_double((p, q, *rest)))
        found = score_all(p, q, *rest)
        assert float((found - exact).abs().max()) < 2e-6 * float(exact.abs().max())

    def test_ties_go_to_the_lower_item(self, monkeypatch: pytest.MonkeyPatch) -> None:
        p, q, net, user_offset, _ = arguments(3, 90, 4, L=0)
        q = torch.zeros_like(q)
        levels = (torch.arange(90) % 4).float()
        levels[levels == 0] = -0.0
        expected = levels.sort(descending=True, stable=True).indices[:30]
        for block in (64, 1 << 18):
            monkeypatch.setattr(scoring, "BLOCK", block)
            _, items = score_topk(p, q, net, user_offset, levels, None, 30)
            assert torch.equal(items, expected.expand(3, 30))

    def test_what_is_never_among_the_best(self) -> None:
        p, q, net, user_offset, item_offset = arguments(2, 30, 4)
        q[0, 3] = math.nan
        item_offset[[5, 6]] = torch.tensor([math.nan, -torch.inf])
        p[1, 1, 0] = math.nan
        item_offset[7] = torch.inf
        scores, items = score_topk(p, q, net, user_offset, item_offset, None, 30)
        assert sorted(items[0, :27].tolist()) == sorted(set(range(30)) - {3, 5, 6})
        assert items[0, 0] == 7
        assert scores[0, 0] == torch.inf
        assert items[0, 27:].tolist() == [-1] * 3
        assert bool((items[1] == -1).all())
        assert bool((scores[1] == -torch.inf).all())

    def test_fewer_than_k_or_nothing_at_all(self) -> None:
        args = arguments(3, 4, 6)
        scores, items = score_topk(*args, None, 10)
        exact = score_all(*args)
        assert torch.equal(items[:, :4], exact.sort(descending=True).indices)
        assert bool((items[:, 4:] == -1).all())
        everything = random_seen(3, 4, 1.1)[0]
        assert bool((score_topk(*args, everything, 2)[1] == -1).all())
        assert score_topk(*arguments(0, 4, 6), None, 2)[0].shape == (0, 2)
        assert bool((score_topk(*arguments(3, 0, 6), None, 2)[1] == -1).all())
        assert score_topk(*arguments(3, 1, 6), None, 1)[1].tolist() == [[0]] * 3

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No tensor of pairs × D, nor of pairs, is made, whatever their number."""
        U, I, D = 100, 2000, 32
        monkeypatch.setattr(scoring, "BLOCK", 1 << 14)
        args = arguments(U, I, D, K=1)
        seen, _ = random_seen(U, I, 0.01)
        with Largest() as largest:
            score_topk(*args, seen, 10)
        assert 1 << 14 <= largest.numel <= max(1 << 14, 2 * (I + 10 * U))
        assert largest.numel < U * I / 10
        with Largest() as largest:
            score_all(*args)
        assert largest.numel == U * I  # it does see what is made


def arguments_in_double(args: Any) -> Any:
    p, q, net, user_offset, item_offset = args
    wide = (part.double() if isinstance(part, Tensor) else part for part in net)
    return p.double(), q.double(), SplitNet(*wide), user_offset.double(), item_offset.double()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor in memory that an operation inside returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            # What lies in an argument's memory, as a view does, is not new.
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


# The recommender --------------------------------------------------------------------------------------------


QUICK: dict[str, Any] = {
    name: value
    for name, value in quick_config().to_dict().items()
    if name in ("members", "embedding_size", "item_history", "epochs", "batch_size", "learning_rate")
}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return latent_frame()


@pytest.fixture(scope="module")
def fitted(frame: pd.DataFrame) -> LUNetRecommender:
    return LUNetRecommender("best", **QUICK).fit(frame, scale=(1, 5))


def by_hand(recommender: LUNetRecommender, user: Any, k: int, items: Any, seen: set[Any]) -> list[Any]:
    """The k best of ``items`` not in ``seen`` by ratings that are predicted one by one and not clipped."""
    trained = recommender.trained
    left = [item for item in items if item not in seen]
    users = torch.from_numpy(trained.users.index([user] * len(left)))
    with torch.no_grad():
        rating = trained.model(users, torch.from_numpy(trained.items.index(left)))
    return [left[i] for i in rating.sort(descending=True, stable=True).indices[:k].tolist()]


class TestRecommend:
    def test_is_the_order_of_the_predictions(self, fitted: LUNetRecommender, frame: pd.DataFrame) -> None:
        users = [3, 17, 42]
        found = fitted.recommend(users, 7)
        assert list(found.columns) == ["user", "rank", "item", "score"]
        assert found["user"].tolist() == [user for user in users for _ in range(7)]
        assert found["rank"].tolist() == [*range(1, 8)] * 3
        for user, part in found.groupby("user"):
            seen = set(frame.loc[frame["user"] == user, "item"])
            assert not seen & set(part["item"])
            assert part["item"].tolist() == by_hand(fitted, user, 7, range(N_ITEMS), seen)
        predicted = fitted.predict(found["user"], found["item"])
        np.testing.assert_allclose(found["score"], predicted, rtol=0, atol=2e-6)
        assert found["score"].dtype == np.float32

    def test_every_unseen_pair_has_its_prediction(
        self, fitted: LUNetRecommender, frame: pd.DataFrame
    ) -> None:
        found = fitted.recommend(range(N_USERS), N_ITEMS)
        assert len(found) == N_USERS * N_ITEMS - len(frame)
        np.testing.assert_allclose(
            found["score"], fitted.predict(found["user"], found["item"]), rtol=0, atol=2e-6
        )
        assert not len(found.merge(frame, on=["user", "item"]))

    def test_with_what_was_seen(self, fitted: LUNetRecommender, frame: pd.DataFrame) -> None:
        found = fitted.recommend([5, 6], N_ITEMS, exclude_seen=False)
        assert len(found) == 2 * N_ITEMS
        np.testing.assert_allclose(
            found["score"], fitted.predict(found["user"], found["item"]), rtol=0, atol=2e-6
        )
        few = fitted.recommend([5, 6], 4, exclude_seen=False)
        pd.testing.assert_frame_equal(few, found[found["rank"] <= 4].reset_index(drop=True))
        assert few["item"].tolist()[:4] == by_hand(fitted, 5, 4, range(N_ITEMS), set())
        assert len(few.merge(frame, on=["user", "item"]))

    def test_ranks_by_what_is_not_clipped(self, frame: pd.DataFrame) -> None:
        narrow = LUNetRecommender(**{**QUICK, "epochs": 20, "l2_latent": 0.0}).fit(frame)
        found = narrow.recommend(range(N_USERS), 5, exclude_seen=False)
        clipped = found[found["score"] == 5.0].groupby("user").filter(lambda part: len(part) > 1)
        assert len(clipped) > 10
        assert found["score"].max() == 5.0
        for user, part in clipped.groupby("user"):
            assert part["item"].tolist() == by_hand(narrow, user, len(part), range(N_ITEMS), set())

    def test_among_given_items(self, fitted: LUNetRecommender, frame: pd.DataFrame) -> None:
        items = [30, 4, 11, 4, 25, 2]
        found = fitted.recommend([8], 10, items=items)
        seen = set(frame.loc[frame["user"] == 8, "item"])
        assert found["item"].tolist() == by_hand(fitted, 8, 10, sorted(set(items)), seen)
        everything = fitted.recommend([8], 10, items=items, exclude_seen=False)
        assert everything["item"].tolist() == by_hand(fitted, 8, 10, sorted(set(items)), set())
        assert len(fitted.recommend([8], 3, items=[])) == 0

    def test_an_unseen_user_gets_what_people_like(
        self, fitted: LUNetRecommender, frame: pd.DataFrame
    ) -> None:
        found = fitted.recommend(["nobody", 3, -7], 6)
        assert found["user"].tolist() == ["nobody"] * 6 + [3] * 6 + [-7] * 6
        residual = frame["rating"] - frame["rating"].mean()
        groups = residual.groupby(frame["item"])
        deviation = (groups.sum() / (groups.count() + 10)).sort_values(ascending=False, kind="stable")
        for user in ("nobody", -7):
            part = found[found["user"] == user]
            assert part["item"].tolist() == deviation.index[:6].tolist()
            np.testing.assert_array_equal(part["score"], fitted.predict(user, part["item"]))
        pd.testing.assert_frame_equal(
            found[found["user"] == 3].reset_index(drop=True), fitted.recommend(3, 6), check_dtype=False
        )

    def test_unseen_items_have_their_fall_back(self, fitted: LUNetRecommender) -> None:
        items = ["new", 4, 10**9, 25, "new", 2]
        for user in (9, "nobody"):
            found = fitted.recommend(user, 10, items=items, exclude_seen=False)
            assert set(found["item"]) == set(items)
            np.testing.assert_allclose(
                found["score"], fitted.predict(user, found["item"].tolist()), rtol=0, atol=2e-6
            )
            assert bool((found["score"].diff().dropna() <= 0).all())
            new = [item for item in found["item"] if item in ("new", 10**9)]
            assert new == ["new", 10**9]

    def test_items_that_only_the_test_part_has(self) -> None:
        """Known ids without a training rating: predicted, and so ranked, by the fall-back."""
        model = model_of()
        recommender = LUNetRecommender()
        ratings = latent_ratings()
        recommender._set_trained(recommend.TrainedModel(model, ratings.users, ratings.items, ratings.scale))
        for user in (4, 59):
            found = recommender.recommend(user, N_ITEMS, exclude_seen=False)
            assert sorted(found["item"]) == list(range(N_ITEMS))
            np.testing.assert_allclose(
                found["score"], recommender.predict(user, found["item"]), rtol=0, atol=2e-6
            )
            assert found["item"].tolist() == by_hand(recommender, user, N_ITEMS, range(N_ITEMS), set())

    def test_in_the_ids_of_the_file(self) -> None:
        by_text = LUNetRecommender(**QUICK).fit(latent_frame(text_ids=True))
        users = ["user 7 ü", "user 3 ü", "user 7 ü"]
        found = by_text.recommend(users, 2)
        assert found["user"].tolist() == [user for user in users for _ in range(2)]
        assert set(found["item"]) <= set(by_text.items.ids)
        assert found.iloc[:2]["item"].tolist() == found.iloc[4:]["item"].tolist()

    def test_accepts_what_people_pass(self, fitted: LUNetRecommender) -> None:
        expected = fitted.recommend([3, 7], 3)
        assert expected["user"].dtype == expected["item"].dtype == np.int64
        given: list[Any] = [np.array([3, 7]), torch.tensor([3, 7]), (3, "7"), pd.Series([3, 7]), ["3", "7"]]
        for users in given:
            pd.testing.assert_frame_equal(fitted.recommend(users, 3), expected)
        pd.testing.assert_frame_equal(fitted.recommend("3", 3), expected.head(3))
        pd.testing.assert_frame_equal(fitted.recommend(np.int64(3), np.int64(3)), expected.head(3))
        nobody = fitted.recommend([], 3)
        assert list(nobody.columns) == list(expected.columns)
        assert len(nobody) == 0

    def test_does_not_depend_on_the_batch(
        self, fitted: LUNetRecommender, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        users = [1, 2, "nobody", 3, 1, 59, 0]
        expected = fitted.recommend(users, 5)
        monkeypatch.setattr(recommend, "USERS", 2)
        found = fitted.recommend(users, 5)
        pd.testing.assert_frame_equal(found.drop(columns="score"), expected.drop(columns="score"))
        np.testing.assert_allclose(found["score"], expected["score"], rtol=0, atol=2e-6)

    def test_refused(self, fitted: LUNetRecommender) -> None:
        for k in (0, -1, 2.5, True, "3"):
            with pytest.raises(ValueError, match="must be a whole number of at least 1"):
                fitted.recommend([1], k)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="not trained yet"):
            LUNetRecommender().recommend([1])


class TestWhatIsKept:
    def test_histories_are_summed_once(self, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
        recommender = LUNetRecommender(**QUICK).fit(frame)
        first = recommender.predict([1, 2], [3, 4])
        calls: list[int] = []
        summed = RatingModel.histories
        monkeypatch.setattr(RatingModel, "histories", lambda self: calls.append(1) or summed(self))
        np.testing.assert_array_equal(recommender.predict([1, 2], [3, 4]), first)
        recommender.recommend([1])
        assert calls == []

    def test_a_new_training_forgets_them(self, frame: pd.DataFrame, tmp_path: Path) -> None:
        recommender = LUNetRecommender(**QUICK).fit(frame)
        before = recommender.predict([1, 2], [3, 4])
        recommender.recommend([1])
        other = frame.assign(rating=6 - frame["rating"])
        recommender.fit(other)
        fresh = LUNetRecommender(**QUICK).fit(other)
        after = recommender.predict([1, 2], [3, 4])
        np.testing.assert_array_equal(after, fresh.predict([1, 2], [3, 4]))
        assert not np.array_equal(after, before)
        pd.testing.assert_frame_equal(recommender.recommend([1, 2]), fresh.recommend([1, 2]))
        recommender.save(tmp_path)
        loaded = LUNetRecommender.load(tmp_path)
        pd.testing.assert_frame_equal(loaded.recommend([1, 2]), fresh.recommend([1, 2]))
