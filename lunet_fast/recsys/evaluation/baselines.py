"""Other recommenders, tuned and behind one interface, for ``lunet-fast compare``.

Each :class:`Baseline` takes the training part as :class:`~lunet_fast.recsys.data.ratings.Ratings` and gives
back a :class:`~.fitted.Fitted`, which speaks of users and items by our indices. The methods whose package is
"ours" are here; the others are in :mod:`~lunet_fast.recsys.evaluation.adapters`, and their packages come with
``pip install "lunet-fast[baselines]"``.

For the methods that rank, every training rating is an interaction, whatever its value. The settings for
``ml-100k`` were chosen on a validation part of its training data. Matrix factorisation, EASE and ALS have
settings that are known to be good on ``ml-1m``; the others bring there what they have for ``ml-100k``, the
slow ones with fewer epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation import adapters
from lunet_fast.recsys.evaluation.adapters import import_package, undisturbed
from lunet_fast.recsys.evaluation.fitted import (
    Fitted,
    biased_product,
    count_parameters,
    interactions_of,
    labelled_batches,
    over_all_items,
    rated_rows,
    rows_at_once,
    shape_of,
)
from lunet_fast.recsys.evaluation.sequence_ease import sequence_ease
from lunet_fast.recsys.evaluation.sequence_networks import gru4rec, sasrec
from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.model.mlp import MLPModel
from lunet_fast.recsys.model.offsets import shrunk_biases
from lunet_fast.recsys.model.training import control_objective, control_optimizer
from lunet_fast.training.loop import cpu_threads, descend

#: Number of ratings of the bundled data sets, for which there are settings.
SIZES = {"ml-100k": 100_000, "ml-1m": 1_000_209}


@dataclass(frozen=True)
class Baseline:
    """A method to compare with."""

    name: str
    """As in tables."""
    package: Literal["cornac", "implicit", "myfm", "surprise", "ours"]
    kinds: tuple[Literal["rating", "ranking"], ...]
    """What it does: predict ratings, rank items, or both."""
    train: Callable[[Ratings, int, str], Fitted]
    """What :meth:`fit` runs."""

    def fit(self, training: Ratings, seed: int, size: str) -> Fitted:
        """The method trained on ``training``, on one thread, with the settings for data of ``size``.

        The packages' output, progress bars and warnings are swallowed, and the global generators of NumPy and
        PyTorch are left as they were. The same seed gives the same result on the same machine.

        Args:
            training: the training part on the CPU; the ids of its users and items may be more than occur.
            seed: for methods that draw numbers; seeds count modulo 2^31.
            size: the bundled data set nearest in size, ``ml-100k`` or ``ml-1m``
                (:func:`~lunet_fast.recsys.model.config.nearest_dataset`).

        Raises:
            ImportError: the package is missing, see :func:`missing`.
            ValueError: an unknown ``size``, or no training ratings.
        """
        if size not in SIZES:
            raise ValueError(f"size={size!r} has no settings: use one of {', '.join(SIZES)}")
        if len(training) == 0:
            raise ValueError(f"training is empty: {self.name} needs at least one rating")
        reason = missing(self)
        if reason is not None:
            raise ImportError(reason)
        with undisturbed(), cpu_threads(1):
            return self.train(training, seed % 2**31, size)  # all that some packages take


def missing(baseline: Baseline) -> str | None:
    """Why ``baseline`` cannot be trained here, and what to install; None where it can. Imports packages."""
    if baseline.package == "ours":
        return None
    try:
        with undisturbed():
            import_package(baseline.package)
    except Exception as error:  # one compiled for another NumPy raises ValueError or AttributeError
        return (
            f"{baseline.name} needs {baseline.package}, which cannot be imported ({error}): "
            'pip install "lunet-fast[baselines]"'
        )
    return None


# --- without a package ----------------------------------------------------------------------------------


def _popularity(training: Ratings, seed: int, size: str) -> Fitted:
    """The number of training ratings."""
    counts = torch.bincount(training.item, minlength=training.n_items).float()
    return Fitted(0, score_items=lambda users: counts.repeat(len(users), 1))


def _biases(training: Ratings, seed: int, size: str) -> Fitted:
    """mean + b_u + b_i, the least squares with L2 on the biases, by turns until they stand still."""
    l2_user, l2_item = {"ml-100k": (5.0, 3.0), "ml-1m": (5.0, 3.0)}[size]
    mean = training.rating.double().mean()
    b_user, b_item = shrunk_biases(
        training.user,
        training.item,
        training.rating.double() - mean,
        (training.n_users, training.n_items),
        (l2_user, l2_item),
        sweeps=30,
    )
    return biased_product(mean, b_user, b_item)


def _ease(training: Ratings, seed: int, size: str) -> Fitted:
    """EASE (Steck 2019): scores S B, where B minimises |S - S B|^2 + l2 |B|^2 with a diagonal of zeros.

    O(n_users n_items^2 + n_items^3) time and O(n_items^2) memory.
    """
    l2 = {"ml-100k": 300.0, "ml-1m": 1000.0}[size]
    seen = interactions_of(training)
    n = training.n_items
    gram = torch.zeros(n, n, dtype=torch.float64)
    for users in torch.arange(training.n_users).split(rows_at_once(n)):
        rows = rated_rows(seen, users)
        gram += rows.T @ rows  # whole numbers below 2^24, which float32 holds
    gram.diagonal().add_(l2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weight = (inverse / -inverse.diagonal()).fill_diagonal_(0.0).float()
    return Fitted(n * (n - 1), score_items=lambda users: rated_rows(seen, users) @ weight)


def _mlp(training: Ratings, seed: int, size: str) -> Fitted:
    """The MLP of table 2, by the trainer's own steps with the recipe's settings."""
    config = recipe("paper", SIZES[size], seed=seed)
    mean = training.rating.double().mean().item()
    torch.manual_seed(seed)
    model = MLPModel(
        *shape_of(training), config.mlp_embedding_size, config.mlp_hidden, mean, config.embedding_std
    )
    optimizer = control_optimizer(model, config)
    for _ in range(config.mlp_epochs):
        for rows in torch.randperm(len(training)).split(config.mlp_batch_size):
            batch = training.user[rows], training.item[rows], training.rating[rows]
            descend(optimizer, control_objective(model, *batch)[0])

    @torch.no_grad()
    def predict(users: Tensor, items: Tensor) -> Tensor:
        found: Tensor = model(users, items)
        return found

    return Fitted(count_parameters(model), predict=predict)


def _mlp_cross_entropy(training: Ratings, seed: int, size: str) -> Fitted:
    """The same network, whose output is the logit of an interaction, by cross-entropy."""
    k, hidden, rate, epochs, batch = {
        "ml-100k": (32, (64, 32), 3e-3, 20, 1024),
        "ml-1m": (32, (64, 32), 3e-3, 10, 4096),
    }[size]
    torch.manual_seed(seed)
    model = MLPModel(*shape_of(training), k, hidden, mean=0.0, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    epoch = labelled_batches(training, batch, seed)
    for _ in range(epochs):
        for users, items, labels in epoch():
            descend(optimizer, F.binary_cross_entropy_with_logits(model(users, items), labels))
    return Fitted(
        count_parameters(model), score_items=over_all_items(model, training.n_items, 4 * k + sum(hidden))
    )


#: By the key on the command line, in the order of tables.
BASELINES: dict[str, Baseline] = {
    "biases": Baseline("User and item biases", "ours", ("rating",), _biases),
    "knn": Baseline("Item KNN with biases", "surprise", ("rating",), adapters.knn),
    "mf": Baseline("Matrix factorisation with biases", "cornac", ("rating",), adapters.matrix_factorisation),
    "svd++": Baseline("SVD++", "surprise", ("rating",), adapters.svdpp),
    "mlp": Baseline("MLP", "ours", ("rating",), _mlp),
    "bayesian-fm": Baseline("Bayesian FM", "myfm", ("rating",), adapters.bayesian_fm),
    "bayesian-svd++": Baseline("Bayesian FM, implicit blocks", "myfm", ("rating",), adapters.bayesian_svdpp),
    "popularity": Baseline("Popularity", "ours", ("ranking",), _popularity),
    "bpr": Baseline("BPR", "cornac", ("ranking",), adapters.bpr),
    "mlp-ce": Baseline("MLP, cross-entropy", "ours", ("ranking",), _mlp_cross_entropy),
    "neumf": Baseline("NeuMF", "cornac", ("ranking",), adapters.neumf),
    "autoencoder": Baseline("Variational autoencoder", "cornac", ("ranking",), adapters.autoencoder),
    "als": Baseline("ALS", "implicit", ("ranking",), adapters.als),
    "ease": Baseline("EASE", "ours", ("ranking",), _ease),
    "sequence-ease": Baseline("EASE of ordered histories", "ours", ("ranking",), sequence_ease),
    "gru4rec": Baseline("GRU4Rec", "ours", ("ranking",), gru4rec),
    "sasrec": Baseline("SASRec", "ours", ("ranking",), sasrec),
}
