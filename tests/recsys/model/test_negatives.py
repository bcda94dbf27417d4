from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lunet_fast.recsys.model.negatives import NegativeSampler
from lunet_fast.recsys.model.network import RatingModel
from tests.recsys.synthetic import latent_ratings, quick_config


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 6), st.integers(2, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_never_draws_a_known_pair(n_users: int, n_items: int, data: st.DataObject) -> None:
    # Up to all items but one are known, so that rejection alone would not get there.
    known = []
    for user in range(n_users):
        items = data.draw(st.sets(st.integers(0, n_items - 1), max_size=n_items - 1))
        known += [user * n_items + item for item in items]
    weights = data.draw(st.sampled_from([None, torch.arange(1, n_items + 1).double()]))
    sampler = NegativeSampler(torch.tensor(sorted(known), dtype=torch.int64), n_items, weights)
    users = torch.arange(n_users).repeat(5)
    drawn = sampler.draw(users, 3, generator())
    assert drawn.shape == (5 * n_users, 3)
    assert bool(((drawn >= 0) & (drawn < n_items)).all())
    assert not set((users.unsqueeze(1) * n_items + drawn).flatten().tolist()) & set(known)


def test_uniform_over_what_is_left() -> None:
    sampler = NegativeSampler(torch.tensor([1, 3]), 5)
    drawn = sampler.draw(torch.zeros(10_000, dtype=torch.int64), 3, generator())
    counts = torch.bincount(drawn.flatten(), minlength=5)
    # 10,000 each, with a standard deviation of 82
    assert counts[[1, 3]].tolist() == [0, 0]
    assert all(abs(count - 10_000) < 410 for count in counts[[0, 2, 4]].tolist())


def test_in_proportion_to_the_weights() -> None:
    weights = torch.tensor([1.0, 100.0, 2.0, 5.0], dtype=torch.float64)
    sampler = NegativeSampler(torch.tensor([1]), 4, weights)
    counts = torch.bincount(
        sampler.draw(torch.zeros(16_000, dtype=torch.int64), 1, generator()).flatten(), minlength=4
    )
    assert counts[1] == 0
    assert all(abs(c - e) < 300 for c, e in zip(counts[[0, 2, 3]].tolist(), (2000, 4000, 10000), strict=True))


def test_refuses_a_user_who_has_everything() -> None:
    with pytest.raises(ValueError, match="all 3 items.*gamma=1"):
        NegativeSampler(torch.tensor([0, 1, 3, 4, 5]), 3)


@pytest.mark.parametrize("outside", ["known", "training"])
def test_leaves_out_all_parts_or_the_training_part(outside: str) -> None:
    ratings = latent_ratings()
    training, rest = ratings.select(torch.arange(0, 900)), ratings.select(torch.arange(900, 1200))
    config = quick_config(gamma=0.5, negatives_outside=outside)
    model = RatingModel(config, training.user, training.item, training.rating, 60, 40)
    pairs = rest.user * 40 + rest.item
    sampler = NegativeSampler.of(model, torch.cat((training.user * 40 + training.item, pairs)))
    users = torch.arange(60).repeat(200)
    drawn = set((users.unsqueeze(1) * 40 + sampler.draw(users, 2, generator())).flatten().tolist())
    assert not drawn & set((training.user * 40 + training.item).tolist())
    assert bool(drawn & set(pairs.tolist())) == (outside == "training")


def test_the_same_generator_draws_the_same() -> None:
    sampler = NegativeSampler(torch.tensor([1, 3, 7]), 5)
    users = torch.tensor([0, 1, 0])
    assert torch.equal(sampler.draw(users, 4, generator(3)), sampler.draw(users, 4, generator(3)))
