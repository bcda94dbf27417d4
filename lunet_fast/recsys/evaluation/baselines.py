"""Other recommenders, tuned and behind one interface, for ``lunet-fast compare``.

Each :class:`Baseline` is one adapter: it takes the training part as :class:`~.ratings.Ratings`, hands it to
the package that implements the method, and gives back a :class:`Fitted` that speaks of users and items by
our indices. The packages come with ``pip install "lunet-fast[baselines]"``; the methods whose package is
"ours" need none.

For the methods that rank, every training rating is an interaction, whatever its value. The settings for
``ml-100k`` were chosen on a validation part of its training data. Matrix factorisation, EASE and ALS have
settings that are known to be good on ``ml-1m``; the others bring there what they have for ``ml-100k``, the
slow ones with fewer epochs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast.recsys.data.negatives import NegativeSampler
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.model.network import Interactions, MLPModel
from lunet_fast.recsys.model.training import control_objective, control_optimizer
from lunet_fast.training.loop import cpu_threads, descend

__all__ = ["BASELINES", "GIBBS", "MF", "SIZES", "Baseline", "Fitted", "matrix_factorisation", "missing"]

#: Number of ratings of the bundled data sets, for which there are settings.
SIZES = {"ml-100k": 100_000, "ml-1m": 1_000_209}

#: Matrix factorisation: factors, rate, L2 and epochs by the size.
MF = {"ml-100k": (100, 0.005, 0.08, 100), "ml-1m": (200, 0.01, 0.05, 30)}

#: Bayesian factorisation machines: rank and Gibbs samples.
GIBBS = (10, 200)

#: Numbers held at once while all items are scored: bounds the memory.
CHUNK = 2**22

#: Pairs without interaction that are drawn for each one with, where cross-entropy is trained.
NEGATIVES = 4


@dataclass(frozen=True)
class Fitted:
    """A trained method. Users and items are indices of the training part's ``Ratings``, int64.

    A user or item without training ratings is served too: ratings fall back to the biases that are known, or
    to what the method itself makes of it; rankings of such a user to (about) popularity, or to equal scores.
    """

    parameters: int
    """Numbers that training has set; 0 for a method that has none to speak of."""
    predict: Callable[[Tensor, Tensor], Tensor | None] = lambda users, items: None
    """(users ``[N]``, items ``[N]``) -> ratings float32 ``[N]``, not clipped to the scale; None from a method
    that does not predict ratings."""
    score_items: Callable[[Tensor], Tensor | None] = lambda users: None
    """users ``[U]`` -> scores float32 ``[U, n_items]``, finite, higher is better, of all items, those of the
    training part included; None from a method that does not rank. U n_items numbers of memory."""


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
                (:func:`~.config.nearest_dataset`).

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
        with _undisturbed(), cpu_threads(1):
            return self.train(training, seed % 2**31, size)  # all that some packages take


def missing(baseline: Baseline) -> str | None:
    """Why ``baseline`` cannot be trained here, and what to install; None where it can. Imports packages."""
    if baseline.package == "ours":
        return None
    try:
        with _undisturbed():
            _package(baseline.package)
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
    residual = training.rating.double() - mean
    b_user = torch.zeros(training.n_users, dtype=torch.float64)
    b_item = torch.zeros(training.n_items, dtype=torch.float64)
    n_user = torch.bincount(training.user, minlength=training.n_users)
    n_item = torch.bincount(training.item, minlength=training.n_items)
    for _ in range(30):
        left = residual - b_user[training.user]
        b_item = torch.zeros_like(b_item).index_add_(0, training.item, left) / (n_item + l2_item)
        left = residual - b_item[training.item]
        b_user = torch.zeros_like(b_user).index_add_(0, training.user, left) / (n_user + l2_user)
    return _biased_product(mean, b_user, b_item)


def _ease(training: Ratings, seed: int, size: str) -> Fitted:
    """EASE (Steck 2019): scores S B, where B minimises |S - S B|^2 + l2 |B|^2 with a diagonal of zeros.

    O(n_users n_items^2 + n_items^3) time and O(n_items^2) memory.
    """
    l2 = {"ml-100k": 300.0, "ml-1m": 1000.0}[size]
    seen = _interactions(training)
    n = training.n_items
    gram = torch.zeros(n, n, dtype=torch.float64)
    for users in torch.arange(training.n_users).split(_rows(n)):
        rows = _rated(seen, users)
        gram += rows.T @ rows  # whole numbers below 2^24, which float32 holds
    gram.diagonal().add_(l2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weight = (inverse / -inverse.diagonal()).fill_diagonal_(0.0).float()
    return Fitted(n * (n - 1), score_items=lambda users: _rated(seen, users) @ weight)


def _mlp(training: Ratings, seed: int, size: str) -> Fitted:
    """The MLP of table 2, by the trainer's own steps with the recipe's settings."""
    config = recipe("paper", SIZES[size], seed=seed)
    mean = training.rating.double().mean().item()
    torch.manual_seed(seed)
    model = MLPModel(
        *_shape(training), config.mlp_embedding_size, config.mlp_hidden, mean, config.embedding_std
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

    return Fitted(_size(model), predict=predict)


def _mlp_cross_entropy(training: Ratings, seed: int, size: str) -> Fitted:
    """The same network, whose output is the logit of an interaction, by cross-entropy."""
    k, hidden, rate, epochs, batch = {
        "ml-100k": (32, (64, 32), 3e-3, 20, 1024),
        "ml-1m": (32, (64, 32), 3e-3, 10, 4096),
    }[size]
    torch.manual_seed(seed)
    model = MLPModel(*_shape(training), k, hidden, mean=0.0, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    epoch = _labelled_batches(training, batch, seed)
    for _ in range(epochs):
        for users, items, labels in epoch():
            descend(optimizer, F.binary_cross_entropy_with_logits(model(users, items), labels))
    return Fitted(_size(model), score_items=_over_all_items(model, training.n_items, 4 * k + sum(hidden)))


# --- cornac ---------------------------------------------------------------------------------------------


def matrix_factorisation(training: Ratings, seed: int, size: str, threads: int = 1) -> Fitted:
    """cornac's MF with biases, by SGD: what the baseline ``mf`` trains, there with one thread.

    With more it is not reproducible, and takes no seed. ImportError without cornac.
    """
    k, rate, l2, epochs = MF[size]
    way = {"seed": seed} if threads == 1 else {"num_threads": threads}
    model = _package("cornac.models").MF(
        k=k, learning_rate=rate, lambda_reg=l2, max_iter=epochs, use_bias=True, **way
    )
    model.fit(_cornac_data(training, seed))
    return _biased_product(
        training.rating.double().mean(),
        torch.from_numpy(model.u_biases),
        torch.from_numpy(model.i_biases),
        _zero_unrated(model.u_factors, training.user),
        _zero_unrated(model.i_factors, training.item),
    )


def _bpr(training: Ratings, seed: int, size: str) -> Fitted:
    """Matrix factorisation with item biases, trained to put what a user rated before a drawn item."""
    k, rate, l2, epochs = {"ml-100k": (50, 0.02, 0.01, 200), "ml-1m": (50, 0.02, 0.01, 100)}[size]
    model = _package("cornac.models").BPR(
        k=k, learning_rate=rate, lambda_reg=l2, max_iter=epochs, use_bias=True, seed=seed
    )
    model.fit(_cornac_data(training, seed))
    # Items without ratings were drawn as the worse ones, so they have learned vectors; such users have not.
    return _product(
        _zero_unrated(model.u_factors, training.user),
        torch.from_numpy(model.i_factors),
        torch.from_numpy(model.i_biases),
    )


def _neumf(training: Ratings, seed: int, size: str) -> Fitted:
    """A product of embeddings beside an MLP of embeddings, by cross-entropy.

    cornac trains it, but on batches of ours: its own loop over single draws takes most of the time.
    """
    epochs, batch = {"ml-100k": (20, 1024), "ml-1m": (10, 4096)}[size]
    data = _cornac_data(training, seed)
    epoch = _labelled_batches(training, batch, seed)

    def batches(*_: Any, **__: Any) -> Iterator[list[Any]]:
        for columns in epoch():
            yield [column.numpy() for column in columns]

    data.uir_iter = batches
    model = _package("cornac.models").NeuMF(
        num_factors=8,
        layers=[64, 32, 16, 8],
        num_epochs=epochs,
        batch_size=batch,
        num_neg=NEGATIVES,
        lr=3e-3,
        backend="pytorch",
        verbose=False,
        seed=seed,
    )
    model.fit(data)
    net = model.model.cpu()

    def logits(users: Tensor, items: Tensor) -> Tensor:
        # Without the sigmoid of its own forward, which makes equal what is nearly certain.
        found: Tensor = net.logit(torch.cat((net.gmf.h(users, items), net.mlp.h(users, items)), -1))
        return found.squeeze(-1)

    return Fitted(_size(net), score_items=_over_all_items(logits, training.n_items, 256))


def _autoencoder(training: Ratings, seed: int, size: str) -> Fitted:
    """Variational autoencoder of a user's interactions with a multinomial likelihood (Liang et al. 2018)."""
    k, hidden, beta, epochs = {"ml-100k": (50, 200, 0.2, 50), "ml-1m": (100, 400, 0.2, 50)}[size]
    model = _package("cornac.models").VAECF(
        k=k,
        autoencoder_structure=[hidden],
        act_fn="tanh",
        likelihood="mult",
        n_epochs=epochs,
        batch_size=100,
        learning_rate=0.001,
        beta=beta,
        seed=seed,
    )
    model.fit(_cornac_data(training, seed))
    vae, seen = model.vae, _interactions(training)

    @torch.no_grad()
    def score_items(users: Tensor) -> Tensor:
        # Without the softmax of its own decode, in which the small ones become equal.
        scores: Tensor = vae.decoder(vae.encode(_rated(seen, users))[0])
        return scores

    return Fitted(_size(vae), score_items=score_items)


