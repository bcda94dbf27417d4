"""SASRec and GRU4Rec: what they may look at, and that they learn what comes next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lunet_fast.recsys.evaluation.peer_settings import settings_for
from lunet_fast.recsys.evaluation.sequence_networks import (
    GRU4Rec,
    Reader,
    SASRec,
    Settings,
    fitted,
    gru4rec,
)
from lunet_fast.recsys.measures.protocols import Parts, evaluate_ranking
from tests.recsys.synthetic import cyclic_ratings

KINDS = {
    kind: Settings(**settings_for(key, "ml-1m")) for kind, key in ((SASRec, "sasrec"), (GRU4Rec, "gru4rec"))
}
RATINGS = cyclic_ratings()


def untrained(kind: type[Reader]) -> Reader:
    torch.manual_seed(0)
    return kind(30, replace(KINDS[kind], size=8)).double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_no_state_depends_on_what_follows(kind: type[Reader]) -> None:
    model = untrained(kind)
    items = torch.randint(30, (3, 12))
    changed = torch.cat((items[:, :7], (items[:, 7:] + 1) % 30), 1)
    before, after = model(items), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-15)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-9
    torch.testing.assert_close(model(items[:, :5]), before[:, :5])


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_counts(kind: type[Reader]) -> None:
    model = untrained(kind)
    items = torch.arange(10).unsqueeze(0)
    turned = torch.cat((items[:, :9].flip(1), items[:, 9:]), 1)
    assert not torch.allclose(model(items)[:, -1], model(turned)[:, -1])


def test_attention_against_its_formula() -> None:
    """One layer in float64, as the paper has it, position by position."""
    model = SASRec(30, replace(KINDS[SASRec], size=4, layers=1)).double().eval()
    items = torch.tensor([3, 9, 3, 20])
    x = model.items.weight[items] * 2 + model.places[:4]
    (block,) = model.blocks
    query, key, value = block.queries(block.before(x)).chunk(3, -1)
    states = []
    for place in range(4):
        weights = torch.softmax(key[: place + 1] @ query[place] / 2, 0)
        mixed = x[place] + block.mixed(weights @ value[: place + 1])
        states.append(mixed + block.narrow(block.wide(block.between(mixed)).clamp(min=0)))
    torch.testing.assert_close(model(items.unsqueeze(0))[0], model.norm(torch.stack(states)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_next_is_learned(kind: type[Reader]) -> None:
    settings = replace(KINDS[kind], size=16, dropout=0.0, epochs=60, learning_rate=2e-2, length=8)
    parts = Parts.of(RATINGS, "leave-one-out", 0)
    method = fitted(kind, settings, parts.training, 0)
    score = method.score_items
    values = evaluate_ranking(score, parts, 0).metrics  # type: ignore[arg-type]
    assert values["full_ndcg@10"] > 0.9
    assert method.parameters > 30 * 17
    alone, together = score(torch.tensor([4])), score(torch.tensor([7, 4, 0]))
    assert alone is not None
    assert together is not None
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)
    again = fitted(kind, settings, parts.training, 0).score_items(torch.tensor([4]))
    assert torch.equal(again, alone)  # type: ignore[arg-type]


def test_users_without_ratings_get_what_is_popular() -> None:
    settings = {**settings_for("gru4rec", "ml-1m"), "epochs": 1, "size": 4}
    training = RATINGS.select(RATINGS.user != 5)
    scores = gru4rec(training, 0, settings).score_items(torch.tensor([5, 6]))
    assert scores is not None
    counts = torch.bincount(training.item, minlength=30)
    torch.testing.assert_close(scores[0], (counts + 1.0).log())
    assert not torch.allclose(scores[1], scores[0])
