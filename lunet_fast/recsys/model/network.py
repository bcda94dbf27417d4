"""The recommender: embeddings -> x -> LU-Net -> z -> rating, interaction."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast import functional
from lunet_fast.layers import small
from lunet_fast.layers.activations import LeakySoftplus, SoftplusFamily
from lunet_fast.layers.lu_dense import LUDense
from lunet_fast.layers.lunet import LUNet
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.embeddings import Embeddings, Histories
from lunet_fast.recsys.model.interactions import Interactions
from lunet_fast.recsys.model.offsets import shrunk_biases
from lunet_fast.recsys.model.transform import MOST_KNOTS, Transform
from lunet_fast.training.distributed import Workers
from lunet_fast.training.schema import check_same_tensors

MOST_LEVELS = 20
"""Different ratings that loss ``ordinal`` takes: it has a threshold between every two."""


class Output(NamedTuple):
    """What one pass computes for B pairs and K members."""

    x: Tensor
    """``[K, B, D]`` the network's input, as fed (without dropout)."""
    z: Tensor
    """``[K, B, D]`` the latent vectors f(x)."""
    score: Tensor | None
    """``[K, B]`` the rating read-out; None with gamma 0. :meth:`RatingModel.rating` makes ratings of it."""
    logit: Tensor | None
    """``[K, B]`` the interaction read-out, of which (2.14) takes the sigmoid; None with gamma 1."""
    bias: Tensor | None
    """``[K, B, 2]`` the biases of user and item in ``score``, where the model has them."""