def _cornac_data(training: Ratings, seed: int) -> Any:
    """cornac's data set under our indices: its own builders would number users and items anew."""
    columns = tuple(column.numpy() for column in (training.user, training.item, training.rating.double()))
    maps = [{index: index for index in range(n)} for n in _shape(training)]
    return _package("cornac.data").Dataset(*_shape(training), *maps, columns, seed=seed)


# --- surprise -------------------------------------------------------------------------------------------


def _svdpp(training: Ratings, seed: int, size: str) -> Fitted:
    """SVD++: biased factors, and the user's vector has a share of each item that the user rated."""
    k, rate, l2, epochs = {"ml-100k": (20, 0.01, 0.08, 30), "ml-1m": (20, 0.01, 0.08, 20)}[size]
    model = _package("surprise").SVDpp(
        n_factors=k,
        n_epochs=epochs,
        lr_all=rate,
        reg_all=l2,
        # An item's share is decayed once for each rating of each user who rated it: l2 would leave nothing.
        reg_yj=0.003,
        init_std_dev=0.01,
        random_state=seed,
        cache_ratings=True,
    )
    trainset = _surprise_data(training)
    model.fit(trainset)
    users = torch.tensor([trainset.to_raw_uid(u) for u in trainset.all_users()])
    items = torch.tensor([trainset.to_raw_iid(i) for i in trainset.all_items()])

    def ours(learned: Any, rows: Tensor, n: int) -> Tensor:
        """Its table under our indices, zero where there were no ratings."""
        learned = torch.from_numpy(learned)
        return torch.zeros(n, *learned.shape[1:], dtype=learned.dtype).index_copy_(0, rows, learned)

    n_users, n_items = _shape(training)
    seen = _interactions(training)
    share = seen.user_counts.clamp(min=1).double().rsqrt().unsqueeze(1)
    user_vectors = ours(model.pu, users, n_users)
    user_vectors += seen.sum_over_items(ours(model.yj, items, n_items)) * share
    fitted = _biased_product(
        training.rating.double().mean(),
        ours(model.bu, users, n_users),
        ours(model.bi, items, n_items),
        user_vectors,
        ours(model.qi, items, n_items),
    )
    return Fitted(fitted.parameters + model.yj.size, predict=fitted.predict)


