"""Recipe sequence: sequences, the state network, its training and its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lunet_fast.recsys.data.order import by_time
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.model_files import is_of_sequences, load_sequences
from lunet_fast.recsys.model.sequence_config import SequenceConfig, settings_of
from lunet_fast.recsys.model.sequence_training import (
    Stretches,
    evaluate_sequences,
    next_item_objective,
    train_sequence,
)
from lunet_fast.recsys.model.sequences import MOST_LEVELS, Sequences, Windows
from lunet_fast.recsys.model.state_network import StateNetwork
from lunet_fast.training.files import CheckpointError
from lunet_fast.training.loop import Interrupted, Progress, Stop
from tests.recsys.synthetic import cyclic_ratings, quick_sequence_config

RATINGS = cyclic_ratings()


def untrained(**changes: object) -> StateNetwork:
    torch.manual_seed(0)
    model = StateNetwork(quick_sequence_config(**changes), Sequences.of(RATINGS, 0)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def training_states(model: StateNetwork, windows: Windows) -> torch.Tensor:
    """Those of its only member."""
    (member,) = model.networks
    windows = windows._replace(side=model.side.of_users(windows.users))
    return member.training_states(windows, member.item_vectors(model.side), lambda x: x)


def states(model: StateNetwork, windows: Windows) -> torch.Tensor:
    return model.states(windows, model.item_vectors())


@pytest.mark.parametrize("sources", [{}, {"order": False}, {"user_history": False}])
@pytest.mark.parametrize("length", [3, 200])
def test_the_states_of_training_are_those_of_serving(sources: dict, length: int) -> None:
    model = untrained(length=length, **sources)
    users = torch.arange(5)
    stop = model.sequences.user_counts[users]
    start = (stop - length).clamp(min=0)
    each = training_states(model, model.sequences.windows(users, start, stop))
    last = each[(stop - start).cumsum(0) - 1]
    torch.testing.assert_close(states(model, model.sequences.last(users, length)), last)


def test_a_state_depends_on_nothing_that_follows() -> None:
    model = untrained()
    users, start, stop = torch.tensor([3]), torch.tensor([0]), torch.tensor([9])
    windows = model.sequences.windows(users, start, stop)
    changed = windows._replace(
        items=torch.cat((windows.items[:, :5], windows.items[:, 5:].flip(1)), 1),
        levels=torch.cat((windows.levels[:, :5], windows.levels[:, 5:] * 0), 1),
        gaps=torch.cat((windows.gaps[:, :5], windows.gaps[:, 5:] * 0), 1),
    )
    before, after = (training_states(model, w) for w in (windows, changed))
    torch.testing.assert_close(before[:5], after[:5], rtol=0, atol=0)
    assert not torch.equal(before[5:], after[5:])


def test_the_state_comes_back() -> None:
    model = untrained()
    x = states(model, model.sequences.last(torch.arange(9), 200))
    torch.testing.assert_close(model.inverse(model.latent(x)), x)
    assert not torch.allclose(model.latent(x), x)
    alone = untrained(network="identity")
    assert torch.equal(alone.latent(x), x)


def test_stretches_hold_every_entry_with_a_next_one_once() -> None:
    sequences = Sequences.of(RATINGS, 0)
    batches = Stretches(sequences, 5, 64)
    generator = torch.Generator().manual_seed(1)
    orders = []
    for epoch in range(2):
        found = list(batches.epoch(epoch, 0, generator))
        assert len(found) == batches.steps
        places = [
            sequences.indptr[user] + torch.arange(start, stop)
            for batch in found
            for user, start, stop in zip(*(column.tolist() for column in batch), strict=True)
        ]
        assert max(map(len, places)) <= 5
        every = torch.arange(len(sequences.items))
        last = sequences.indptr[1:] - 1
        assert torch.equal(torch.cat(places).sort().values, every[~torch.isin(every, last)])
        orders.append(torch.cat(places).tolist())
    assert orders[0] != orders[1]


def test_stretches_go_on_in_the_middle_of_an_epoch() -> None:
    batches = Stretches(Sequences.of(RATINGS, 0), 5, 64)
    whole, rest = (
        [
            tuple(map(torch.Tensor.tolist, b))
            for b in batches.epoch(0, first, torch.Generator().manual_seed(1))
        ]
        for first in (0, 3)
    )
    assert whole[3:] == rest


def test_what_has_no_time_is_drawn_anew() -> None:
    """Of each user the same entries, in another order each epoch; those with a time stay where they are."""
    assert RATINGS.timestamp is not None
    known = torch.arange(len(RATINGS)) % 3 == 0
    mixed = replace(RATINGS, timestamp=RATINGS.timestamp * known)
    given = Sequences.of(mixed, 0)
    first, second = (given.drawn_anew(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    timed = known[torch.from_numpy(by_time(mixed, 0))]
    for drawn in (first, second):
        assert torch.equal(drawn.items[timed], given.items[timed])
        assert torch.equal(drawn.gaps, given.gaps)
        for user in range(given.n_users):
            own = slice(int(given.indptr[user]), int(given.indptr[user + 1]))
            pairs = [
                sorted(zip(s.items[own].tolist(), s.levels[own].tolist(), strict=True))
                for s in (drawn, given)
            ]
            assert pairs[0] == pairs[1]
    assert not torch.equal(first.items, second.items)
    assert Sequences.of(RATINGS, 0).drawn_anew(torch.Generator()).untimed is None
    stretches = Stretches(given, 5, 64)
    orders = []
    for start in (0, 3):
        list(stretches.epoch(0, start, torch.Generator().manual_seed(4)))
        orders.append(stretches.sequences.items)
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(given.items, Sequences.of(mixed, 0).items)


def test_shares_of_a_batch_add_up_to_its_loss() -> None:
    model = untrained(dropout=0.5, negatives=7)
    stretches = Stretches(model.sequences, 5, 64)
    batch = next(stretches.epoch(0, 0, torch.Generator().manual_seed(1)))
    rows = len(batch[0])

    def loss(share: slice) -> torch.Tensor:
        value, error = next_item_objective(model, stretches, batch, share, torch.Generator().manual_seed(2))
        return torch.stack((value, error.double())) * (share.stop - share.start) / rows

    parts = loss(slice(0, 3)) + loss(slice(3, rows))
    torch.testing.assert_close(parts, loss(slice(0, rows)))


def test_what_comes_next_is_learned() -> None:
    """The order says which of two neighbours comes next, and what was chosen does not."""
    values = train_sequence(RATINGS, quick_sequence_config(epochs=30)).metrics
    assert values["full_ndcg@10"] > 0.95
    assert values["reconstruction_error_relative"] < 1e-8
    assert values["held_out_ratings"] == RATINGS.n_users
    without = train_sequence(RATINGS, quick_sequence_config(epochs=30, order=False))
    assert without.metrics["full_ndcg@10"] < 0.93


def test_the_future_changes_no_score() -> None:
    """Whatever is held out, and in which order: training and scores are the same to the last bit."""
    parts = Parts.of(RATINGS, "leave-one-out", 0)
    assert parts.held_out is not None
    config = quick_sequence_config()
    scores = []
    for items in (parts.held_out.item, (parts.held_out.item + 15) % RATINGS.n_items):
        held_out = replace(parts.held_out, item=items)
        rows = [torch.cat((getattr(parts.training, n), getattr(held_out, n))) for n in ("user", "item")]
        assert parts.training.timestamp is not None
        assert held_out.timestamp is not None
        whole = replace(
            RATINGS,
            user=rows[0],
            item=rows[1],
            rating=torch.cat((parts.training.rating, held_out.rating)),
            timestamp=torch.cat((parts.training.timestamp, held_out.timestamp)),
        )
        model = train_sequence(whole, config).trained.model
        scores.append(model.score_users(torch.arange(RATINGS.n_users)))
    assert torch.equal(*scores)


def test_same_seed_same_weights_and_another_seed_others() -> None:
    first, again, other = (
        train_sequence(RATINGS, quick_sequence_config(seed=seed)).trained.model.item_vectors().table
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class StopAfter(Progress):
    def __init__(self, stop: Stop, epochs: int) -> None:
        self.stop, self.left = stop, epochs

    def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
        self.left -= 1
        if self.left == 0:
            self.stop.ask()


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    config = quick_sequence_config(dropout=0.3, negatives=9)
    whole = train_sequence(RATINGS, config, out=tmp_path / "whole")
    stop = Stop()
    with pytest.raises(Interrupted):
        train_sequence(
            RATINGS, config, out=tmp_path / "cut", stop=stop, progress=StopAfter(stop, 2), resume=True
        )
    again = train_sequence(RATINGS, config, out=tmp_path / "cut", resume=True)
    for name, tensor in whole.trained.model.state_dict().items():
        assert torch.equal(tensor, again.trained.model.state_dict()[name]), name
    finished = train_sequence(RATINGS, config, out=tmp_path / "cut", resume=True)
    assert finished.metrics["full_ndcg@10"] == whole.metrics["full_ndcg@10"]
    written = {path.name for path in (tmp_path / "cut").iterdir()}
    assert {
        "config.json",
        "metrics.json",
        "model.safetensors",
        "candidates.safetensors",
        "loss.png",
    } <= written


def test_the_file_has_the_same_scores(tmp_path: Path) -> None:
    trained = train_sequence(RATINGS, quick_sequence_config(), out=tmp_path).trained
    file = tmp_path / "model.safetensors"
    assert is_of_sequences(file)
    loaded = load_sequences(file)
    users = torch.arange(-1, RATINGS.n_users)
    assert torch.equal(loaded.model.score_users(users), trained.model.score_users(users))
    parts = Parts.of(RATINGS, "leave-one-out", 0)
    assert (
        evaluate_sequences(loaded.model, parts).metrics["hr@10"]
        == evaluate_sequences(trained.model, parts).metrics["hr@10"]
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("items", lambda t: t.long()),
        ("items", lambda t: t + 1000),
        ("levels", lambda t: t + 50),
        ("gaps", lambda t: t + 50),
        ("indptr", lambda t: t.flip(0)),
        ("indptr", lambda t: t[:-1]),
        ("bounds", lambda t: t.flip(0)),
        ("items", lambda t: t[:-1]),
    ],
)
def test_sequences_that_do_not_fit(name: str, change: object) -> None:
    state = dict(untrained().sequences.state_dict())
    state[name] = change(state[name])  # type: ignore[operator]
    with pytest.raises(ValueError, match="sequences"):
        Sequences.from_state(state, RATINGS.n_users, RATINGS.n_items)


def test_a_file_whose_tensors_do_not_fit_its_settings(tmp_path: Path) -> None:
    from lunet_fast.recsys.model.model_files import save_sequences

    trained = train_sequence(RATINGS, quick_sequence_config(epochs=1)).trained
    trained.model.config = quick_sequence_config(embedding_size=16)
    save_sequences(tmp_path / "m.safetensors", trained)
    with pytest.raises(CheckpointError, match="do not fit the model's settings"):
        load_sequences(tmp_path / "m.safetensors")


def test_ratings_by_class() -> None:
    many = replace(RATINGS, rating=torch.linspace(-10, 10, len(RATINGS)), scale=(-10.0, 10.0))
    sequences = Sequences.of(many, 0)
    counts = torch.bincount(sequences.levels.long())
    assert sequences.n_levels == len(counts) == MOST_LEVELS
    assert int(counts.max() - counts.min()) <= 2
    few = Sequences.of(RATINGS, 0)
    assert few.n_levels == len(torch.unique(RATINGS.rating))


def test_nothing_to_learn_from() -> None:
    two_each = torch.cat([(RATINGS.user == user).nonzero()[:2, 0] for user in range(RATINGS.n_users)])
    with pytest.raises(ValueError, match="no user has two training ratings"):
        train_sequence(RATINGS.select(two_each), quick_sequence_config())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": False, "user_history": False}, "nothing to know a user by"),
        ({"length": 300, "batch_size": 200}, "length=300"),
        ({"gamma": 0.5}, "gamma"),
        ({"network": "mlp"}, "network"),
        ({"split": "random"}, "split"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of("sequence", 1000, **settings)


def test_recipes_by_name() -> None:
    assert isinstance(settings_of("sequence", 1000), SequenceConfig)
    assert settings_of("best", 1000).recipe == "best"
    with pytest.raises(ValueError, match="paper, best, auto, sequence"):
        settings_of("worst", 1000)
