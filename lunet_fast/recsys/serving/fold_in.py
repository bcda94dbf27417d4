"""A new user from a handful of ratings, without training anew.

The new user is the only user of a model that has everything else in common with the trained one: items, their
histories, networks and read-outs are the same tensors. So whatever reads a model reads this one too, and the
trained model is not changed. The new user has rated the items given, and is in no item's history.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast.recsys.data.ids import IdMap
from lunet_fast.recsys.data.objects import items_frame
from lunet_fast.recsys.data.ratings import from_frame
from lunet_fast.recsys.model.embeddings import Histories
from lunet_fast.recsys.model.interactions import Interactions
from lunet_fast.recsys.model.losses import hybrid_loss
from lunet_fast.recsys.model.model_files import TrainedModel
from lunet_fast.recsys.model.negatives import NegativeSampler
from lunet_fast.recsys.model.network import RatingModel

METHODS = ("fit", "history")

# Chosen on users of ML-100K that were in no training, apart from those of benchmarks/fold_in.py.
RATING_PRIOR = 5.0
"""Weight of the squared distance from the mean user, beside squared errors: n ratings count n / (n + 5)."""
INTERACTION_PRIOR = 0.3
"""The same beside the loss of interactions, whose gradients are that much smaller."""
HISTORY_DAMPING = 10
"""With gamma 1 a new user's history counts n / (n + 10)."""
ITERATIONS = 20
NEGATIVES = 200
"""Pairs without interaction that a user is fitted with, at least; fewer make the result depend on them."""


class OneUserModel(RatingModel):
    """A model of one user, index 0; ``damping`` multiplies what its history adds."""

    damping: float

    def _history(
        self, sums: Tensor, rows: Tensor, entry: Tensor, own: Tensor | bool, counts: Tensor
    ) -> Tensor:
        history = super()._history(sums, rows, entry, own, counts)
        return history * self.damping if counts is self.interactions.user_counts else history


class FoldIn:
    """Makes models of one user out of ``trained``; ``histories`` are its model's.

    What the mean user is, which every new one starts from, is computed here: O(users K k).
    """

    def __init__(self, trained: TrainedModel, histories: Histories) -> None:
        self.trained, self.histories = trained, histories
        model = trained.model
        rated = model.interactions.user_counts > 0

        def mean(table: Tensor | None) -> Tensor | None:
            return None if table is None else table.detach()[rated].mean(0, keepdim=True)

        self._embedding, self._bias = mean(model.user_embedding.weight), mean(model.user_bias)
        self._features = mean(histories.user_features)

    def __call__(self, items: Tensor, ratings: Tensor | None, method: str) -> tuple[TrainedModel, Histories]:
        """The model whose user 0 has rated ``items``, int64 ``[n]`` and distinct, and its histories.

        ``ratings`` float32 ``[n]``, or None where there are none. Items without training ratings say nothing
        and are left out. Cost: ``history`` O(K n (k + M D²)) a step; ``fit`` with max(n, NEGATIVES) for n
        where the model learns interactions.
        """
        whole = self.trained.model
        known = whole.interactions.item_counts[items] > 0
        given = Interactions(torch.zeros_like(items), items, 1, whole.interactions.n_items)
        items, ratings = items[known], None if ratings is None else ratings[known]
        model = self._model(items, ratings)
        sums = None
        if whole.user_history is not None:
            sums = whole.user_history.weight.detach()[items].sum(0, keepdim=True)
        features = self.histories.item_features
        histories = Histories(sums, self.histories.item, self._features, features)
        fitted: list[Tensor] = []
        if ratings is not None and model.user_bias is not None:
            fitted.append(model.user_bias)
        if method == "fit" and (ratings is not None or model.config.gamma < 1):
            fitted.append(model.user_embedding.weight)
        # A user of every item leaves none to draw as not chosen.
        if fitted and 0 < len(items) < whole.interactions.n_items:
            _fit(model, histories, items, ratings, fitted)
        trained = self.trained
        alone = TrainedModel(model, IdMap([0]), trained.items, trained.scale, trained.item_info, given)
        return alone, histories

    def _model(self, items: Tensor, ratings: Tensor | None) -> OneUserModel:
        """The model of the mean user with the history ``items``."""
        whole = self.trained.model
        # As copy.copy would, which would leave the two with one set of modules, parameters and buffers.
        model = OneUserModel.__new__(OneUserModel)
        model.__dict__.update(whole.__dict__)
        for kind in ("_modules", "_parameters", "_buffers"):
            model.__dict__[kind] = whole.__dict__[kind].copy()
        seen = Interactions(torch.zeros_like(items), items, 1, whole.interactions.n_items)
        # The user's own entry, which is left out of an item's history wherever the pair is looked up.
        seen.item_counts = whole.interactions.item_counts + seen.item_counts
        seen.n_users = whole.interactions.n_users
        model.interactions = seen
        assert self._embedding is not None
        model.user_embedding = _table(self._embedding)
        if whole.item_history is not None:
            model.item_history = _table(torch.zeros_like(self._embedding))
        if self._bias is not None:
            model.user_bias = nn.Parameter(self._bias.clone())
        l2, left = 10.0, torch.zeros(())
        if ratings is not None:
            left = whole.transform(ratings) - whole.mean
            if whole.config.offset == "biases":
                l2, left = whole.config.offset_l2_user, left - whole.item_deviation[items]
        model.user_deviation = (left.sum() / max(len(items) + l2, 1)).reshape(1)
        # One film seen says little of how a user rates: no user in training had a history as short as that.
        # What a user chooses, it says.
        damped = whole.config.gamma == 1
        model.damping = len(items) / (len(items) + HISTORY_DAMPING) if damped else 1.0
        return model