def _knn(training: Ratings, seed: int, size: str) -> Fitted:
    """The user's deviations from the biases on the most similar items; O(n_items^2) memory."""
    model = _package("surprise").KNNBaseline(
        k=40, sim_options={"name": "pearson_baseline", "user_based": False}, verbose=False
    )
    model.fit(_surprise_data(training))

    def predict(users: Tensor, items: Tensor) -> Tensor:
        pairs = zip(users.tolist(), items.tolist(), strict=True)
        found = [model.predict(u, i, clip=False).est for u, i in pairs]
        return torch.tensor(found, dtype=torch.float32)

    n = len(model.bi)
    return Fitted(1 + len(model.bu) + n + n * (n - 1) // 2, predict=predict)


def _surprise_data(training: Ratings) -> Any:
    surprise, pandas = _package("surprise"), _package("pandas")
    columns = {"user": training.user, "item": training.item, "rating": training.rating.double()}
    frame = pandas.DataFrame({name: column.numpy() for name, column in columns.items()})
    reader = surprise.Reader(rating_scale=training.scale)
    return surprise.Dataset.load_from_df(frame, reader).build_full_trainset()


# --- implicit -------------------------------------------------------------------------------------------


def _als(training: Ratings, seed: int, size: str) -> Fitted:
    """Factors of the 0/1 matrix by alternating least squares, a 1 weighing ``alpha`` times as much as a 0."""
    f, l2, alpha, sweeps = {"ml-100k": (64, 30.0, 10.0, 15), "ml-1m": (64, 30.0, 10.0, 15)}[size]
    model = _package("implicit.cpu.als").AlternatingLeastSquares(
        factors=f, regularization=l2, alpha=alpha, iterations=sweeps, num_threads=1, random_state=seed
    )
    model.fit(_sparse(training).astype(np.float32), show_progress=False)
    return _product(torch.from_numpy(model.user_factors), torch.from_numpy(model.item_factors))


# --- myFM -----------------------------------------------------------------------------------------------


def _bayesian_fm(training: Ratings, seed: int, size: str) -> Fitted:
    """Bayesian factorisation machine on user and item, the mean over Gibbs samples."""
    return _myfm(training, seed, implicit=False)


def _bayesian_svdpp(training: Ratings, seed: int, size: str) -> Fitted:
    """The same with who rated what as further features of both (Rendle, Zhang and Koren 2019)."""
    return _myfm(training, seed, implicit=True)


def _myfm(training: Ratings, seed: int, *, implicit: bool) -> Fitted:
    myfm, sparse = _package("myfm"), _package("scipy.sparse")
    rank, samples = GIBBS
    shape = _shape(training)
    sides = [sparse.identity(n, format="csr") for n in shape]
    groups = list(shape)
    if implicit:
        seen = _sparse(training)
        others = [_normalised(seen), _normalised(seen.T.tocsr())]
        sides = [sparse.hstack(pair, format="csr") for pair in zip(sides, others, strict=True)]
        groups = [shape[0], shape[1], shape[1], shape[0]]

    def blocks(users: Tensor, items: Tensor) -> list[Any]:
        indices = (users.tolist(), items.tolist())
        return [myfm.RelationBlock(rows, side) for rows, side in zip(indices, sides, strict=True)]

    model = myfm.MyFMRegressor(rank=rank, random_seed=seed)
    known = blocks(training.user, training.item)
    model.fit(None, training.rating.double().numpy(), X_rel=known, n_iter=samples, group_shapes=groups)

    def predict(users: Tensor, items: Tensor) -> Tensor:
        return torch.from_numpy(model.predict(None, blocks(users, items), n_workers=1)).float()

    return Fitted(1 + sum(groups) * (1 + rank), predict=predict)


def _normalised(seen: Any) -> Any:
    """Rows divided by the root of their number of entries."""
    counts = np.maximum(seen.getnnz(axis=1), 1)
    return seen.multiply(1.0 / np.sqrt(counts)[:, None]).tocsr()


# --- what they share ------------------------------------------------------------------------------------


def _biased_product(
    mean: Tensor,
    user_bias: Tensor,
    item_bias: Tensor,
    user_vectors: Tensor | None = None,
    item_vectors: Tensor | None = None,
) -> Fitted:
    """Ratings mean + b_u + b_i + p_u.q_i."""

    def predict(users: Tensor, items: Tensor) -> Tensor:
        found = mean + user_bias[users] + item_bias[items]
        if user_vectors is not None and item_vectors is not None:
            found = found + (user_vectors[users] * item_vectors[items]).sum(1)
        return found.float()

    tables = (user_bias, item_bias, user_vectors, item_vectors)
    return Fitted(1 + sum(table.numel() for table in tables if table is not None), predict=predict)


def _product(user_vectors: Tensor, item_vectors: Tensor, item_bias: Tensor | None = None) -> Fitted:
    """Scores p_u.q_i + b_i."""

    def score_items(users: Tensor) -> Tensor:
        scores = user_vectors[users] @ item_vectors.T
        return scores if item_bias is None else scores + item_bias

    tables = (user_vectors, item_vectors, item_bias)
    return Fitted(sum(table.numel() for table in tables if table is not None), score_items=score_items)


def _over_all_items(
    logits: Callable[[Tensor, Tensor], Tensor], n_items: int, width: int
) -> Callable[[Tensor], Tensor]:
    """``score_items`` from the scores of pairs, each of which takes ``width`` numbers of memory."""

    @torch.no_grad()
    def score_items(users: Tensor) -> Tensor:
        items = torch.arange(n_items)
        parts = [
            logits(some.repeat_interleave(n_items), items.repeat(len(some))).view(len(some), n_items)
            for some in users.split(_rows(width * n_items))
        ]
        return torch.cat(parts)

    return score_items


def _labelled_batches(
    training: Ratings, size: int, seed: int
) -> Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]:
    """At each call an epoch of batches (users, items, labels float32), for cross-entropy.

    A batch has ``size`` interactions, labelled 1, then NEGATIVES items for each that its user has not rated,
    labelled 0. Users who have rated all items are left out.
    """
    counts = torch.bincount(training.user, minlength=training.n_users)
    training = training.select(counts[training.user] < training.n_items)
    sampler = NegativeSampler(_interactions(training).pairs, training.n_items)
    generator = torch.Generator().manual_seed(seed)

    def epoch() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows in torch.randperm(len(training), generator=generator).split(size):
            users, items = training.user[rows], training.item[rows]
            drawn = sampler.draw(users, NEGATIVES, generator).flatten()
            labels = (torch.arange(len(rows) * (1 + NEGATIVES)) < len(rows)).float()
            yield torch.cat((users, users.repeat_interleave(NEGATIVES))), torch.cat((items, drawn)), labels

    return epoch


