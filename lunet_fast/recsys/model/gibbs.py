"""The recommender by Gibbs sampling instead of by gradients: each member is a sample of the posterior.

With f the identity and read-out ``pair`` a rating is linear in the user's vector with the item's given, and
the other way round, so that each is drawn exactly from what it is given all else, for all users at once:

    y = mean + b_u + b_i + u . v + e,                    e ~ N(0, s),  y what is learnt of a rating
    (u, b_u) ~ N(m + B^T f_u, diag(p)^-1)                f_u: the history of the user, and side features
    B        ~ N(0, (q diag(p))^-1)                      for each feature
    p ~ Gamma(1, PRIOR_RATE),  m ~ N(0, diag(p)^-1),  q ~ Gamma(1/2, 1/2),

and items alike with m, p, B and q of their own. s is the settings', or 1/s ~ Gamma(1, 1). All are for ratings
in units of their spread. An s above what would be sampled tempers the posterior: on MovieLens long chains
predict better with it, and worse than short ones where s is sampled. That is Bayesian matrix factorisation
(Salakhutdinov and Mnih 2008) with biases and with features in the mean of the prior, whose B is drawn
jointly, by perturbation and conjugate gradients (Simm et al. 2017, "Macau").
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.training.schema import check_same_tensors

Triple = tuple[Tensor, Tensor, Tensor]
"""Users and items, int64 ``[N]``, and the ratings of the pairs."""

PRIOR_RATE = 0.2
TOLERANCE, MOST_ITERATIONS = 1e-2, 10
"""Of conjugate gradients: the residual's norm in parts of the right side's. What is left over goes into the
next sweep's solution, which begins where this one ends."""
FIRST_STD = 0.1


