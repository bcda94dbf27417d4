"""Other recommenders, tuned and behind one interface, for ``lunet-fast compare``.

Each :class:`Baseline` takes the training part as :class:`~lunet_fast.recsys.data.ratings.Ratings` and gives
back a :class:`~.fitted.Fitted`, which speaks of users and items by our indices. The methods whose package is
"ours" are here; the others are in :mod:`~lunet_fast.recsys.evaluation.adapters`, and their packages come with
``pip install "lunet-fast[baselines]"``. What they are set to is in
:mod:`~lunet_fast.recsys.evaluation.peer_settings`.

For the methods that rank, every training rating is an interaction, whatever its value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
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
    mean_of,
    over_all_items,
    rated_rows,
    rows_at_once,
    shape_of,
)
from lunet_fast.recsys.evaluation.peer_settings import Settings, settings_for
from lunet_fast.recsys.evaluation.row_networks import cdae, dmf, rbm
from lunet_fast.recsys.evaluation.sequence_ease import sequence_ease
from lunet_fast.recsys.evaluation.sequence_networks import gru4rec, sasrec
from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.model.mlp import MLPModel
from lunet_fast.recsys.model.offsets import shrunk_biases
from lunet_fast.recsys.model.training import control_objective, control_optimizer
from lunet_fast.training.loop import cpu_threads, descend

#: Number of ratings of the bundled data sets, for which there are settings.
SIZES = {"ml-100k": 100_000, "ml-1m": 1_000_209}


Kinds = tuple[Literal["rating", "ranking"], ...]

SEEDS_APART = 1_000_003
"""Between the runs of one row, so that another seed's are others."""