def _zero_unrated(vectors: Any, rated: Tensor) -> Tensor:
    """``vectors`` [n, k] with zeros in the rows that ``rated`` [N] does not name, which nothing trained."""
    table = torch.from_numpy(vectors)
    return table * (torch.bincount(rated, minlength=len(table)) > 0).unsqueeze(1)


def _shape(training: Ratings) -> tuple[int, int]:
    return training.n_users, training.n_items


def _interactions(training: Ratings) -> Interactions:
    return Interactions(training.user, training.item, *_shape(training))


def _rated(seen: Interactions, users: Tensor) -> Tensor:
    """Rows float32 ``[U, n_items]``, 1 where the user rated the item and 0 elsewhere."""
    counts = seen.user_counts[users]
    row = torch.repeat_interleave(torch.arange(len(users)), counts)
    start = seen.indptr[users] - F.pad(counts.cumsum(0), (1, 0))[:-1]
    rows = torch.zeros(len(users), seen.n_items)
    rows[row, seen.indices[start[row] + torch.arange(len(row))].long()] = 1.0
    return rows


def _sparse(training: Ratings) -> Any:
    """The 0/1 matrix of interactions [n_users, n_items], SciPy's CSR in float64."""
    seen = _interactions(training)
    columns = (np.ones(len(seen.indices)), seen.indices.numpy(), seen.indptr.numpy())
    return _package("scipy.sparse").csr_matrix(columns, shape=_shape(training))