class _Side:
    """Users, or items: n of them, their ratings sorted by them, and the state of the chain."""

    def __init__(
        self, own: Tensor, others: Tensor, sizes: tuple[int, int], features: Tensor | None, size: int
    ) -> None:
        self.n, self.n_others = sizes
        self.order = torch.argsort(own, stable=True)
        self.others = others[self.order]
        counts = torch.bincount(own, minlength=self.n)
        self.indptr = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        self.features = features
        self.transposed = None if features is None else features.t().to_sparse_csr()
        self.squares = None if features is None else _columns_squared(features)
        kind = torch.float64
        self.vectors = torch.zeros(self.n, size + 1, dtype=kind)
        self.expected = self.vectors
        self.mean = torch.zeros(size + 1, dtype=kind)
        self.precision = torch.full((size + 1,), 1 / FIRST_STD**2, dtype=kind)
        self.weights = torch.zeros(0 if features is None else features.shape[1], size + 1, dtype=kind)
        self.weights_precision = 1.0

    def state(self) -> dict[str, Tensor]:
        """What the chain has drawn of this side, by name."""
        names = "vectors", "expected", "mean", "precision", "weights"
        penalty = torch.tensor(self.weights_precision, dtype=torch.float64)
        return {**{name: getattr(self, name) for name in names}, "weights_precision": penalty}

    def set_state_(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        self.vectors, self.expected, self.mean = state["vectors"], state["expected"], state["mean"]
        self.precision, self.weights = state["precision"], state["weights"]
        self.weights_precision = float(state["weights_precision"])

    def matrix(self, values: Tensor) -> Tensor:
        """The sparse matrix ``[n, others]`` of ``values`` ``[N]``, sorted as the ratings are."""
        size = self.n, self.n_others
        return torch.sparse_csr_tensor(self.indptr, self.others, values, size, check_invariants=False)

    def prior_mean(self) -> Tensor:
        """``[n, k + 1]`` or ``[k + 1]``."""
        return self.mean if self.features is None else self.mean + self.features @ self.weights

    def draw(self, residual: Tensor, other: _Side, noise: float, rng: np.random.Generator) -> None:
        """Vectors and biases given the other side's; ``residual`` ``[N]``, the ratings less their mean."""
        left = residual[self.order] - other.vectors[self.others, -1]
        seen = torch.cat((other.vectors[:, :-1], torch.ones(self.n_others, 1, dtype=left.dtype)), dim=1)
        size = seen.shape[1]
        rows, columns = torch.tril_indices(size, size)
        products = seen.index_select(1, rows) * seen.index_select(1, columns)
        # The lower triangle alone, which is all that a Cholesky factorisation reads.
        precision = torch.diag(self.precision).flatten().repeat(self.n, 1)
        summed = self.matrix(torch.ones_like(left)) @ (products / noise)
        precision = precision.index_add_(1, rows * size + columns, summed).view(self.n, size, size)
        linear = self.matrix(left) @ (seen / noise) + self.precision * self.prior_mean()
        root = torch.linalg.cholesky(precision)
        half = torch.linalg.solve_triangular(root, linear.unsqueeze(-1), upper=False)
        both = torch.cat((half, half + _normal(rng, self.n, size, 1)), dim=-1)
        self.expected, self.vectors = torch.linalg.solve_triangular(root.mT, both, upper=True).unbind(-1)

    def draw_prior(self, rng: np.random.Generator) -> None:
        """Precisions, mean, and what features add, given the vectors."""
        own = self.vectors if self.features is None else self.vectors - self.features @ self.weights
        # All that is normal with this precision: the vectors, their mean, the weights.
        squares = (own - self.mean).square().sum(0) + self.mean.square()
        squares = squares + self.weights_precision * self.weights.square().sum(0)
        count = self.n + 1 + len(self.weights)
        self.precision = torch.from_numpy(rng.gamma(1 + count / 2, 1 / (PRIOR_RATE + squares.numpy() / 2)))
        spread = ((self.n + 1) * self.precision).rsqrt()
        self.mean = own.sum(0) / (self.n + 1) + spread * _normal(rng, len(self.mean))
        if self.features is None or self.transposed is None:
            return
        # The solution of the system with both sides perturbed is a draw of the weights, not their mean.
        std = self.precision.rsqrt()
        right = self.transposed @ (self.vectors - self.mean + std * _normal(rng, *self.vectors.shape))
        right = right + self.weights_precision**0.5 * std * _normal(rng, *self.weights.shape)
        self.weights = self._solved(right)
        energy = float((self.weights.square() * self.precision).sum())
        self.weights_precision = rng.gamma((1 + self.weights.numel()) / 2, 2 / (1 + energy))

    def _solved(self, right: Tensor) -> Tensor:
        """x of (FᵀF + q) x = ``right``, F the features, column by column, from the last x on."""
        features, transposed, squares = self.features, self.transposed, self.squares
        assert features is not None
        assert transposed is not None
        assert squares is not None
        scale = 1 / (squares + self.weights_precision).unsqueeze(1)

        def product(x: Tensor) -> Tensor:
            found: Tensor = transposed @ (features @ x) + self.weights_precision * x
            return found

        x = self.weights
        rest = right - product(x)
        direction = scale * rest
        fall = (rest * direction).sum(0)
        enough = TOLERANCE**2 * right.square().sum(0)
        for _ in range(MOST_ITERATIONS):
            if bool((rest.square().sum(0) <= enough).all()):
                break
            image = product(direction)
            step = fall / (direction * image).sum(0).clamp(min=torch.finfo(x.dtype).tiny)
            x, rest = x + step * direction, rest - step * image
            scaled = scale * rest
            last, fall = fall, (rest * scaled).sum(0)
            direction = scaled + fall / last.clamp(min=torch.finfo(x.dtype).tiny) * direction
        return x

    def apart(self, vectors: Tensor) -> Tensor:
        """``[n, k + 1]``: ``vectors`` and biases, less what features add to the vectors."""
        if self.features is None:
            return vectors
        added = self.features @ self.weights
        return torch.cat((vectors[:, :-1] - added[:, :-1], vectors[:, -1:]), dim=1)


class Chain:
    """The sampler of one training: iterate it for its sweeps.

    ``model`` has settings of inference ``gibbs``; ``users``, ``items`` int64 ``[N]`` and ``ratings`` are
    the training ratings. The same arguments give the same chain. A sweep costs O(N k² + (users + items) k³
    + nnz k) for histories of nnz entries, a few times over; memory is (users + items) k² numbers of float64.
    """

    def __init__(self, model: RatingModel, users: Tensor, items: Tensor, ratings: Tensor) -> None:
        config, self.model = model.config, model
        self.users, self.items = users, items
        learnt = model.transform(ratings.double())
        self.residual = learnt - model.mean.double()
        self.noise = config.noise or 0.5 * float(self.residual.square().mean()) or 1.0
        self.sampled_noise = not config.noise
        self.sweeps = 0
        """That are done. Each draws from a generator of its own, of the seed and its number."""
        self.rng = np.random.default_rng((config.seed, 6, 0))
        seen = model.interactions
        sizes = seen.n_users, seen.n_items
        of_user = _features(config, config.user_history, users, items, sizes, model.user_features)
        of_item = _features(config, config.item_history, items, users, sizes[::-1], model.item_features)
        size = config.embedding_size
        self.user_side = _Side(users, items, sizes, of_user, size)
        self.item_side = _Side(items, users, sizes[::-1], of_item, size)
        for side in (self.user_side, self.item_side):
            side.vectors[:, :-1] = FIRST_STD * _normal(self.rng, side.n, size)

    def sweep(self) -> None:
        """Draw everything once."""
        self.sweeps += 1
        self.rng = np.random.default_rng((self.model.config.seed, 6, self.sweeps))
        user, item = self.user_side, self.item_side
        item.draw(self.residual, user, self.noise, self.rng)
        item.draw_prior(self.rng)
        user.draw(self.residual, item, self.noise, self.rng)
        user.draw_prior(self.rng)
        if self.sampled_noise:
            left = self.residual - self.predicted(self.users, self.items)
            rate = 1 + float(left.square().sum()) / 2
            self.noise = 1 / self.rng.gamma(1 + len(left) / 2, 1 / rate)

    def state(self) -> dict[str, Tensor]:
        """What the next sweep needs of those before, by name; the sweeps are counted apart."""
        sides = {"user": self.user_side.state(), "item": self.item_side.state()}
        found = {f"{side}.{name}": tensor for side, state in sides.items() for name, tensor in state.items()}
        return {**found, "noise": torch.tensor(self.noise, dtype=torch.float64)}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """``ValueError`` unless it is one of such a chain."""
        check_same_tensors(self.state(), state)
        for name, tensor in state.items():
            if name.endswith(("precision", "noise")) and not bool((tensor > 0).all()):
                raise ValueError(f"{name!r} must be above 0")

    def set_state_(self, state: Mapping[str, Tensor], sweeps: int) -> None:
        """Go on from :meth:`state` after so many sweeps, as if this chain had made them."""
        for name, side in (("user.", self.user_side), ("item.", self.item_side)):
            side.set_state_({key.removeprefix(name): state[key] for key in state if key.startswith(name)})
        self.noise, self.sweeps = float(state["noise"]), sweeps

    def predicted(self, users: Tensor, items: Tensor) -> Tensor:
        """``[B]``: the state's ratings as they are learnt, less their mean."""
        user, item = self.user_side.vectors[users], self.item_side.vectors[items]
        return (user[:, :-1] * item[:, :-1]).sum(1) + user[:, -1] + item[:, -1]

    @torch.no_grad()
    def write_(self, member: int) -> None:
        """The state as member ``member`` of the model.

        Of users it has what is expected of them given the items, in place of the draw: the mean over samples
        is of the same expectation, with less variance (Rao and Blackwell).
        """
        model, size = self.model, self.model.config.embedding_size
        columns = slice(member * size, (member + 1) * size)
        user, item = self.user_side, self.item_side
        for side, vectors, bias, (table, *sources) in (
            (user, user.expected, model.user_bias, model.tables_of_users()),
            (item, item.vectors, model.item_bias, model.tables_of_items()),
        ):
            assert bias is not None
            own = side.apart(vectors).float()
            table.weight[:, columns], bias[:, member] = own[:, :-1], own[:, -1]
            added = side.weights[:, :-1].float().split([len(source.weight) for source in sources])
            for source, weights in zip(sources, added, strict=True):
                source.weight[:, columns] = weights
        # What is said of a pair whose other side has no rating: the mean over the prior of that one.
        for deviation, vectors, mean in (
            (model.user_deviation, user.expected, item.mean),
            (model.item_deviation, item.vectors, user.mean),
        ):
            alone = vectors[:, :-1] @ mean[:-1] + vectors[:, -1] + mean[-1]
            deviation += (alone.float() - deviation) / (member + 1)


def _features(
    config: TrainConfig,
    history: bool,
    own: Tensor,
    others: Tensor,
    sizes: tuple[int, int],
    known: Tensor | None,
) -> Tensor | None:
    """``[n, F]``, sparse: the history divided as the model does, then what else is known."""
    parts = []
    if history:
        pairs = torch.unique(own * sizes[1] + others)
        rows = torch.div(pairs, sizes[1], rounding_mode="floor")
        counts = torch.bincount(rows, minlength=sizes[0]).double()
        values = counts[rows].pow(-config.history_power)
        places = torch.stack((rows, pairs - rows * sizes[1]))
        parts.append(torch.sparse_coo_tensor(places, values, sizes, check_invariants=False))
    if known is not None:
        parts.append(known.double().to_sparse_coo())
    return torch.cat(parts, dim=1).coalesce().to_sparse_csr() if parts else None


def _columns_squared(features: Tensor) -> Tensor:
    """``[F]``: the squared norm of each column of a sparse matrix."""
    sums = torch.zeros(features.shape[1], dtype=features.dtype)
    return sums.index_add_(0, features.col_indices(), features.values().square())


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape))
