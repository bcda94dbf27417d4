"""A trained model that has seen further ratings, of users who may be new, of items that are known.

The file of a model has the pairs that it was trained on and not their ratings, so training goes on with the
new rows alone: the vectors and biases of the users and items that they name move, from where they are, and
all else stays, the networks and read-outs first of all, by which everybody else is predicted. The pairs join
the histories.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lunet_fast.recsys.data.errors import brief
from lunet_fast.recsys.data.ids import IdMap
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.model.interactions import Interactions
from lunet_fast.recsys.model.losses import confidence_weights
from lunet_fast.recsys.model.model_files import TrainedModel
from lunet_fast.recsys.model.negatives import NegativeSampler
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.training import batch_objective, check_ratings, first_overflow
from lunet_fast.recsys.serving.fold_in import FoldIn
from lunet_fast.training.loop import Phase, ShuffledRows, cpu_threads, fit

STEPS = 20
"""At least about so many steps a pass, however few the rows are."""


def with_more_rows(trained: TrainedModel, fold_in: FoldIn, rows: Ratings, epochs: int) -> TrainedModel:
    """``trained`` after ``epochs`` passes over ``rows``; it stays as it is.

    Users that it does not know start as ``fold_in``, of the same model, makes them of their rows. ``rows``
    are in ids and units of the training data. ``ValueError`` for items that training does not know, for
    ratings outside the scale and, with loss ``ordinal``, between its levels, for a model without the pairs of
    its training (of a stream), and where the settings need weights and there are none. Cost: a copy of the
    model, a fold-in for each new user, and the steps.
    """
    _check(trained, rows)
    users, old_place, of_row = _users(trained, rows)
    items = torch.from_numpy(trained.items.index(rows.items.ids))[rows.item]
    model = _extended(trained, fold_in, rows, (users, old_place, of_row, items))
    with cpu_threads(model.config.threads):
        _train(model, rows, of_row, items, epochs)
    known = trained.known
    if known is not None:
        pairs = torch.cat((_moved(known, old_place), of_row * len(trained.items) + items))
        known = Interactions.of_pairs(pairs, len(users), len(trained.items))
    return TrainedModel(model, users, trained.items, trained.scale, trained.item_info, known)


def _check(trained: TrainedModel, rows: Ratings) -> None:
    model, config = trained.model, trained.model.config
    check_ratings("new", rows)
    if len(model.interactions.indices) != int(model.interactions.user_counts.sum()):
        raise ValueError(
            "this model was trained on a stream and keeps no pairs of users and items: train it anew on all "
            "ratings"
        )
    unknown = trained.items.index(rows.items.ids) < 0
    if unknown.any():
        first = brief(str(rows.items.ids[unknown][0]))
        raise ValueError(
            f"{int(unknown.sum())} items of the new rows are not in the model, such as {first}, and nothing "
            "is known of them to start from: leave their rows out, or fit() all ratings anew"
        )
    low, high = trained.scale
    if config.gamma > 0:
        outside = (rows.rating < low) | (rows.rating > high)
        if bool(outside.any()):
            raise ValueError(
                f"the new rows have the rating {float(rows.rating[outside][0]):g}, and the scale of the "
                f"model is {low:g} to {high:g}: correct it, or fit() all ratings anew with scale="
            )
    if model.levels is not None and not bool(torch.isin(rows.rating, model.levels).all()):
        raise ValueError(
            f"the ratings of a model of loss 'ordinal' must be among {model.levels.tolist()}: round the new "
            "ones"
        )
    if config.confidence and rows.weight is None:
        raise ValueError(f"confidence={config.confidence:g} is of counts: name their column by weight=")


def _users(trained: TrainedModel, rows: Ratings) -> tuple[IdMap, Tensor, Tensor]:
    """(all ids, the places of the old users among them, and that of each row's)."""
    users = IdMap.of([*trained.users.ids.tolist(), *rows.users.ids.tolist()])
    old_place, row_place = (torch.from_numpy(users.index(ids.ids)) for ids in (trained.users, rows.users))
    return users, old_place, row_place[rows.user]


def _moved(seen: Interactions, place: Tensor) -> Tensor:
    """The pairs of ``seen`` with its users at ``place``."""
    users = torch.div(seen.pairs, seen.n_items, rounding_mode="floor")
    return place[users] * seen.n_items + (seen.pairs - users * seen.n_items)


@torch.no_grad()
def _extended(
    trained: TrainedModel, fold_in: FoldIn, rows: Ratings, where: tuple[IdMap, Tensor, Tensor, Tensor]
) -> RatingModel:
    """A copy of the model with rows for new users, and with the new pairs."""
    users, old_place, of_row, items = where
    old, config = trained.model, trained.model.config
    seen, n_items = old.interactions, old.interactions.n_items
    rated = seen.user_counts > 0
    new_pairs, old_pairs = of_row * n_items + items, _moved(seen, old_place)
    fresh = ~torch.isin(new_pairs, old_pairs)
    interactions = Interactions.of_pairs(torch.cat((old_pairs, new_pairs)), len(users), n_items)

    state = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    state |= {f"interactions.{name}": getattr(interactions, name) for name in ("indptr", "indices")}
    of_users = ("user_embedding.weight", "item_history.weight", "user_bias", "user_features")
    for name in filter(state.__contains__, of_users):
        # A new user is the mean one in whatever is not fitted to it, in the histories of its items too.
        grown = state[name][rated].mean(0).repeat(len(users), 1)
        grown[old_place] = state[name]
        state[name] = grown
    is_new = torch.ones(len(users), dtype=torch.bool)
    is_new[old_place] = False
    for user in torch.unique(of_row[is_new[of_row]]).tolist():
        own = of_row == user
        alone = fold_in(items[own], rows.rating[own] if config.needs_ratings else None, "fit")[0].model
        state["user_embedding.weight"][user] = alone.user_embedding.weight[0]
        if alone.user_bias is not None:
            state["user_bias"][user] = alone.user_bias[0]
    if config.positive_from is not None:
        chosen = items[fresh & (rows.rating >= config.positive_from)]
        state["item_choices"] += torch.bincount(chosen, minlength=n_items)
    deviation = torch.zeros(len(users))
    deviation[old_place] = old.user_deviation
    state["user_deviation"] = deviation
    _add_deviations(old, state, rows.rating[fresh], of_row[fresh], items[fresh], interactions)
    return RatingModel.from_state(config, state, len(users), n_items)


def _add_deviations(
    old: RatingModel,
    state: dict[str, Tensor],
    rating: Tensor,
    users: Tensor,
    items: Tensor,
    interactions: Interactions,
) -> None:
    """The shrunk means of the users and then of the items, with ratings that they did not have before.

    A shrunk mean of n is a sum over n + l2, so further ones can be added to it. The mean stays.
    """
    config = old.config
    biases = config.offset == "biases"
    residual = old.transform(rating.double()) - old.mean
    l2 = (config.offset_l2_user, config.offset_l2_item) if biases else (10.0, 10.0)
    counts = interactions.user_counts, interactions.item_counts
    sides = (
        ("user_deviation", users, "item_deviation", items),
        ("item_deviation", items, "user_deviation", users),
    )
    for (name, rows, other, others), all_counts, own_l2 in zip(sides, counts, l2, strict=True):
        left = residual - state[other].double()[others] if biases else residual
        now = all_counts + own_l2
        before = now - torch.bincount(rows, minlength=len(now))
        total = (state[name].double() * before).index_add_(0, rows, left)
        state[name] = torch.where(now > 0, total / now.clamp(min=1e-9), 0.0).float()


def _train(model: RatingModel, rows: Ratings, users: Tensor, items: Tensor, epochs: int) -> None:
    """Move what belongs to the users and items of the rows alone."""
    config = model.config
    named: list[tuple[Tensor, Tensor | None]] = [
        (users, model.user_embedding.weight),
        (items, model.item_embedding.weight),
        (users, model.user_bias),
        (items, model.item_bias),
        (items, model.item_logit),
    ]
    model.requires_grad_(False)
    moving = []
    for index, parameter in named:
        if parameter is None:
            continue
        # Items that are drawn as not chosen have gradients, and are not to move.
        there = torch.zeros(len(parameter), 1).index_fill_(0, index, 1.0)
        parameter.requires_grad_(True)
        moving.append((parameter, parameter.register_hook(there.mul)))
    weight: tuple[Tensor, ...] = ()
    if rows.weight is not None:
        weight = (confidence_weights(rows.weight, config.confidence),)
    sampler = NegativeSampler.of(model, model.interactions.pairs) if config.gamma < 1 else None

    phase = Phase(
        name="LU-Net",
        module=model,
        optimizer=torch.optim.Adam([parameter for parameter, _ in moving], lr=config.learning_rate),
        batches=ShuffledRows(
            (users, items, rows.rating, *weight), min(max(len(rows) // STEPS, 1), config.batch_size)
        ),
        epochs=epochs,
        seed=config.seed,
        objective=batch_objective(model, sampler),
        rate=("learning_rate", config.learning_rate),
        locate=lambda batch: first_overflow(model, *batch[:2]),
    )
    fit(phase)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for _, hook in moving:
        hook.remove()
