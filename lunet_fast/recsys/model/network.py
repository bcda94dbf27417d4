"""The recommender: embeddings -> x -> LU-Net -> z -> rating, interaction; and the MLP it is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast import functional
from lunet_fast.layers import small
from lunet_fast.layers.activations import LeakySoftplus
from lunet_fast.layers.lu_dense import LUDense
from lunet_fast.layers.lunet import LUNet
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.training.distributed import Workers
from lunet_fast.training.sharding import draw_own_rows_


class Interactions(nn.Module):
    """Which user rated which item in the training part: a set of pairs, kept as a sparse 0/1 matrix S.

    ``users``, ``items``: int64 ``[N]``, duplicates allowed. Buffers: ``indptr`` int64 ``[n_users + 1]`` and
    ``indices`` int32 ``[nnz]`` (rows are users, sorted), which are all that is saved.

    With :meth:`of_counts` no pair is kept, for data with more of them than memory has room for: ``indptr``
    and ``indices`` are those of an empty matrix, and ``user_counts`` and ``item_counts`` are saved too.
    """

    indptr: Tensor
    indices: Tensor
    item_indptr: Tensor
    item_indices: Tensor
    user_counts: Tensor
    item_counts: Tensor
    pairs: Tensor

    def __init__(self, users: Tensor, items: Tensor, n_users: int, n_items: int) -> None:
        super().__init__()
        pairs = torch.unique(users * n_items + items)
        rows = torch.div(pairs, n_items, rounding_mode="floor")
        indptr = F.pad(torch.bincount(rows, minlength=n_users).cumsum(0), (1, 0))
        self._set(indptr, (pairs - rows * n_items).int(), n_items)

    @classmethod
    def from_csr(cls, indptr: Tensor, indices: Tensor, n_items: int) -> Interactions:
        """From the two saved buffers; ``ValueError`` where they are not a sorted sparse 0/1 matrix."""
        valid = (
            (indptr.ndim, indices.ndim) == (1, 1)
            and not (indptr.is_floating_point() or indices.is_floating_point())
            and len(indptr) > 0
            and int(indptr[0]) == 0
            and int(indptr[-1]) == len(indices)
            and bool((indptr.diff() >= 0).all())
            and bool(((indices >= 0) & (indices < n_items)).all())
        )
        made = None
        if valid:
            counts = indptr.diff()
            rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
            made = cls(rows, indices.long(), len(counts), n_items)
        # Sorting changes nothing of what is sorted, and a set leaves nothing out.
        if made is None or not torch.equal(made.indices.to(indices.dtype), indices):
            raise ValueError("interactions: indptr and indices are not a sparse matrix of users by items")
        return made

    @classmethod
    def of_counts(cls, user_counts: Tensor, item_counts: Tensor) -> Interactions:
        """Without the pairs: how many each user ``[n_users]`` and each item ``[n_items]`` has, both int64."""
        none = torch.zeros(0, dtype=torch.int64)
        interactions = cls(none, none, len(user_counts), len(item_counts))
        for name, counts in (("user_counts", user_counts), ("item_counts", item_counts)):
            if counts.ndim != 1 or counts.dtype != torch.int64 or bool((counts < 0).any()):
                raise ValueError(f"interactions: {name} must be int64 numbers of at least 0 in one dimension")
            interactions.register_buffer(name, counts.clone())
        return interactions

    def _set(self, indptr: Tensor, indices: Tensor, n_items: int) -> None:
        n_users = len(indptr) - 1
        counts = indptr.diff()
        rows = torch.repeat_interleave(torch.arange(n_users, device=indptr.device), counts)
        self.n_users, self.n_items = n_users, n_items
        self.register_buffer("indptr", indptr)
        self.register_buffer("indices", indices)
        # Derived: the transposed matrix for the other side's history and for both gradients.
        order = torch.argsort(indices, stable=True)
        item_counts = torch.bincount(indices, minlength=n_items)
        self.register_buffer("item_indptr", F.pad(item_counts.cumsum(0), (1, 0)), persistent=False)
        self.register_buffer("item_indices", rows[order].int(), persistent=False)
        self.register_buffer("user_counts", counts, persistent=False)
        self.register_buffer("item_counts", item_counts, persistent=False)
        self.register_buffer("pairs", rows * n_items + indices, persistent=False)

    def contains(self, users: Tensor, items: Tensor) -> Tensor:
        """bool ``[B]``: whether the pair was rated in the training part; O(B log nnz)."""
        wanted = users * self.n_items + items
        if len(self.pairs) == 0:
            return torch.zeros_like(wanted, dtype=torch.bool)
        place = torch.searchsorted(self.pairs, wanted).clamp_(max=len(self.pairs) - 1)
        return self.pairs[place] == wanted

    def sum_over_items(self, table: Tensor) -> Tensor:
        """S table: the sum of the rows of each user's items; ``[n_items, C]`` -> ``[n_users, C]``."""
        out: Tensor = _SparseSum.apply(table, self._rows(table), self._columns(table))
        return out

    def sum_over_users(self, table: Tensor) -> Tensor:
        """S^T table: the sum of the rows of each item's users; ``[n_users, C]`` -> ``[n_items, C]``."""
        out: Tensor = _SparseSum.apply(table, self._columns(table), self._rows(table))
        return out

    def _rows(self, like: Tensor) -> Tensor:
        return _csr(self.indptr, self.indices, (self.n_users, self.n_items), like.dtype)

    def _columns(self, like: Tensor) -> Tensor:
        return _csr(self.item_indptr, self.item_indices, (self.n_items, self.n_users), like.dtype)