@dataclass(frozen=True)
class Baseline:
    """A method to compare with."""

    key: str
    """On the command line."""
    name: str
    """As in tables."""
    package: Literal["cornac", "implicit", "myfm", "surprise", "ours"]
    kinds: Kinds
    """What it does: predict ratings, rank items, or both."""
    train: Callable[[Ratings, int, Settings], Fitted]
    """What :meth:`fit` runs: of the training part, a seed and the settings."""
    side: bool = False
    """Whether it reads the side features of users and items."""
    runs: int = 1
    """Of how many trainings, which differ in their seeds, the predictions are the mean."""
    family: str = ""
    """Of a mean of several runs the key of one, whose settings it has."""

    @property
    def settings_key(self) -> str:
        """Where its settings are found."""
        return self.family or self.key

    def fit(self, training: Ratings, seed: int, size: str) -> Fitted:
        """The method trained on ``training``, on one thread, with the settings for data of ``size``.

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
        return self.fit_with(training, seed, settings_for(self.settings_key, size))

    def fit_with(self, training: Ratings, seed: int, settings: Settings) -> Fitted:
        """:meth:`fit` with settings of one's own, those of ``peer_settings.SETTINGS`` by name.

        The packages' output, progress bars and warnings are swallowed, and the global generators of NumPy and
        PyTorch are left as they were. The same seed gives the same result on the same machine.
        """
        if len(training) == 0:
            raise ValueError(f"training is empty: {self.name} needs at least one rating")
        reason = missing(self)
        if reason is not None:
            raise ImportError(reason)
        with undisturbed(), cpu_threads(1):
            # Modulo 2^31, which is all that some packages take.
            seeds = [(seed + run * SEEDS_APART) % 2**31 for run in range(self.runs)]
            fits = [self.train(training, each, settings) for each in seeds]
        return fits[0] if self.runs == 1 else mean_of(fits)


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


def _popularity(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """The number of training ratings."""
    counts = torch.bincount(training.item, minlength=training.n_items).float()
    return Fitted(0, score_items=lambda users: counts.repeat(len(users), 1))


def _biases(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """mean + b_u + b_i, the least squares with L2 on the biases, by turns until they stand still."""
    mean = training.rating.double().mean()
    b_user, b_item = shrunk_biases(
        training.user,
        training.item,
        training.rating.double() - mean,
        (training.n_users, training.n_items),
        (settings["l2_user"], settings["l2_item"]),
        sweeps=30,
    )
    return biased_product(mean, b_user, b_item)


def _ease(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """EASE (Steck 2019): scores S B, where B minimises |S - S B|^2 + l2 |B|^2 with a diagonal of zeros.

    O(n_users n_items^2 + n_items^3) time and O(n_items^2) memory.
    """
    seen = interactions_of(training)
    n = training.n_items
    gram = torch.zeros(n, n, dtype=torch.float64)
    for users in torch.arange(training.n_users).split(rows_at_once(n)):
        rows = rated_rows(seen, users)
        gram += rows.T @ rows  # whole numbers below 2^24, which float32 holds
    gram.diagonal().add_(settings["l2"])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weight = (inverse / -inverse.diagonal()).fill_diagonal_(0.0).float()
    return Fitted(n * (n - 1), score_items=lambda users: rated_rows(seen, users) @ weight)


def _mlp(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """The MLP of table 2, by the trainer's own steps; what ``settings`` lack is recipe ``paper``'s."""
    config = recipe("paper", len(training), seed=seed, **settings)
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


def _mlp_cross_entropy(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """The same network, whose output is the logit of an interaction, by cross-entropy."""
    k, hidden = settings["size"], settings["hidden"]
    torch.manual_seed(seed)
    model = MLPModel(*shape_of(training), k, hidden, mean=0.0, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["rate"], fused=True)
    epoch = labelled_batches(training, settings["batch"], seed)
    for _ in range(settings["epochs"]):
        for users, items, labels in epoch():
            descend(optimizer, F.binary_cross_entropy_with_logits(model(users, items), labels))
    return Fitted(
        count_parameters(model), score_items=over_all_items(model, training.n_items, 4 * k + sum(hidden))
    )


_RATING: Kinds = ("rating",)
_RANKING: Kinds = ("ranking",)
_WITH_HISTORIES = partial(adapters.bayesian_fm, implicit=True)
_WITH_SIDE = partial(adapters.bayesian_fm, side=True)
_WITH_BOTH = partial(adapters.bayesian_fm, implicit=True, side=True)

_ONE_RUN = (
    Baseline("biases", "User and item biases", "ours", _RATING, _biases),
    Baseline("knn", "Item KNN with biases", "surprise", _RATING, adapters.knn),
    Baseline("mf", "Matrix factorisation with biases", "cornac", _RATING, adapters.matrix_factorisation),
    Baseline("svd++", "SVD++", "surprise", _RATING, adapters.svdpp),
    Baseline("rbm", "Restricted Boltzmann machine", "ours", _RATING, rbm),
    Baseline("mlp", "MLP", "ours", _RATING, _mlp),
    Baseline("bayesian-fm", "Bayesian FM", "myfm", _RATING, adapters.bayesian_fm),
    Baseline("bayesian-svd++", "Bayesian FM, implicit blocks", "myfm", _RATING, _WITH_HISTORIES),
    Baseline("bayesian-fm-side", "Bayesian FM, side features", "myfm", _RATING, _WITH_SIDE, side=True),
    Baseline(
        "bayesian-svd++-side",
        "Bayesian FM, implicit blocks, side features",
        "myfm",
        _RATING,
        _WITH_BOTH,
        side=True,
    ),
    Baseline("popularity", "Popularity", "ours", _RANKING, _popularity),
    Baseline("bpr", "BPR", "cornac", _RANKING, adapters.bpr),
    Baseline("mlp-ce", "MLP, cross-entropy", "ours", _RANKING, _mlp_cross_entropy),
    Baseline("neumf", "NeuMF", "cornac", _RANKING, adapters.neumf),
    Baseline("autoencoder", "Variational autoencoder", "cornac", _RANKING, adapters.autoencoder),
    Baseline("cdae", "Denoising autoencoder (CDAE)", "ours", _RANKING, cdae),
    Baseline("dmf", "Deep matrix factorisation (DMF)", "ours", _RANKING, dmf),
    Baseline("als", "ALS", "implicit", _RANKING, adapters.als),
    Baseline("ease", "EASE", "ours", _RANKING, _ease),
    Baseline("sequence-ease", "EASE of ordered histories", "ours", _RANKING, sequence_ease),
    Baseline("gru4rec", "GRU4Rec", "ours", _RANKING, gru4rec),
    Baseline("sasrec", "SASRec", "ours", _RANKING, sasrec),
)

AVERAGED = {
    "mf": 16,
    **dict.fromkeys(("mlp", "bayesian-svd++", "bayesian-svd++-side"), 4),
    **dict.fromkeys(("bpr", "autoencoder", "als"), 4),
}
"""Methods whose mean over so many runs is a row too: as many as recipe ``best`` has members on ML-100K, 16
for ratings and 4 for rankings; of the MLP, of which a run takes minutes, 4. The Bayesian ones are means
already, of samples of one chain: theirs are of 4 chains, for the strongest."""


def _baselines() -> Iterator[Baseline]:
    for one in _ONE_RUN:
        yield one
        if one.key in AVERAGED:
            runs = AVERAGED[one.key]
            name = f"{one.name}, mean of {runs}"
            yield replace(one, key=f"{one.key}-mean", name=name, runs=runs, family=one.key)


#: By the key on the command line, in the order of tables.
BASELINES: dict[str, Baseline] = {baseline.key: baseline for baseline in _baselines()}