class RatingModel(Embeddings):
    """Model of the paper with two read-outs: x = [user vector; item vector], z = f(x) by LU-Net, and from the
    one z a rating (2.12) and the logit of an interaction (2.14).

    x in R^D, D = 2k. The user's half is an embedding plus, with ``user_history``, the sum of a second
    embedding over the items the user rated in training, divided by their number to a power; the item's half
    likewise. The pair's own rating is left out of both histories, or training would see what prediction
    cannot. ``user_features`` ``[n_users, F]`` and ``item_features`` ``[n_items, G]``, where given, add
    features @ table to the halves. The read-outs are

        rating = mean + w.z + c                          (readout ``linear``)
        rating = mean + w.z + c + z_u[:r].z_i[:r]        (readout ``pair``; z_u, z_i the halves of z)
        logit  = v.z + a + a_i + z_u[r:].z_i[r:]         (``pair``; without the product ``linear``)

    plus, for the rating, biases of user and item with ``biases``. With other settings of ``offset``,
    ``strength`` and ``transform`` t it is t⁻¹(offset + strength (w.z + c + ...)), and the mean, all biases
    and errors of training are those of t(rating). The interactions have q = k - r =
    ``config.interaction_size`` coordinates of each half for themselves, because ratings need a much stronger
    regularisation. With gamma 1 there is no logit and r = k, with gamma 0 no rating and r = 0.

    The rating is unbounded: predictions are clipped to the scale, where squared error has its optimum, and
    the read-out stays affine in z's products. With loss ``ordinal`` it is bounded: the read-out is then the
    score s of P(rating > level l) = sigmoid(s - threshold_l), and the rating its expectation.

    K ``members`` are independent models in one module: tables hold their vectors side by side, ``nets`` their
    networks, and each read-out is the mean of theirs.

    ``users``, ``items`` (int64 ``[N]``) and ``ratings`` (float ``[N]``) are the training part; ids go to
    n_users - 1 and n_items - 1. A pair whose user or item has no rating there is predicted by mean + d_u +
    d_i, the mean deviations d = sum(rating - mean) / (n + 10), zero for what is unknown. Its logit is that of
    the mean user or of an item nobody chose (:meth:`interaction`).

    A pass over B pairs costs O(K (B M D^2 + nnz k)), nnz the number of training pairs, if histories are used.
    """

    mean: Tensor
    user_deviation: Tensor
    item_deviation: Tensor
    levels: Tensor | None
    item_choices: Tensor | None

    def __init__(
        self,
        config: TrainConfig,
        users: Tensor,
        items: Tensor,
        ratings: Tensor,
        n_users: int,
        n_items: int,
        *,
        user_features: Tensor | None = None,
        item_features: Tensor | None = None,
    ) -> None:
        if len(ratings) == 0:
            raise ValueError("ratings is empty: a model needs at least one training rating")
        super().__init__()
        levels = torch.unique(ratings.double()) if config.loss == "ordinal" else None
        if levels is not None and not 2 <= len(levels) <= MOST_LEVELS:
            raise ValueError(
                f"loss='ordinal' needs 2 to {MOST_LEVELS} different ratings, and these have {len(levels)}: "
                "choose loss='mse'"
            )
        interactions = Interactions(users, items, n_users, n_items)
        self._build(config, interactions, levels, user_features, item_features)
        self.transform.fit_(ratings)
        learnt = self.transform(ratings.double())
        self.mean.copy_(learnt.mean())
        residual = learnt - learnt.mean()
        if config.offset == "biases":
            l2 = (config.offset_l2_user, config.offset_l2_item)
            biases = shrunk_biases(users, items, residual, (n_users, n_items), l2)
        else:
            biases = tuple(
                residual.new_zeros(count).index_add_(0, index, residual)
                / (torch.bincount(index, minlength=count) + 10)
                for index, count in ((users, n_users), (items, n_items))
            )
        if self.item_choices is not None and config.positive_from is not None:
            chosen = ratings >= config.positive_from
            if not bool(chosen.any()):
                raise ValueError(
                    f"positive_from={config.positive_from:g} is above every training rating, of which the "
                    f"highest is {float(ratings.max()):g}: lower it"
                )
            self.item_choices.copy_(torch.bincount(items[chosen], minlength=n_items))
        self.user_deviation.copy_(biases[0])
        self.item_deviation.copy_(biases[1])

        if self.thresholds is not None and levels is not None:
            # From the shares of the ratings, so that a score of 0 predicts their distribution.
            below = torch.tensor([(ratings.double() <= level).double().mean() for level in levels[:-1]])
            thresholds = torch.logit(below)
            with torch.no_grad():
                self.thresholds.copy_(torch.cat((thresholds[:1], thresholds.diff().log())))

    @classmethod
    def of_statistics(
        cls,
        config: TrainConfig,
        mean: float,
        user: tuple[Tensor, Tensor],
        item: tuple[Tensor, Tensor],
        workers: Workers | None = None,
    ) -> RatingModel:
        """A model for training ratings of which only ``mean`` and the sums are known.

        ``user`` and ``item`` are (sums of ratings float64, counts int64), ``[n_users]`` and ``[n_items]``.
        With ``workers`` the tables and biases of users and items have this process's rows alone, those that
        they would have in the whole (:mod:`lunet_fast.training.sharding`); such a model computes nothing by
        itself. ``ValueError`` for settings that need the pairs: histories, gamma below 1, loss ``ordinal``.
        """
        pairs = config.user_history or config.item_history or config.gamma < 1 or config.loss == "ordinal"
        if pairs or config.transform != "none" or config.offset != "mean":
            raise ValueError(
                "without the pairs of users and items a model is trained with user_history=False, "
                "item_history=False, gamma=1, loss='mse' or 'huber', transform='none' and offset='mean'"
            )
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._build(config, Interactions.of_counts(user[1], item[1]), None, None, None, workers=workers)
        model.mean.fill_(mean)
        for buffer, (total, count) in ((model.user_deviation, user), (model.item_deviation, item)):
            buffer.copy_((total - mean * count) / (count + 10))
        return model

    @classmethod
    def from_state(
        cls, config: TrainConfig, state: dict[str, Tensor], n_users: int, n_items: int
    ) -> RatingModel:
        """The model that ``state``, a ``state_dict``, belongs to; ``ValueError`` where it does not fit.

        Exactly: every tensor is there and no other, of the dtype and the shape that ``config`` asks for, none
        of which is allocated before. ``state`` is copied.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        try:
            indptr, indices = state["interactions.indptr"], state["interactions.indices"]
            if indptr.ndim == 1 and len(indptr) != n_users + 1:
                raise ValueError(f"the model has {len(indptr) - 1} users but {n_users} user ids")
            if "interactions.user_counts" in state:
                counts = state["interactions.user_counts"], state["interactions.item_counts"]
                interactions = Interactions.of_counts(*counts)
            else:
                interactions = Interactions.from_csr(indptr, indices, n_items)
            layers = sum(name.endswith(".lu") for name in state)
            if layers != config.members * config.depth:
                raise ValueError(
                    f"members={config.members} and layers={config.depth} do not fit the model's settings: "
                    f"there are {layers} layers in all"
                )
            levels, *features = (state.get(name) for name in ("levels", "user_features", "item_features"))
            _check_levels(config, levels)
            for name, given, rows in zip(("user", "item"), features, (n_users, n_items), strict=True):
                if given is not None and (given.ndim != 2 or len(given) != rows):
                    raise ValueError(f"{name}_features must have {rows} rows, got {list(given.shape)}")
            # There nothing is allocated and nothing drawn: no settings are too large, and the generator that
            # somebody's own program draws from stays as it is, in other threads too.
            with torch.device("meta"):
                knots = state.get("transform.knots")
                model._build(config, interactions, levels, *features, knots=_count_knots(config, knots))
            check_same_tensors(model.state_dict(), state)
            for name, tensor in state.items():
                if name.endswith(".sign") and not bool((tensor.abs() == 1).all()):
                    raise ValueError(f"{name!r} must hold signs, 1 and -1")
            choices, most = state.get("item_choices"), interactions.item_counts
            if choices is not None and not bool(((choices >= 0) & (choices <= most)).all()):
                raise ValueError("item_choices must be of the items' interactions, 0 to all of them")
            model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        except (KeyError, RuntimeError, TypeError, OverflowError) as error:
            # Of some errors of PyTorch the rest is a trace of its own.
            reason = str(error).splitlines()[0]
            raise ValueError(f"the saved tensors do not fit the model's settings: {reason}") from error
        return model

    def _build(
        self,
        config: TrainConfig,
        interactions: Interactions,
        levels: Tensor | None,
        user_features: Tensor | None,
        item_features: Tensor | None,
        *,
        workers: Workers | None = None,
        knots: int = 0,
    ) -> None:
        self.config = config
        self.interactions = interactions
        n_users, n_items = interactions.n_users, interactions.n_items
        members, size = config.members, config.embedding_size
        self._build_tables(user_features, item_features, workers)
        rates, interacts = config.gamma > 0, config.gamma < 1
        biased = rates and config.biases
        own_users, own_items = len(self.user_embedding.weight), len(self.item_embedding.weight)
        self.user_bias = nn.Parameter(torch.zeros(own_users, members)) if biased else None
        self.item_bias = nn.Parameter(torch.zeros(own_items, members)) if biased else None
        self.nets = nn.ModuleList(
            LUNet(2 * size, config.depth, LeakySoftplus(config.alpha)) for _ in range(members)
        )
        if config.network == "identity":
            for parameter in self.nets.parameters():
                nn.init.zeros_(parameter).requires_grad_(False)
        self.weight = nn.Parameter(torch.zeros(members, 2 * size)) if rates else None
        self.intercept = nn.Parameter(torch.zeros(members)) if rates else None
        self.interaction_weight = nn.Parameter(torch.zeros(members, 2 * size)) if interacts else None
        self.interaction_intercept = nn.Parameter(torch.zeros(members)) if interacts else None
        self.item_logit = nn.Parameter(torch.zeros(n_items, members)) if interacts else None
        self.transform = Transform(config.transform, knots)
        self.register_buffer("levels", None if levels is None else levels.float())
        self.thresholds = None
        if levels is not None:
            # Increasing from the start; a member's order is kept by the steps' exponentials (to_rating).
            self.thresholds = nn.Parameter(torch.zeros(members, len(levels) - 1))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("user_deviation", torch.zeros(n_users))
        self.register_buffer("item_deviation", torch.zeros(n_items))
        # How many ratings of each item count as choices, where not all do.
        choices = None if config.positive_from is None else torch.zeros(n_items, dtype=torch.int64)
        self.register_buffer("item_choices", choices)
        with torch.no_grad():
            self._draw_tables(workers)
            if config.readout == "linear":
                for weight in (self.weight, self.interaction_weight):
                    if weight is not None:
                        weight.normal_(std=0.1)

    def rows(self) -> dict[str, int]:
        """By name the parameters with a row for each user or item that are tables of rows asked for, and how
        many rows the whole has: those that may be dealt to several processes."""
        n_users, n_items = self.interactions.n_users, self.interactions.n_items
        rows = {"user_embedding.weight": n_users, "item_embedding.weight": n_items}
        if self.user_bias is not None:
            rows |= {"user_bias": n_users, "item_bias": n_items}
        return rows

    def learnt(self) -> list[nn.Parameter]:
        """The parameters, without those of f = identity, which stand still."""
        still = set(map(id, self.nets.parameters() if self.config.network == "identity" else ()))
        return [parameter for parameter in self.parameters() if id(parameter) not in still]

    def output(
        self,
        users: Tensor,
        items: Tensor,
        *,
        histories: Histories | None = None,
        observed: bool | Tensor | None = None,
        dropout: Tensor | None = None,
        strength: float | None = None,
    ) -> Output:
        """One pass over B pairs; ``users``, ``items`` int64 ``[B]``.

        ``histories`` are computed unless given. ``observed`` says whether these pairs, all or each (bool
        ``[B]``), are training ratings, whose items are left out of the histories; None looks it up.
        ``dropout``, of :meth:`draw_dropout`, multiplies the network's input, ``strength`` its rating, by
        default the settings'.
        """
        x = self.embed(users, items, histories or self.histories(), observed)
        z = self.network(x if dropout is None else x * dropout)
        return self.read(x, z, users, items, strength)

    def read(
        self, x: Tensor, z: Tensor, users: Tensor, items: Tensor, strength: float | None = None
    ) -> Output:
        """What z = f(x), both ``[K, B, D]``, says of the pairs."""
        # Which coordinates of each half are whose: the interactions have the last ones.
        own = self.config.embedding_size - self.config.interaction_size
        score = logit = bias = None
        if self.weight is not None and self.intercept is not None:
            apart = self.thresholds is not None or self._offset_apart(strength)
            constant = self.intercept if apart else self.mean + self.intercept
            score = self._read_out(z, self.weight, constant, slice(None, own))
        if self.user_bias is not None and self.item_bias is not None:
            sparse = self.user_embedding.sparse  # gradients of rows alone, where the tables have them
            of_user = F.embedding(users, self.user_bias, sparse=sparse)
            of_item = F.embedding(items, self.item_bias, sparse=sparse)
            bias = torch.stack((of_user.t(), of_item.t()), -1)
            score = bias.sum(-1) if score is None else score + bias.sum(-1)
        if score is not None and self._offset_apart(strength):
            score = self.offset(users, items) + self.strength(strength) * score
        weight, intercept, item_logit = self.interaction_weight, self.interaction_intercept, self.item_logit
        if weight is not None and intercept is not None and item_logit is not None:
            logit = self._read_out(z, weight, intercept, slice(own, None))
            logit = logit + F.embedding(items, item_logit).t()
        return Output(x, z, score, logit, bias)

    def strength(self, asked: float | None = None) -> float:
        """What the network's rating is multiplied by."""
        return self.config.strength if asked is None else asked

    def _offset_apart(self, strength: float | None) -> bool:
        return self.config.offset == "biases" or self.strength(strength) != 1

    def offset(self, users: Tensor, items: Tensor) -> Tensor:
        """``[B]``: what the network's rating is added to, before the transform's inverse."""
        if self.config.offset == "mean":
            return self.mean.expand(len(users))
        return self.mean + self.user_deviation[users] + self.item_deviation[items]

    def draw_dropout(self, pairs: int, generator: torch.Generator) -> Tensor | None:
        """``[K, pairs, D]``: 0 for the coordinates dropped, 1 / (1 - p) for the others; None where p is 0.

        ``generator`` is on the model's device.
        """
        keep, config = 1 - self.config.dropout, self.config
        if keep == 1:
            return None
        # Laid out as x is.
        kept = self.mean.new_empty(pairs, config.members, 2 * config.embedding_size).transpose(0, 1)
        return kept.bernoulli_(keep, generator=generator).div_(keep)

    def _read_out(self, z: Tensor, weight: Tensor, constant: Tensor, product: slice) -> Tensor:
        """``[K, B]``: w.z + constant, and with readout ``pair`` the product of the halves over a slice."""
        score = torch.baddbmm(constant.view(-1, 1, 1), z, weight.unsqueeze(-1)).squeeze(-1)
        if self.config.readout == "pair":
            z_user, z_item = z.chunk(2, dim=-1)
            score = score + (z_user[..., product] * z_item[..., product]).sum(-1)
        return score

    def rating(self, score: Tensor) -> Tensor:
        """Ratings of ``score``, the members' mean read-out: itself, or with loss ``ordinal`` the expectation

            level_1 + sum_l (level_{l+1} - level_l) sigmoid(score - threshold_l),

        thresholds being the mean of the members'. Increasing in ``score``; any shape, O(levels) each. With a
        ``transform``, its inverse.
        """
        if self.thresholds is None or self.levels is None:
            return self.transform.inverse(score)
        above = torch.sigmoid(score.unsqueeze(-1) - self.increasing_thresholds().mean(0))
        return self.levels[0] + above @ self.levels.diff()

    def increasing_thresholds(self) -> Tensor:
        """``[K, levels - 1]`` of loss ``ordinal``: the first parameter, and steps exp(parameter) > 0."""
        assert self.thresholds is not None
        first, steps = self.thresholds[:, :1], self.thresholds[:, 1:].exp()
        return torch.cat((first, first + steps.cumsum(-1)), dim=-1)

    def network(self, x: Tensor) -> Tensor:
        """z = f(x), both ``[K, B, D]``: all members' layers m in one call, for K small ones cost more."""
        members = [[cast(LUDense, layer) for layer in cast(LUNet, net).layers] for net in self.nets]
        if all(small.takes(x, layers) for layers in members):
            return small.stacked_net(x, members)
        for stacked in zip(*members, strict=True):
            lu, bias, sign = (
                torch.stack([getattr(layer, name) for layer in stacked]) for name in ("lu", "bias", "sign")
            )
            activation = cast("SoftplusFamily | None", stacked[0].activation)
            slopes = None if activation is None else activation.slopes()
            x = functional.lu_dense(x, lu, bias, sign=sign, slopes=slopes)
        return x

    def latent(
        self, users: Tensor, items: Tensor, histories: Histories | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(x, z)`` for B pairs, both ``[K, B, D]``: the network's input and z = f(x)."""
        output = self.output(users, items, histories=histories)
        return output.x, output.z

    def inverse(self, z: Tensor) -> Tensor:
        """x = f^-1(z) for z ``[K, B, D]``, member by member; O(K B M D^2)."""
        return torch.stack([cast(LUNet, net).inverse(part) for net, part in zip(self.nets, z, strict=True)])

    def forward(self, users: Tensor, items: Tensor, histories: Histories | None = None) -> Tensor:
        """Ratings ``[B]``, not clipped: :meth:`rating` of the members' mean, or the fall-back.

        An index of -1 stands for a user or item that the model has never seen. ``ValueError`` for a model
        trained with gamma 0, which knows no ratings.
        """
        known_user, known_item = users.clamp(min=0), items.clamp(min=0)
        fallback = self.mean.expand(len(users))
        known = torch.ones_like(users, dtype=torch.bool)
        for given, index, deviation, counts in (
            (users, known_user, self.user_deviation, self.interactions.user_counts),
            (items, known_item, self.item_deviation, self.interactions.item_counts),
        ):
            rated = (given >= 0) & (counts[index] > 0)
            fallback = fallback + deviation[index] * rated
            known = known & rated
        score = self.output(known_user, known_item, histories=histories).score
        if score is None:
            raise ValueError("this model was trained with gamma=0, on interactions alone: it rates nothing")
        return torch.where(known, self.rating(score.mean(0)), self.transform.inverse(fallback))

    def interaction(self, users: Tensor, items: Tensor, histories: Histories | None = None) -> Tensor:
        """Logits ``[B]`` of an interaction, the members' mean; sigmoid makes the probability (2.14) of them.

        Where the user or the item (index -1) has none in training: :meth:`popularity` of the item. The
        probability is that of a pair among ``1 + negatives`` drawn for it, not of one among all pairs.
        ``ValueError`` for a model trained with gamma 1, on ratings alone.
        """
        known_user, known_item = users.clamp(min=0), items.clamp(min=0)
        logit = self.output(known_user, known_item, histories=histories).logit
        if logit is None:
            raise ValueError(
                "this model was trained with gamma=1, on ratings alone: train with gamma below 1"
            )
        popularity = self.popularity()
        fallback = torch.where(items >= 0, popularity[known_item], _log_odds(0, self.interactions.n_users))
        known = (users >= 0) & (items >= 0)
        known &= self.interactions.user_counts[known_user] > 0
        known &= self.interactions.item_counts[known_item] > 0
        return torch.where(known, logit.mean(0), fallback)

    def popularity(self) -> Tensor:
        """``[n_items]``: log of (n + 1) / (users - n + 1), n the users who chose the item in training."""
        choices = self.interactions.item_counts if self.item_choices is None else self.item_choices
        return _log_odds(choices, self.interactions.n_users)


def _count_knots(config: TrainConfig, knots: Tensor | None) -> int:
    """How many a saved model has; ``ValueError`` where they are none of a transform's."""
    if config.transform != "rank":
        return 0
    fit = knots is not None and knots.ndim == 2 and len(knots) == 2 and 1 <= knots.shape[1] <= MOST_KNOTS
    if knots is None or not fit or not bool((knots[0].diff() > 0).all() and (knots[1].diff() >= 0).all()):
        raise ValueError(f"transform.knots must be 1 to {MOST_KNOTS} ratings and their scores, ascending")
    return knots.shape[1]


def _check_levels(config: TrainConfig, levels: Tensor | None) -> None:
    if (levels is None) == (config.loss == "ordinal"):
        there = "is not" if levels is None else "is"
        raise ValueError(f"loss={config.loss!r}, and the tensor 'levels' of loss 'ordinal' {there} there")
    if levels is None:
        return
    if levels.ndim != 1 or not 2 <= len(levels) <= MOST_LEVELS or not bool((levels.diff() > 0).all()):
        raise ValueError(f"levels must be 2 to {MOST_LEVELS} ratings in ascending order")


def _log_odds(count: Tensor | int, total: int) -> Tensor:
    share = torch.as_tensor(count, dtype=torch.float32)
    return torch.log((share + 1) / (total - share + 1))
