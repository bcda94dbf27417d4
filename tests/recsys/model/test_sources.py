"""Sources of recipe sequence beside order and history: features, texts, ties, counts; and its members."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast.recsys.data.ratings import Ratings, Ties, from_frame
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.model_files import load_sequences, save_sequences
from lunet_fast.recsys.model.sequence_config import SequenceConfig
from lunet_fast.recsys.model.sequence_training import (
    Stretches,
    evaluate_sequences,
    next_item_objective,
    train_sequence,
)
from lunet_fast.recsys.model.sequences import Sequences
from lunet_fast.recsys.model.side import Side
from lunet_fast.recsys.model.state_network import StateNetwork
from lunet_fast.training.files import CheckpointError
from tests.recsys.synthetic import paused_ratings, quick_sequence_config

SOURCES: dict[str, dict[str, bool]] = {
    "features": {"side_features": True},
    "text": {"text": True},
    "social": {"social": True},
    "elapsed": {"elapsed": True},
    "text alone": {"text": True, "identity": False},
    "all": {"side_features": True, "text": True, "social": True, "elapsed": True},
}


def known_ratings() -> Ratings:
    """Ratings of users and items of which everything is known; the last user has no friend."""
    ratings = paused_ratings()
    generator = torch.Generator().manual_seed(0)
    n = ratings.n_users
    ends = torch.randint(n - 1, (2, 3 * n), generator=generator)
    ends = ends[:, ends[0] != ends[1]]
    return replace(
        ratings,
        item_info=pd.DataFrame({"genres": [("War|Drama", "Drama", "Comedy")[i % 3] for i in range(30)]}),
        user_info=pd.DataFrame({"age": np.arange(n) + 15}),
        item_text=torch.randn(30, 5, generator=generator),
        friends=Ties(ends[0], ends[1], torch.rand(ends.shape[1], generator=generator) + 0.5),
        weight=torch.rand(len(ratings), generator=generator) + 0.1,
    )


RATINGS = known_ratings()


def untrained(**settings: object) -> StateNetwork:
    torch.manual_seed(0)
    config = quick_sequence_config(**settings)
    model = StateNetwork(config, Sequences.of(RATINGS, 0), Side.of(RATINGS, config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("length", [3, 200])
def test_the_states_of_training_are_those_of_serving(source: str, length: int) -> None:
    model = untrained(length=length, **SOURCES[source])
    users = torch.tensor([0, 1, 7, 39])
    # After the last entry but one, whose next one is known, so that so is the time until then.
    stop = model.sequences.user_counts[users] - 1
    windows = model.sequences.windows(users, (stop - length).clamp(min=0), stop)
    windows = windows._replace(side=model.side.of_users(users))
    (member,) = model.networks
    each = member.training_states(windows, member.item_vectors(model.side), lambda x: x)
    last = each[windows.lengths.cumsum(0) - 1]
    torch.testing.assert_close(model.states(windows, model.item_vectors()), last)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_changes_what_is_scored(source: str) -> None:
    plain, told = untrained(), untrained(**SOURCES[source])
    for name, parameter in told.named_parameters():
        if name in dict(plain.named_parameters()):
            with torch.no_grad():
                parameter.copy_(dict(plain.named_parameters())[name])
    users = torch.arange(RATINGS.n_users)
    late = torch.ones_like(users) if source == "elapsed" else None
    assert not torch.allclose(plain.score_users(users), told.score_users(users, late), atol=1e-3)


@pytest.mark.parametrize("source", [*SOURCES, "members"])
def test_the_file_has_the_same_scores(source: str, tmp_path: Path) -> None:
    settings = SOURCES.get(source, {"members": 3})
    result = train_sequence(RATINGS, quick_sequence_config(epochs=1, **settings))
    save_sequences(tmp_path / "m.safetensors", result.trained)
    loaded = load_sequences(tmp_path / "m.safetensors").model
    users = torch.arange(-1, RATINGS.n_users)
    assert torch.equal(loaded.score_users(users), result.trained.model.score_users(users))
    parts = Parts.of(RATINGS, "leave-one-out", 0)
    assert evaluate_sequences(loaded, parts).figures["by_gap"] == result.metrics["by_gap"]
    assert result.metrics["reconstruction_error_relative"] < 1e-8


@pytest.mark.parametrize("source", SOURCES)
def test_the_future_changes_no_state(source: str) -> None:
    model = untrained(**SOURCES[source])
    users, start, stop = torch.tensor([3]), torch.tensor([0]), torch.tensor([9])
    windows = model.sequences.windows(users, start, stop)._replace(side=model.side.of_users(users))
    changed = windows._replace(
        items=torch.cat((windows.items[:, :5], windows.items[:, 5:].flip(1)), 1),
        gaps=torch.cat((windows.gaps[:, :5], windows.gaps[:, 5:] * 0), 1),
        elapsed=torch.cat((windows.elapsed[:, :5], 1 - windows.elapsed[:, 5:].clamp(max=1)), 1),
    )
    (member,) = model.networks
    vectors = member.item_vectors(model.side)
    before, after = (member.training_states(w, vectors, lambda x: x) for w in (windows, changed))
    torch.testing.assert_close(before[:5], after[:5], rtol=0, atol=0)
    assert not torch.equal(before[5:], after[5:])


class TestMembers:
    def test_the_score_is_the_mean_of_theirs(self) -> None:
        model = untrained(members=3)
        users = torch.arange(RATINGS.n_users)
        whole, alone = model.score_users(users), []
        for member in model.networks:
            one = untrained()
            one.members[0].load_state_dict(member.state_dict())
            alone.append(one.score_users(users))
        torch.testing.assert_close(torch.stack(alone).mean(0), whole)
        assert not torch.allclose(alone[0], alone[1])

    def test_the_first_learns_what_it_would_alone(self) -> None:
        """They share batches and negatives, and no parameter: with nothing drawn else, each is on its own."""
        config = quick_sequence_config(members=2, epochs=2)
        two = train_sequence(RATINGS, config).trained.model
        one = train_sequence(RATINGS, quick_sequence_config(epochs=2)).trained.model
        for name, tensor in one.networks[0].state_dict().items():
            torch.testing.assert_close(two.networks[0].state_dict()[name], tensor, msg=name)
        assert two.networks[0].state_dict().keys() == two.networks[1].state_dict().keys()

    def test_the_state_comes_back(self) -> None:
        model = untrained(members=2)
        items = model.item_vectors()
        x = model.states(model.sequences.last(torch.arange(9), 200), items)
        assert x.shape == (9, 16)
        torch.testing.assert_close(model.inverse(model.latent(x)), x, rtol=1e-4, atol=1e-5)


class TestText:
    def test_items_that_nobody_chose_are_ranked_by_it(self) -> None:
        """Users of two tastes; of the items that are in no training part, each likes those of its own."""
        rng = np.random.default_rng(0)
        rows = [
            (user, item, step)
            for user in range(60)
            for step, item in enumerate(rng.permutation(np.arange(user % 2, 40, 2))[:12])
        ]
        frame = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
        ratings = from_frame(frame.assign(timestamp=frame["timestamp"] + 1), rating=None)
        cold = ratings.item >= 30
        topics = torch.eye(2)[torch.arange(40) % 2] + 0.1 * torch.randn(40, 2)
        training = replace(ratings.select(~cold), item_text=topics)
        config = quick_sequence_config(split="none", text=True, epochs=12)
        model = train_sequence(training, config).trained.model
        users = torch.arange(60)
        scores = model.score_users(users)[:, 30:]
        own = (torch.arange(30, 40) % 2) == (users % 2).unsqueeze(1)
        better = scores[own].view(60, 5, 1) > scores[~own].view(60, 1, 5)
        assert better.float().mean() > 0.95
        # Nothing else tells the cold ones apart.
        table = model.networks[0].item_sources["identity"].table
        assert not table[30:].any()
        assert not model.networks[0].bias[30:].any()
        assert table[:30].any(1).all()

    def test_something_must_tell_items_apart(self) -> None:
        with pytest.raises(ValueError, match="identity=False leaves nothing to know an item by"):
            untrained(identity=False)
        with pytest.raises(ValueError, match="text=True: paused has no texts"):
            Side.of(paused_ratings(), SequenceConfig(text=True))
        with pytest.raises(ValueError, match="side_features=True: paused has no features"):
            Side.of(paused_ratings(), SequenceConfig(side_features=True))


class TestSocial:
    def test_bags_by_hand(self) -> None:
        frame = pd.DataFrame({"user": [0, 1, 1, 2, 2, 2, 2], "item": [0, 0, 1, 1, 2, 3, 4]})
        ratings = from_frame(frame, rating=None)
        ties = Ties(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 0]), torch.tensor([3.0, 4.0, 2.0]))
        side = Side.of(replace(ratings, friends=ties), SequenceConfig(social=True))
        bags = side.of_users(torch.tensor([1, 0, 2, -1])).friends
        assert bags is not None
        assert bags.counts.tolist() == [1, 5, 0, 0]
        assert bags.items.tolist() == [0, 0, 1, 2, 3, 4]
        # 3/5 over the root of the two items of user 1, 4/5 over that of the four of user 2.
        first, second = 0.6 / 2**0.5, 0.8 / 2
        expected = [1.0, first, first + second, second, second, second]
        torch.testing.assert_close(bags.weights, torch.tensor(expected))

    def test_the_company_a_user_keeps_says_what_it_chooses(self) -> None:
        """Users of 8 clubs, each with a film of its own: a newcomer's one film says nothing of its club."""
        rng = np.random.default_rng(0)
        rows = []
        for user in range(160):
            club = user % 8
            films = [40 + user % 5, *(club * 5 + rng.permutation(5))]
            rows += [(user, film, step + 1) for step, film in enumerate(films[: 2 if user >= 80 else 6])]
        ratings = from_frame(pd.DataFrame(rows, columns=["user", "item", "timestamp"]), rating=None)
        user = torch.arange(160).repeat_interleave(4)
        friend = (
            user + 8 * torch.randint(1, 10, user.shape, generator=torch.Generator().manual_seed(1))
        ) % 80
        friend = friend - friend % 8 + user % 8
        ratings = replace(ratings, friends=Ties(user, friend, torch.ones(len(user))))
        hits = {}
        for social in (False, True):
            config = quick_sequence_config(social=social, epochs=20, embedding_size=16, order=False)
            parts = Parts.of(ratings, "leave-one-out", 0)
            model = train_sequence(ratings, config).trained.model
            assert parts.held_out is not None
            new = parts.held_out.user >= 80
            scores = model.score_users(parts.held_out.user[new])
            club = (parts.held_out.user[new] % 8).unsqueeze(1)
            hits[social] = float((scores[:, :40].argmax(1, keepdim=True) // 5 == club).float().mean())
        assert hits[True] > 0.9
        assert hits[False] < 0.4

    def test_without_ties(self) -> None:
        with pytest.raises(ValueError, match="social=True: paused has no ties"):
            Side.of(paused_ratings(), SequenceConfig(social=True))


class TestConfidence:
    def test_an_entry_counts_as_often_as_its_weight_says(self) -> None:
        """The loss is that of single entries, each weighed."""
        share = 2.0
        model = untrained(confidence=share, batch_size=10_000).double()
        sequences = model.sequences
        stretches = Stretches(sequences, 200, 10_000)
        batch = next(stretches.epoch(0, 0, torch.Generator().manual_seed(1)))
        whole, _ = next_item_objective(
            model, stretches, batch, slice(0, len(batch[0])), torch.Generator().manual_seed(1)
        )
        weight = RATINGS.weight
        assert weight is not None
        logs = torch.log1p(weight / weight.median()).double()
        counted = (1 + share * logs) / (1 + share * logs.mean())
        items, total, count = model.item_vectors(), 0.0, 0
        for user in range(RATINGS.n_users):
            rows = (RATINGS.user == user).nonzero().squeeze(1)
            assert RATINGS.timestamp is not None
            rows = rows[RATINGS.timestamp[rows].argsort()]
            for stop in range(1, len(rows)):
                windows = sequences.windows(*(torch.tensor([n]) for n in (user, 0, stop)))
                scores = model.scores(model.latent(model.states(windows, items)), items)[0]
                total -= float(scores.detach().log_softmax(0)[RATINGS.item[rows[stop]]] * counted[rows[stop]])
                count += 1
        assert float(whole.detach()) == pytest.approx(total / count, rel=1e-6)

    def test_equal_weights_are_none(self) -> None:
        plain = replace(RATINGS, weight=torch.full((len(RATINGS),), 7.0))
        tables = [
            train_sequence(plain, quick_sequence_config(epochs=1, confidence=c)).trained.model.item_vectors()
            for c in (0.0, 3.0)
        ]
        torch.testing.assert_close(tables[0].table, tables[1].table)

    def test_without_weights(self) -> None:
        with pytest.raises(ValueError, match="confidence=2: paused has no weights"):
            Side.of(paused_ratings(), SequenceConfig(confidence=2))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("item_text", lambda t: t[:-1]),
        ("item_text", lambda t: t * float("nan")),
        ("item_features", lambda t: t.double()),
        ("user_features", lambda t: t[0]),
        ("friends_items", lambda t: t + 100),
        ("friends_items", lambda t: t.long()),
        ("friends_indptr", lambda t: t.flip(0)),
        ("friends_weights", lambda t: t[:-1]),
        ("friends_weights", lambda t: t / 0),
        ("friends_weights", None),
        ("anything", lambda t: torch.zeros(3)),
    ],
)
def test_tables_that_do_not_fit(name: str, change: object, tmp_path: Path) -> None:
    trained = train_sequence(RATINGS, quick_sequence_config(epochs=1, **SOURCES["all"])).trained
    state = dict(trained.model.side.state_dict())
    if change is None:
        del state[name]
    else:
        state[name] = change(state.get(name))  # type: ignore[operator]
    with pytest.raises(ValueError, match="side"):
        Side.from_state(state, RATINGS.n_users, RATINGS.n_items)
    trained.model.config = quick_sequence_config()
    save_sequences(tmp_path / "m.safetensors", trained)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_sequences(tmp_path / "m.safetensors")
