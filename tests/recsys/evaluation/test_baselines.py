"""Every method finds what was planted, under our indices, and leaves no trace."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from lunet_fast.recsys.data.ratings import IdMap, Ratings, Ties
from lunet_fast.recsys.evaluation import adapters
from lunet_fast.recsys.evaluation import fitted as fitting
from lunet_fast.recsys.evaluation.baselines import BASELINES, SIZES, missing
from lunet_fast.recsys.evaluation.fitted import Fitted, mean_of
from lunet_fast.recsys.evaluation.peer_settings import settings_for

ONE_RUN = [key for key, baseline in BASELINES.items() if baseline.runs == 1]
RATING = [key for key in ONE_RUN if "rating" in BASELINES[key].kinds]
RANKING = [key for key in ONE_RUN if "ranking" in BASELINES[key].kinds]
OURS = [key for key, baseline in BASELINES.items() if baseline.package == "ours"]

# Users and items without ratings, at both ends and in between: numbering anew would move the others.
UNRATED = [0, 17, -1]


def table(user: Tensor, item: Tensor, rating: Tensor, users: int, items: int) -> Ratings:
    return Ratings(
        "planted", user, item, rating.float(), None, IdMap(range(users)), IdMap(range(items)), (1.0, 5.0)
    )


def spread(n: int) -> tuple[Tensor, int]:
    """Indices for n users or items with gaps at UNRATED, in no order, and how many there are with them."""
    total = n + len(UNRATED)
    index = np.setdiff1d(np.arange(total), [gap % total for gap in UNRATED])
    return torch.from_numpy(np.random.default_rng(9).permutation(index)), total


@cache
def planted_ratings() -> tuple[Ratings, Ratings]:
    """(training, test): biases, and a taste that biases do not explain."""
    rng = np.random.default_rng(0)
    n_users, n_items, n = 150, 100, 7500
    pairs = rng.permutation(n_users * n_items)[:n]
    user, item = pairs // n_items, pairs % n_items
    rating = 3 + rng.normal(0, 0.5, n_users)[user] + rng.normal(0, 0.5, n_items)[item]
    rating += rng.choice([-0.7, 0.7], n_users)[user] * rng.choice([-1, 1], n_items)[item]
    rating += rng.normal(0, 0.1, n)
    (users, total_users), (items, total_items) = spread(n_users), spread(n_items)
    all_rows = table(users[user], items[item], torch.from_numpy(rating), total_users, total_items)
    is_test = torch.arange(n) < 1000
    return all_rows.select(~is_test), all_rows.select(is_test)


@cache
def planted_groups() -> tuple[Ratings, Tensor, Tensor]:
    """(training, group of each user, group of each item, -1 for the unrated): most choose within a group."""
    rng = np.random.default_rng(1)
    n_users, n_items, groups = 600, 80, 4
    in_group = np.arange(n_users)[:, None] % groups == np.arange(n_items) % groups
    chosen = rng.random((n_users, n_items)) < np.where(in_group, 0.5, 0.03)
    user, item = rng.permutation(np.argwhere(chosen)).T
    (users, total_users), (items, total_items) = spread(n_users), spread(n_items)
    rating = torch.from_numpy(rng.integers(1, 6, len(user)))
    training = table(users[user], items[item], rating, total_users, total_items)
    group_of_user, group_of_item = torch.full((total_users,), -1), torch.full((total_items,), -1)
    group_of_user[users], group_of_item[items] = (
        torch.arange(n_users) % groups,
        torch.arange(n_items) % groups,
    )
    return training, group_of_user, group_of_item


@cache
def fitted(key: str) -> Fitted:
    """The method trained on what is planted for it."""
    needs(key)
    training = planted_ratings()[0] if key in RATING else planted_groups()[0]
    return BASELINES[key].fit(training, 0, "ml-100k")


def small(ratings: int = 300) -> Ratings:
    rng = np.random.default_rng(2)
    pairs = torch.from_numpy(rng.permutation(30 * 20)[:ratings])
    return table(pairs // 20, pairs % 20, torch.from_numpy(rng.integers(1, 6, ratings)), 30, 20)


def needs(key: str) -> None:
    reason = missing(BASELINES[key])
    if reason is not None:
        pytest.skip(reason)


def numpy_state() -> list[int]:
    """Of the generator that packages draw from where they do not make one."""
    _, key, place, *_ = np.random.get_state()  # noqa: NPY002
    return [*key.tolist(), place]


def test_keys_and_names_are_distinct() -> None:
    assert len({baseline.name for baseline in BASELINES.values()}) == len(BASELINES)
    assert set(RATING) | set(RANKING) == set(ONE_RUN)
    assert all(key == baseline.key for key, baseline in BASELINES.items())


def test_a_mean_of_runs_is_that_of_their_predictions() -> None:
    needs("mf-mean")
    training = small()
    mean, one = BASELINES["mf-mean"], BASELINES["mf"]
    seeds = [(5 + run * 1_000_003) % 2**31 for run in range(mean.runs)]
    runs = [one.fit(training, seed, "ml-100k") for seed in seeds]
    predictions = [run.predict(training.user, training.item) for run in runs]
    expected = sum(prediction.double() for prediction in predictions if prediction is not None) / mean.runs
    found = mean.fit(training, 5, "ml-100k")
    prediction = found.predict(training.user, training.item)
    assert prediction is not None
    torch.testing.assert_close(prediction.double(), expected, rtol=1e-6, atol=1e-6)
    assert predictions[0] is not None
    assert not torch.equal(predictions[0], prediction)
    assert found.parameters == mean.runs * runs[0].parameters
    assert found.score_items(training.user) is None


def test_a_mean_of_scores() -> None:
    ones = [Fitted(3, score_items=lambda users, k=k: torch.full((len(users), 2), float(k))) for k in (1, 2)]
    found = mean_of(ones)
    scores = found.score_items(torch.arange(4))
    assert scores is not None
    assert torch.equal(scores, torch.full((4, 2), 1.5))
    assert found.predict(torch.arange(4), torch.arange(4)) is None


def test_side_features_reach_who_reads_them() -> None:
    """Ratings that the genre alone explains, of items that were never rated."""
    needs("bayesian-fm-side")
    rng = np.random.default_rng(3)
    n_users, n_items = 60, 60
    likes, genre = torch.arange(n_users) % 2, torch.arange(n_items) // 2 % 2
    pairs = torch.from_numpy(rng.permutation(n_users * n_items)[:2500])
    user, item = pairs // n_items, pairs % n_items
    rating = 3 + 1.5 * (2 * (likes[user] == genre[item]) - 1)
    cold = item >= n_items - 8
    info = pd.DataFrame({"genres": ["Drama" if g else "War" for g in genre]})
    known = replace(table(user, item, rating, n_users, n_items), item_info=info)
    errors = {}
    for key in ("bayesian-fm", "bayesian-fm-side"):
        prediction = BASELINES[key].fit(known.select(~cold), 0, "ml-100k").predict(user[cold], item[cold])
        assert prediction is not None
        errors[key] = float((prediction - rating[cold]).square().mean())
    assert errors["bayesian-fm-side"] < 0.3 * errors["bayesian-fm"]


@pytest.mark.parametrize("key", RATING)
def test_ratings_are_found(key: str) -> None:
    method = fitted(key)
    training, test = planted_ratings()
    prediction = method.predict(test.user, test.item)
    assert prediction is not None
    assert prediction.dtype == torch.float32
    assert prediction.shape == (len(test),)
    error = float((prediction - test.rating).square().mean())
    of_mean = float((training.rating.mean() - test.rating).square().mean())
    # The taste is about half of the variance, and biases cannot know it.
    assert error < (0.7 if key == "biases" else 0.3) * of_mean
    assert method.score_items(test.user) is None


@pytest.mark.parametrize("key", RATING)
def test_ratings_of_unknown_users_and_items(key: str) -> None:
    method = fitted(key)
    training, test = planted_ratings()
    users, items = test.user[:20], test.item[:20]
    nobody = torch.tensor([u % training.n_users for u in UNRATED])
    nothing = torch.tensor([i % training.n_items for i in UNRATED])
    assert not torch.isin(nobody, training.user).any()
    assert not torch.isin(nothing, training.item).any()
    mean = training.rating.mean()
    of_user = torch.stack([training.rating[training.user == user].mean() for user in users]).repeat(3)
    of_item = torch.stack([training.rating[training.item == item].mean() for item in items]).repeat(3)
    for pairs, sensible in (
        ((nobody, nothing), mean),
        ((nobody.repeat_interleave(20), items.repeat(3)), of_item),
        ((users.repeat(3), nothing.repeat_interleave(20)), of_user),
    ):
        prediction = method.predict(*pairs)
        assert prediction is not None
        assert bool(((prediction - sensible).abs() < 1).all())


@pytest.mark.parametrize("key", RANKING)
def test_rankings_are_found(key: str) -> None:
    method = fitted(key)
    training, group_of_user, group_of_item = planted_groups()
    users = torch.arange(training.n_users)[group_of_user >= 0].flip(0)
    scores = method.score_items(users)
    assert scores is not None
    assert scores.dtype == torch.float32
    assert scores.shape == (len(users), training.n_items)
    assert bool(torch.isfinite(scores).all())
    seen = torch.zeros(training.n_users, training.n_items, dtype=torch.bool)
    seen[training.user, training.item] = True
    rated = group_of_item >= 0
    like = group_of_user[users].unsqueeze(1) == group_of_item
    right = wrong = 0.0
    for row in range(len(users)):
        unseen = ~seen[users[row]] & rated
        wanted, others = scores[row][unseen & like[row]], scores[row][unseen & ~like[row]]
        right += float((wanted.unsqueeze(1) > others).double().mean())
        wrong += float((wanted.unsqueeze(1) < others).double().mean())
    share = 0.5 + 0.5 * (right - wrong) / len(users)
    # Every group is as popular as another.
    if key == "popularity":
        assert abs(share - 0.5) < 0.1
    else:
        assert share > 0.9
    assert method.predict(training.user, training.item) is None


@pytest.mark.parametrize("key", RANKING)
def test_rankings_of_unknown_users_and_items(key: str) -> None:
    method = fitted(key)
    training, _, group_of_item = planted_groups()
    nobody = torch.tensor([u % training.n_users for u in UNRATED])
    scores = method.score_items(nobody)
    assert scores is not None
    assert scores.shape == (3, training.n_items)
    assert bool(torch.isfinite(scores).all())
    # Items that nobody chose do not lead anybody's list.
    everybody = method.score_items(torch.arange(training.n_users))
    assert everybody is not None
    best = everybody[torch.unique(training.user)].argmax(1)
    assert bool((group_of_item[best] >= 0).all())


@pytest.mark.parametrize("key", ONE_RUN)
def test_reproducible_and_without_a_trace(key: str, capfd: pytest.CaptureFixture[str]) -> None:
    needs(key)
    training = small()
    capfd.readouterr()
    torch.manual_seed(5)
    before = torch.get_rng_state(), numpy_state(), torch.get_num_threads()
    methods = [BASELINES[key].fit(training, 3, "ml-100k") for _ in range(2)]
    outputs = [
        method.predict(training.user, training.item) if key in RATING else method.score_items(training.user)
        for method in methods
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert numpy_state() == before[1]
    assert torch.get_num_threads() == before[2]
    assert torch.get_default_dtype() == torch.float32
    assert capfd.readouterr() == ("", "")
    assert methods[0].parameters == methods[1].parameters >= 0


@pytest.mark.parametrize("key", RANKING)
def test_any_rating_is_an_interaction(key: str) -> None:
    needs(key)
    training = small(150)
    zeros = replace(training, rating=torch.zeros_like(training.rating), scale=(0.0, 5.0))
    scores = [BASELINES[key].fit(part, 0, "ml-100k").score_items(training.user) for part in (training, zeros)]
    assert torch.equal(scores[0], scores[1])


@pytest.mark.parametrize("key", RANKING)
def test_a_user_may_have_rated_all_items(key: str) -> None:
    needs(key)
    some = small(150)
    rest = some.user != 4
    user = torch.cat((some.user[rest], torch.full((20,), 4)))
    item = torch.cat((some.item[rest], torch.arange(20)))
    scores = (
        BASELINES[key].fit(table(user, item, torch.ones(len(user)), 30, 20), 0, "ml-100k").score_items(user)
    )
    assert bool(torch.isfinite(scores).all())


@pytest.mark.parametrize("key", ["popularity", "biases", "ease", "knn"])
def test_names_of_users_and_items_mean_nothing(key: str) -> None:
    needs(key)
    training = small()
    rng = np.random.default_rng(4)
    users, items = (torch.from_numpy(rng.permutation(n)) for n in (30, 20))
    renamed = replace(training, user=users[training.user], item=items[training.item])
    renamed = renamed.select(rng.permutation(len(renamed)))
    here, there = (BASELINES[key].fit(part, 0, "ml-100k") for part in (training, renamed))
    if key in RATING:
        user, item = torch.cartesian_prod(torch.arange(30), torch.arange(20)).T
        found, expected = there.predict(users[user], items[item]), here.predict(user, item)
    else:
        found = there.score_items(users[torch.arange(30)])[:, items]
        expected = here.score_items(torch.arange(30))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", [*ONE_RUN, "mf-mean"])
def test_large_seed(key: str) -> None:
    needs(key)
    BASELINES[key].fit(small(), 2**63 - 1, "ml-100k")


@pytest.mark.parametrize("key", ["ease", "neumf", "mlp-ce"])
def test_scoring_in_parts(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(key)
    training = small()
    users = torch.arange(30)
    whole = BASELINES[key].fit(training, 0, "ml-100k").score_items(users)
    monkeypatch.setattr(fitting, "CHUNK", 1)
    parts = BASELINES[key].fit(training, 0, "ml-100k").score_items(users)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("size", list(SIZES))
def test_ease_is_cornacs(size: str) -> None:
    models = pytest.importorskip("cornac.models")
    data = pytest.importorskip("cornac.data")
    training = small()
    users, items = torch.unique(training.user), torch.unique(training.item)
    rows = zip(training.user.tolist(), training.item.tolist(), [1.0] * len(training), strict=True)
    known = data.Dataset.from_uir(list(rows))
    model = models.EASE(lamb=settings_for("ease", size)["l2"], posB=False, verbose=False).fit(known)
    scores = BASELINES["ease"].fit(training, 0, size).score_items(users)
    columns = [known.iid_map[i] for i in items.tolist()]
    expected = np.stack([model.score(known.uid_map[u]).ravel()[columns] for u in users.tolist()])
    np.testing.assert_allclose(scores[:, items].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_biases_are_surprises() -> None:
    surprise = pytest.importorskip("surprise")
    import pandas as pd

    training = small()
    frame = pd.DataFrame({"u": training.user, "i": training.item, "r": training.rating})
    reader = surprise.Reader(rating_scale=(1, 5))
    settings = settings_for("biases", "ml-100k")
    options = {
        "method": "als",
        "reg_u": settings["l2_user"],
        "reg_i": settings["l2_item"],
        "n_epochs": 30,
    }
    model = surprise.BaselineOnly(options, verbose=False)
    model.fit(surprise.Dataset.load_from_df(frame, reader).build_full_trainset())
    prediction = BASELINES["biases"].fit(training, 0, "ml-100k").predict(training.user, training.item)
    pairs = zip(training.user.tolist(), training.item.tolist(), strict=True)
    expected = [model.predict(u, i, clip=False).est for u, i in pairs]
    np.testing.assert_allclose(prediction.numpy(), expected, rtol=1e-6)


def test_predictions_are_not_clipped() -> None:
    # A user who loves everything, and an item that everybody loves.
    user = torch.cat((torch.full((30,), 0), torch.arange(1, 30), torch.arange(1, 30)))
    item = torch.cat((torch.arange(1, 31), torch.full((29,), 0), torch.arange(1, 30)))
    rating = torch.cat((torch.full((59,), 5.0), torch.ones(29)))
    method = BASELINES["biases"].fit(table(user, item, rating, 30, 31), 0, "ml-100k")
    assert float(method.predict(torch.tensor([0]), torch.tensor([0]))) > 5


def test_parameters() -> None:
    assert fitted("popularity").parameters == 0
    training = planted_ratings()[0]
    assert fitted("biases").parameters == 1 + training.n_users + training.n_items
    assert fitted("ease").parameters == 83 * 82
    if missing(BASELINES["mf"]) is None:
        factors = settings_for("mf", "ml-100k")["factors"]
        assert fitted("mf").parameters == 1 + (factors + 1) * (training.n_users + training.n_items)


@pytest.mark.parametrize("key", list(BASELINES))
def test_missing(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", fail)
    baseline = BASELINES[key]
    if key in OURS:
        assert missing(baseline) is None
        return
    reason = missing(baseline)
    assert reason is not None
    assert baseline.package in reason
    assert 'pip install "lunet-fast[baselines]"' in reason
    with pytest.raises(ImportError, match="lunet-fast"):
        baseline.fit(small(), 0, "ml-100k")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="size='ml-20m' has no settings: use one of ml-100k, ml-1m"):
        BASELINES["popularity"].fit(small(), 0, "ml-20m")
    with pytest.raises(ValueError, match="training is empty"):
        BASELINES["popularity"].fit(small().select([]), 0, "ml-100k")


def test_what_friends_alone_rated() -> None:
    """Against loops, on a random graph with ties both ways and none."""
    training = small(150)
    rng = np.random.default_rng(4)
    pairs = torch.from_numpy(rng.integers(0, 30, (80, 2)))
    ends = pairs[pairs[:, 0] != pairs[:, 1]].unique(dim=0).T
    ties = Ties(ends[0], ends[1], torch.ones(ends.shape[1]))
    rated = [set(training.item[training.user == u].tolist()) for u in range(30)]
    items, counts, start = adapters._of_friends_alone(training, ties)
    for u in range(30):
        friends = ends[1][ends[0] == u].tolist()
        expected = Counter(i for friend in friends for i in rated[friend] if i not in rated[u])
        own = slice(start[u], start[u + 1])
        assert dict(zip(items[own].tolist(), counts[own].tolist(), strict=True)) == dict(expected)


def test_friends_reach_who_reads_them() -> None:
    """Users with a rating or two, whose friends are of their group: what the group rated comes first."""
    needs("bpr")
    training, group_of_user, group_of_item = planted_groups()
    thin = torch.arange(training.n_users) % 5 == 0
    kept = torch.arange(len(training)) % 15 == 0
    few = training.select(~thin[training.user] | kept)
    members = [torch.nonzero(group_of_user == group).flatten() for group in range(4)]
    ends = torch.cat([torch.stack((some, some.roll(k))) for some in members for k in (1, 2)], 1)
    tied = replace(few, friends=Ties(ends[0], ends[1], torch.ones(ends.shape[1])))
    users = torch.nonzero(thin & (group_of_user >= 0)).flatten()
    users = users[torch.isin(users, few.user)]
    with adapters.undisturbed():
        scores = adapters.social_bpr(
            tied, 0, {"factors": 8, "rate": 0.05, "l2": 0.01, "epochs": 60}
        ).score_items(users)
    assert scores is not None
    own = group_of_user[users][:, None] == group_of_item[None]
    better = scores.where(own, torch.nan).nanmean(1) > scores.where(~own, torch.nan).nanmean(1)
    assert float(better.float().mean()) > 0.9
    with pytest.raises(ValueError, match="friends"):
        adapters.social_bpr(few, 0, {})


def test_titles_place_items_without_ratings() -> None:
    needs("bpr")
    training, group_of_user, group_of_item = planted_groups()
    cold = torch.arange(training.n_items) % 4 == 0
    words = ["", "storm sea ship", "war tank front", "love heart kiss", "robot space laser"]
    titles = pd.DataFrame({"title": [words[int(g) + 1] for g in group_of_item]})
    known = replace(training.select(~cold[training.item]), item_info=titles)
    settings = {"topics": 8, "epochs": 20, "l2": 0.01, "l2_topics": 10.0, "unrated": 0.01}
    users = torch.arange(training.n_users)[group_of_user >= 0]
    with adapters.undisturbed():
        scores = adapters.topic_regression(known, 0, settings).score_items(users)
    assert scores is not None
    wanted = cold & (group_of_item >= 0)
    own = group_of_user[users][:, None] == group_of_item[wanted][None]
    means = [float(scores[:, wanted][which].mean()) for which in (own, ~own)]
    assert means[0] > 0.2 + means[1]
    with pytest.raises(ValueError, match="titles"):
        adapters.topic_regression(training, 0, settings)