def _table(values: Tensor) -> nn.Embedding:
    table = nn.Embedding.from_pretrained(values.clone())
    table.weight.requires_grad_(True)
    return table


def _fit(
    model: OneUserModel,
    histories: Histories,
    items: Tensor,
    ratings: Tensor | None,
    fitted: list[Tensor],
) -> None:
    """Move ``fitted`` to the least training loss of the user's own pairs, held to where they start."""
    config, count = model.config, len(items)
    prior = RATING_PRIOR * config.gamma if ratings is not None else 0.0
    prior += INTERACTION_PRIOR * (1 - config.gamma)
    pairs, repeated = items, 1
    if config.gamma < 1:
        # Drawn once, so that the loss is a function; repeating the user's pairs keeps their weight.
        repeated = -(-NEGATIVES // (count * config.negatives))
        sampler = NegativeSampler.of(model, model.interactions.pairs)
        users = torch.zeros(count * repeated, dtype=torch.int64)
        drawn = sampler.draw(users, config.negatives, torch.Generator().manual_seed(config.seed))
        pairs = torch.cat((items.repeat(repeated), drawn.flatten()))
    own = torch.arange(len(pairs)) < count * repeated
    # Of items alone each is a choice.
    wanted = torch.full((count,), config.positive_from or 0.0) if ratings is None else ratings
    wanted = wanted.repeat(repeated)
    users = torch.zeros_like(pairs)
    start = [parameter.detach().clone() for parameter in fitted]
    optimizer = torch.optim.LBFGS(
        fitted, max_iter=ITERATIONS, history_size=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        output = model.output(users, pairs, histories=histories, observed=own)
        if ratings is None:
            output = output._replace(score=None)
        total = count * hybrid_loss(model, output, wanted).objective
        for parameter, begun in zip(fitted, start, strict=True):
            total = total + prior * (parameter - begun).square().sum()
        # Not backward(), which would leave gradients at the trained model's own parameters.
        for parameter, gradient in zip(fitted, torch.autograd.grad(total, fitted), strict=True):
            parameter.grad = gradient
        return total

    with torch.enable_grad():
        optimizer.step(loss)


def given_items(ratings: Any, trained: TrainedModel) -> tuple[Tensor, Tensor | None]:
    """(items int64 ``[n]``, ratings float32 ``[n]`` or None) of what a user gives; unseen ids are left out.

    ``ratings`` is what :func:`~lunet_fast.recsys.data.objects.items_frame` takes, whose ``TypeError`` is
    raised. A model of gamma 0 without ``positive_from`` looks at no ratings. ``RatingFileError`` as
    ``from_frame`` raises: a rating outside the scale, an item rated twice; ``ValueError`` for those of
    several users.
    """
    frame = items_frame(ratings, "ratings")
    if "item" not in frame.columns:
        raise ValueError(f"ratings has no column 'item', only {', '.join(map(str, frame.columns))}")
    if "user" in frame.columns and frame["user"].nunique() > 1:
        raise ValueError(f"ratings are of {frame['user'].nunique()} users: fold_in makes one, so give one's")
    frame = frame[[name for name in ("item", "rating") if name in frame.columns]].copy()
    rated = "rating" in frame.columns and trained.model.config.needs_ratings
    if not len(frame):
        return torch.empty(0, dtype=torch.int64), torch.empty(0) if rated else None
    frame["user"] = 0
    low, high = trained.scale
    table = from_frame(
        frame,
        rating="rating" if rated else None,
        timestamp=None,
        scale=(low, high) if rated and low < high else None,
    )
    index = torch.from_numpy(trained.items.index(table.items.ids))[table.item]
    known = index >= 0
    return index[known], table.rating[known] if rated else None