def _csr(indptr: Tensor, indices: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    ones = torch.ones(len(indices), dtype=dtype, device=indices.device)
    return torch.sparse_csr_tensor(indptr.int(), indices, ones, size, check_invariants=False)


# PyTorch warns once a process that sparse CSR is in beta; the two products used here are tested. That is over
# after this line, since warnings.catch_warnings around each use would change the filters of all threads.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    _csr(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), (0, 0), torch.float32)


class _SparseSum(torch.autograd.Function):
    """matrix @ table, whose gradient takes the transposed matrix that PyTorch would rebuild at each step."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ table

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.transposed @ grad.contiguous(), None, None


MOST_LEVELS = 20
"""Different ratings that loss ``ordinal`` takes: it has a threshold between every two."""


class Histories(NamedTuple):
    """What :meth:`RatingModel.histories` computes for all users and items at once; None for what is not."""

    user: Tensor | None
    """``[n_users, K k]``: sums of the vectors of each user's items."""
    item: Tensor | None
    """``[n_items, K k]``: sums of the vectors of each item's users."""
    user_features: Tensor | None = None
    """``[n_users, K k]``: what the side features add to each user's half."""
    item_features: Tensor | None = None
    """``[n_items, K k]``"""


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


class RatingModel(nn.Module):
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

    plus, for the rating, biases of user and item with ``biases``. The interactions have q = k - r =
    ``config.interaction_size`` coordinates of each half for themselves, because ratings need about ten times
    the regularisation. With gamma 1 there is no logit and r = k, with gamma 0 no rating and r = 0.

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
    user_features: Tensor | None
    item_features: Tensor | None

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
        mean = ratings.double().mean()
        residual = ratings.double() - mean
        levels = torch.unique(ratings.double()) if config.loss == "ordinal" else None
        if levels is not None and not 2 <= len(levels) <= MOST_LEVELS:
            raise ValueError(
                f"loss='ordinal' needs 2 to {MOST_LEVELS} different ratings, and these have {len(levels)}: "
                "choose loss='mse'"
            )
        interactions = Interactions(users, items, n_users, n_items)
        self._build(config, interactions, levels, user_features, item_features)
        self.mean.copy_(mean)
        for buffer, index in ((self.user_deviation, users), (self.item_deviation, items)):
            total = torch.zeros(len(buffer), dtype=torch.float64, device=index.device).index_add_(
                0, index, residual
            )
            buffer.copy_(total / (torch.bincount(index, minlength=len(buffer)) + 10))

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
        if config.user_history or config.item_history or config.gamma < 1 or config.loss == "ordinal":
            raise ValueError(
                "without the pairs of users and items a model is trained with user_history=False, "
                "item_history=False, gamma=1 and loss='mse' or 'huber'"
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
            if layers != config.members * config.layers:
                raise ValueError(
                    f"members={config.members} and layers={config.layers} do not fit the model's settings: "
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
                model._build(config, interactions, levels, *features)
            _check_same_tensors(model.state_dict(), state)
            for name, tensor in state.items():
                if name.endswith(".sign") and not bool((tensor.abs() == 1).all()):
                    raise ValueError(f"{name!r} must hold signs, 1 and -1")
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
    ) -> None:
        self.config = config
        self.interactions = interactions
        n_users, n_items = interactions.n_users, interactions.n_items
        members, size = config.members, config.embedding_size
        self.user_embedding = _table(n_users, members * size, workers)
        self.item_embedding = _table(n_items, members * size, workers)
        # One vector for each item as part of a user's history, and the other way round.
        self.user_history = nn.Embedding(n_items, members * size) if config.user_history else None
        self.item_history = nn.Embedding(n_users, members * size) if config.item_history else None
        self.register_buffer("user_features", user_features)
        self.register_buffer("item_features", item_features)
        # One vector for each feature, as many as the buffer has columns.
        self.user_feature = (
            None if user_features is None else nn.Embedding(user_features.shape[1], members * size)
        )
        self.item_feature = (
            None if item_features is None else nn.Embedding(item_features.shape[1], members * size)
        )
        rates, interacts = config.gamma > 0, config.gamma < 1
        biased = rates and config.biases
        own_users, own_items = len(self.user_embedding.weight), len(self.item_embedding.weight)
        self.user_bias = nn.Parameter(torch.zeros(own_users, members)) if biased else None
        self.item_bias = nn.Parameter(torch.zeros(own_items, members)) if biased else None
        self.nets = nn.ModuleList(
            LUNet(2 * size, config.layers, LeakySoftplus(config.alpha)) for _ in range(members)
        )
        self.weight = nn.Parameter(torch.zeros(members, 2 * size)) if rates else None
        self.intercept = nn.Parameter(torch.zeros(members)) if rates else None
        self.interaction_weight = nn.Parameter(torch.zeros(members, 2 * size)) if interacts else None
        self.interaction_intercept = nn.Parameter(torch.zeros(members)) if interacts else None
        self.item_logit = nn.Parameter(torch.zeros(n_items, members)) if interacts else None
        self.register_buffer("levels", None if levels is None else levels.float())
        self.thresholds = None
        if levels is not None:
            # Increasing from the start; a member's order is kept by the steps' exponentials (to_rating).
            self.thresholds = nn.Parameter(torch.zeros(members, len(levels) - 1))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("user_deviation", torch.zeros(n_users))
        self.register_buffer("item_deviation", torch.zeros(n_items))
        with torch.no_grad():
            if workers is None:
                for table in self.tables():
                    table.weight.normal_(std=config.embedding_std)
            else:
                for table, rows in ((self.user_embedding, n_users), (self.item_embedding, n_items)):
                    draw_own_rows_(table.weight, rows, config.embedding_std, workers)
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

    def tables(self) -> list[nn.Embedding]:
        """The embedding tables, each ``[users, items or features, K k]``."""
        tables = (self.user_embedding, self.item_embedding, self.user_history, self.item_history)
        features = (self.user_feature, self.item_feature)
        return [table for table in (*tables, *features) if table is not None]

    def histories(self) -> Histories:
        """The sums over all histories and features: compute them once for many passes without a change.

        O(K k (nnz + users F + items G)).
        """
        user = item = None
        if self.user_history is not None:
            user = self.interactions.sum_over_items(self.user_history.weight)
        if self.item_history is not None:
            item = self.interactions.sum_over_users(self.item_history.weight)
        features = (
            (self.user_features, self.user_feature),
            (self.item_features, self.item_feature),
        )
        return Histories(
            user,
            item,
            *(None if t is None or values is None else values @ t.weight for values, t in features),
        )

    def output(
        self,
        users: Tensor,
        items: Tensor,
        *,
        histories: Histories | None = None,
        observed: bool | Tensor | None = None,
        dropout: Tensor | None = None,
    ) -> Output:
        """One pass over B pairs; ``users``, ``items`` int64 ``[B]``.

        ``histories`` are computed unless given. ``observed`` says whether these pairs, all or each (bool
        ``[B]``), are training ratings, whose items are left out of the histories; None looks it up.
        ``dropout``, of :meth:`draw_dropout`, multiplies the network's input.
        """
        x = self.embed(users, items, histories or self.histories(), observed)
        z = self.network(x if dropout is None else x * dropout)
        # Which coordinates of each half are whose: the interactions have the last ones.
        own = self.config.embedding_size - self.config.interaction_size
        score = logit = bias = None
        if self.weight is not None and self.intercept is not None:
            constant = self.intercept if self.thresholds is not None else self.mean + self.intercept
            score = self._read_out(z, self.weight, constant, slice(None, own))
        if self.user_bias is not None and self.item_bias is not None:
            sparse = self.user_embedding.sparse  # gradients of rows alone, where the tables have them
            of_user = F.embedding(users, self.user_bias, sparse=sparse)
            of_item = F.embedding(items, self.item_bias, sparse=sparse)
            bias = torch.stack((of_user.t(), of_item.t()), -1)
            score = bias.sum(-1) if score is None else score + bias.sum(-1)
        weight, intercept, item_logit = self.interaction_weight, self.interaction_intercept, self.item_logit
        if weight is not None and intercept is not None and item_logit is not None:
            logit = self._read_out(z, weight, intercept, slice(own, None))
            logit = logit + F.embedding(items, item_logit).t()
        return Output(x, z, score, logit, bias)

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

        thresholds being the mean of the members'. Increasing in ``score``; any shape, O(levels) each.
        """
        if self.thresholds is None or self.levels is None:
            return score
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
            activation = stacked[0].activation
            x = functional.lu_dense(
                x,
                torch.stack([layer.lu for layer in stacked]),
                torch.stack([cast(Tensor, layer.bias) for layer in stacked]),
                sign=torch.stack([layer.sign for layer in stacked]),
                slopes=None if activation is None else activation.slopes(),
            )
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
        return torch.where(known, self.rating(score.mean(0)), fallback)

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
        return _log_odds(self.interactions.item_counts, self.interactions.n_users)

    def embed(
        self, users: Tensor, items: Tensor, histories: Histories, observed: bool | Tensor | None
    ) -> Tensor:
        """x ``[K, B, D]``, the network's input: the user's half, then the item's.

        ``observed`` says of the pairs, of all or bool ``[B]``, whether they are training ratings, whose own
        entry is left out of both histories; None looks each up. Without a pair's own entry the user's half
        does not depend on the item, nor the item's on the user.
        """
        seen = self.interactions
        own = seen.contains(users, items) if observed is None else observed
        user, item = self.user_embedding(users), self.item_embedding(items)
        if histories.user_features is not None:
            user = user + F.embedding(users, histories.user_features)
        if histories.item_features is not None:
            item = item + F.embedding(items, histories.item_features)
        if self.user_history is not None and histories.user is not None:
            entry = self.user_history(items)
            user = user + self._history(histories.user, users, entry, own, seen.user_counts)
        if self.item_history is not None and histories.item is not None:
            entry = self.item_history(users)
            item = item + self._history(histories.item, items, entry, own, seen.item_counts)
        members = self.config.members
        x = torch.cat([half.unflatten(-1, (members, -1)) for half in (user, item)], dim=-1)
        return x.transpose(0, 1)

    def _history(
        self, sums: Tensor, rows: Tensor, entry: Tensor, own: Tensor | bool, counts: Tensor
    ) -> Tensor:
        """Normalised histories ``[B, K k]`` of the rows, less the pair's own entry where it has one."""
        rest, count = F.embedding(rows, sums), counts[rows]
        if isinstance(own, Tensor):
            rest, count = rest - entry * own.unsqueeze(-1), count - own.long()
        elif own:
            rest, count = rest - entry, count - 1
        scale = count.clamp(min=1).to(sums.dtype).pow(-self.config.history_power)
        return rest * scale.unsqueeze(-1)


def _table(rows: int, width: int, workers: Workers | None) -> nn.Embedding:
    """A table with PyTorch's initial values, or this process's rows of it."""
    if workers is None:
        return nn.Embedding(rows, width)
    own = torch.empty(len(range(workers.rank, rows, workers.world_size)), width)
    draw_own_rows_(own, rows, 1.0, workers)
    return nn.Embedding(len(own), width, _weight=own)


def _check_levels(config: TrainConfig, levels: Tensor | None) -> None:
    if (levels is None) == (config.loss == "ordinal"):
        there = "is not" if levels is None else "is"
        raise ValueError(f"loss={config.loss!r}, and the tensor 'levels' of loss 'ordinal' {there} there")
    if levels is None:
        return
    if levels.ndim != 1 or not 2 <= len(levels) <= MOST_LEVELS or not bool((levels.diff() > 0).all()):
        raise ValueError(f"levels must be 2 to {MOST_LEVELS} ratings in ascending order")


def _check_same_tensors(wanted: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """``ValueError`` unless the two have the same names, dtypes and shapes."""
    fit = "do not fit the model's settings"
    for name in sorted(wanted.keys() - state.keys()):
        raise ValueError(f"the saved tensors {fit}: {name!r} is missing")
    for name in sorted(state.keys() - wanted.keys()):
        raise ValueError(f"the saved tensors {fit}: {name!r} is too many")
    for name, tensor in wanted.items():
        for what in ("dtype", "shape"):
            ours, theirs = getattr(tensor, what), getattr(state[name], what)
            if ours != theirs:
                ours, theirs = (str(list(v) if what == "shape" else v) for v in (ours, theirs))
                raise ValueError(f"the saved tensors {fit}: {name!r} is of {what} {theirs}, not {ours}")


def _log_odds(count: Tensor | int, total: int) -> Tensor:
    share = torch.as_tensor(count, dtype=torch.float32)
    return torch.log((share + 1) / (total - share + 1))


class MLPModel(nn.Module):
    """The classic control of table 2: embeddings -> x = [user; item] -> Linear, ReLU, ... -> rating.

    Same embeddings as the paper's recipe; ``latent`` is the last hidden layer, from which :func:`decoder` has
    to rebuild x. A pair whose user or item has no training rating is predicted like any other.
    """

    mean: Tensor

    def __init__(
        self,
        n_users: int,
        n_items: int,
        embedding_size: int,
        hidden: tuple[int, ...],
        mean: float,
        std: float,
    ) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(n_users, embedding_size)
        self.item_embedding = nn.Embedding(n_items, embedding_size)
        self.hidden = perceptron((2 * embedding_size, *hidden), last=nn.ReLU)
        self.readout = nn.Linear(hidden[-1], 1)
        self.register_buffer("mean", torch.tensor(mean))
        with torch.no_grad():
            self.user_embedding.weight.normal_(std=std)
            self.item_embedding.weight.normal_(std=std)

    def latent(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, h)``: the input ``[B, 2k]`` and the last hidden layer ``[B, hidden[-1]]``."""
        x = torch.cat((self.user_embedding(users), self.item_embedding(items)), dim=-1)
        return x, self.hidden(x)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Ratings ``[B]``, not clipped."""
        h: Tensor = self.readout(self.latent(users, items)[1])
        return self.mean + h.squeeze(-1)


def perceptron(sizes: tuple[int, ...], last: Callable[[], nn.Module] | None = None) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them, and ``last`` after the final one."""
    modules: list[nn.Module] = []
    for i, (size_in, size_out) in enumerate(pairwise(sizes)):
        modules.append(nn.Linear(size_in, size_out))
        if i < len(sizes) - 2:
            modules.append(nn.ReLU())
        elif last is not None:
            modules.append(last())
    return nn.Sequential(*modules)