def _rows(width: int) -> int:
    return max(CHUNK // width, 1)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _package(name: str) -> Any:
    if name == "myfm":
        with _without_pkg_resources():
            return importlib.import_module(name)
    return importlib.import_module(name)


@contextlib.contextmanager
def _without_pkg_resources() -> Iterator[None]:
    """Inside, myFM can be imported: it imports two names of ``pkg_resources``, which setuptools has given up,
    and uses neither."""
    name = "pkg_resources"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        yield
        return
    stand_in: Any = types.ModuleType(name)
    stand_in.DistributionNotFound = stand_in.get_distribution = None
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, nothing is printed or warned of; the global generators, and the default dtype that cornac sets,
    are at the end what they were."""
    state, dtype = np.random.get_state(), torch.get_default_dtype()  # noqa: NPY002
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
        torch.set_default_dtype(dtype)


#: By the key on the command line, in the order of tables.
BASELINES: dict[str, Baseline] = {
    "biases": Baseline("User and item biases", "ours", ("rating",), _biases),
    "knn": Baseline("Item KNN with biases", "surprise", ("rating",), _knn),
    "mf": Baseline("Matrix factorisation with biases", "cornac", ("rating",), matrix_factorisation),
    "svd++": Baseline("SVD++", "surprise", ("rating",), _svdpp),
    "mlp": Baseline("MLP", "ours", ("rating",), _mlp),
    "bayesian-fm": Baseline("Bayesian FM", "myfm", ("rating",), _bayesian_fm),
    "bayesian-svd++": Baseline("Bayesian FM, implicit blocks", "myfm", ("rating",), _bayesian_svdpp),
    "popularity": Baseline("Popularity", "ours", ("ranking",), _popularity),
    "bpr": Baseline("BPR", "cornac", ("ranking",), _bpr),
    "mlp-ce": Baseline("MLP, cross-entropy", "ours", ("ranking",), _mlp_cross_entropy),
    "neumf": Baseline("NeuMF", "cornac", ("ranking",), _neumf),
    "autoencoder": Baseline("Variational autoencoder", "cornac", ("ranking",), _autoencoder),
    "als": Baseline("ALS", "implicit", ("ranking",), _als),
    "ease": Baseline("EASE", "ours", ("ranking",), _ease),
}
