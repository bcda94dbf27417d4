"""Baselines that other packages implement: cornac, surprise, implicit and myFM behind one interface.

Each adapter hands the training part to its package and gives back a :class:`~.fitted.Fitted` that speaks of
users and items by our indices. The packages are imported on use.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lunet_fast.recsys.data.features import side_features
from lunet_fast.recsys.data.ratings import Ratings, Ties
from lunet_fast.recsys.evaluation import fitted
from lunet_fast.recsys.evaluation.fitted import Fitted, interactions_of, product, shape_of, zero_unrated
from lunet_fast.recsys.evaluation.peer_settings import Settings


def import_package(name: str) -> Any:
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
def undisturbed() -> Iterator[None]:
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


# --- cornac ---------------------------------------------------------------------------------------------


def matrix_factorisation(training: Ratings, seed: int, settings: Settings, threads: int = 1) -> Fitted:
    """cornac's MF with biases, by SGD: what the baseline ``mf`` trains, there with one thread.

    With more it is not reproducible, and takes no seed. ImportError without cornac.
    """
    way = {"seed": seed} if threads == 1 else {"num_threads": threads}
    model = import_package("cornac.models").MF(**_cornac_factors(settings), use_bias=True, **way)
    model.fit(_cornac_data(training, seed))
    return fitted.biased_product(
        training.rating.double().mean(),
        torch.from_numpy(model.u_biases),
        torch.from_numpy(model.i_biases),
        (zero_unrated(model.u_factors, training.user), zero_unrated(model.i_factors, training.item)),
    )


def bpr(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """Matrix factorisation with item biases, trained to put what a user rated before a drawn item."""
    model = import_package("cornac.models").BPR(**_cornac_factors(settings), use_bias=True, seed=seed)
    model.fit(_cornac_data(training, seed))
    return _pairwise(model, training)


def _pairwise(model: Any, training: Ratings) -> Fitted:
    """Of cornac's BPR and its kin. Items without ratings were drawn as the worse ones, so they have learned
    vectors; such users have not."""
    return product(
        zero_unrated(model.u_factors, training.user),
        torch.from_numpy(model.i_factors),
        torch.from_numpy(model.i_biases),
    )


def social_bpr(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """SBPR (Zhao, McAuley and King 2014): :func:`bpr` in which what friends rated stands between what a user
    rated and a drawn item. ValueError for ratings without friends."""
    ties = training.friends
    if ties is None:
        raise ValueError(f"{training.name} has no friends: give them by with_friends()")
    data = _cornac_data(training, seed)
    given = _cornac_factors(settings)
    penalties = dict.fromkeys(("lambda_u", "lambda_v", "lambda_b"), given.pop("lambda_reg"))
    model = import_package("cornac.models").SBPR(**given, **penalties, seed=seed)
    # cornac 3.0 calls the first without the data it asks for, and NumPy 2.4 has not what the second calls.
    model._prepare_data = partial(model._prepare_data, data)
    model._prepare_social_data = partial(_of_friends_alone, training, ties)
    model.fit(data)
    return _pairwise(model, training)


def _of_friends_alone(training: Ratings, ties: Ties) -> tuple[Any, Any, Any]:
    """What friends rated and the user did not: items, how many friends, and where a user's begin and end."""
    from scipy.sparse import csr_array

    n_users, n_items = shape_of(training)
    rated = csr_array((np.ones(len(training)), (training.user, training.item)), (n_users, n_items))
    friends = csr_array((np.ones(len(ties.user)), (ties.user, ties.friend)), (n_users, n_users))
    counts = friends @ rated
    counts = csr_array(counts - counts * (rated > 0))
    counts.eliminate_zeros()
    return counts.indices.astype(np.int32), counts.data.astype(np.int32), counts.indptr.astype(np.int32)


def topic_regression(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """CTR (Wang and Blei 2011): an item's vector is what its title's topics say of it and what its users do,
    so an item without ratings has one too. ValueError for ratings without titles."""
    info = training.item_info
    if info is None or "title" not in info:
        raise ValueError(f"{training.name} has no titles of items")
    titles = info["title"].fillna("").astype(str).tolist()
    modality = import_package("cornac.data").TextModality(
        corpus=titles, ids=list(range(training.n_items)), max_vocab=8000
    )
    ones = replace(training, rating=torch.ones_like(training.rating), scale=(1.0, 1.0))
    data = _cornac_data(ones, seed)
    data.add_modalities(item_text=modality.build(id_map={i: i for i in range(training.n_items)}))
    model = import_package("cornac.models").CTR(
        k=settings["topics"],
        max_iter=settings["epochs"],
        lambda_u=settings["l2"],
        lambda_v=settings["l2_topics"],
        b=settings["unrated"],
        seed=seed,
        verbose=False,
    )
    model.fit(data)
    return product(torch.from_numpy(model.U).float(), torch.from_numpy(model.V).float())


def neumf(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """A product of embeddings beside an MLP of embeddings, by cross-entropy.

    cornac trains it, but on batches of ours: its own loop over single draws takes most of the time.
    """
    data = _cornac_data(training, seed)
    epoch = fitted.labelled_batches(training, settings["batch"], seed)

    def batches(*_: Any, **__: Any) -> Iterator[list[Any]]:
        for columns in epoch():
            yield [column.numpy() for column in columns]

    data.uir_iter = batches
    # The paper's tower, whose last layer has as many units as the factors, or cornac refuses.
    hidden = [settings["factors"] * narrowing for narrowing in (8, 4, 2, 1)]
    model = import_package("cornac.models").NeuMF(
        num_factors=settings["factors"],
        layers=hidden,
        num_epochs=settings["epochs"],
        batch_size=settings["batch"],
        num_neg=fitted.NEGATIVES,
        lr=settings["rate"],
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

    width = 2 * (settings["factors"] + sum(hidden))
    return Fitted(
        fitted.count_parameters(net), score_items=fitted.over_all_items(logits, training.n_items, width)
    )


def autoencoder(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """Variational autoencoder of a user's interactions with a multinomial likelihood (Liang et al. 2018)."""
    model = import_package("cornac.models").VAECF(
        k=settings["size"],
        autoencoder_structure=[settings["hidden"]],
        act_fn="tanh",
        likelihood="mult",
        n_epochs=settings["epochs"],
        batch_size=100,
        learning_rate=settings["rate"],
        beta=settings["beta"],
        seed=seed,
    )
    model.fit(_cornac_data(training, seed))
    vae, seen = model.vae, interactions_of(training)

    @torch.no_grad()
    def score_items(users: Tensor) -> Tensor:
        # Without the softmax of its own decode, in which the small ones become equal.
        scores: Tensor = vae.decoder(vae.encode(fitted.rated_rows(seen, users))[0])
        return scores

    return Fitted(fitted.count_parameters(vae), score_items=score_items)


def _cornac_factors(settings: Settings) -> dict[str, Any]:
    """Settings under the names that cornac's factorisations share."""
    names = {"factors": "k", "rate": "learning_rate", "l2": "lambda_reg", "epochs": "max_iter"}
    return {theirs: settings[ours] for ours, theirs in names.items()}


def _cornac_data(training: Ratings, seed: int) -> Any:
    """cornac's data set under our indices: its own builders would number users and items anew."""
    columns = tuple(column.numpy() for column in (training.user, training.item, training.rating.double()))
    maps = [{index: index for index in range(n)} for n in shape_of(training)]
    return import_package("cornac.data").Dataset(*shape_of(training), *maps, columns, seed=seed)


# --- surprise -------------------------------------------------------------------------------------------


def svdpp(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """SVD++: biased factors, and the user's vector has a share of each item that the user rated."""
    model = import_package("surprise").SVDpp(
        n_factors=settings["factors"],
        n_epochs=settings["epochs"],
        lr_all=settings["rate"],
        reg_all=settings["l2"],
        # Its own: an item's share is decayed once for each rating of each user who rated it.
        reg_yj=settings["l2_shares"],
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

    n_users, n_items = shape_of(training)
    seen = interactions_of(training)
    share = seen.user_counts.clamp(min=1).double().rsqrt().unsqueeze(1)
    user_vectors = ours(model.pu, users, n_users)
    user_vectors += seen.sum_over_items(ours(model.yj, items, n_items)) * share
    biased = fitted.biased_product(
        training.rating.double().mean(),
        ours(model.bu, users, n_users),
        ours(model.bi, items, n_items),
        (user_vectors, ours(model.qi, items, n_items)),
    )
    return Fitted(biased.parameters + model.yj.size, predict=biased.predict)


def knn(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """The user's deviations from the biases on the most similar items; O(n_items^2) memory."""
    similarity = {
        "name": settings["similarity"],
        "user_based": False,
        "min_support": settings["least_common"],
        "shrinkage": settings["shrinkage"],  # of pearson_baseline alone
    }
    biases = {"method": "als", "reg_u": settings["l2_user"], "reg_i": settings["l2_item"]}
    model = import_package("surprise").KNNBaseline(
        k=settings["k"], sim_options=similarity, bsl_options=biases, verbose=False
    )
    model.fit(_surprise_data(training))

    def predict(users: Tensor, items: Tensor) -> Tensor:
        pairs = zip(users.tolist(), items.tolist(), strict=True)
        found = [model.predict(u, i, clip=False).est for u, i in pairs]
        return torch.tensor(found, dtype=torch.float32)

    n = len(model.bi)
    return Fitted(1 + len(model.bu) + n + n * (n - 1) // 2, predict=predict)


def _surprise_data(training: Ratings) -> Any:
    surprise, pandas = import_package("surprise"), import_package("pandas")
    columns = {"user": training.user, "item": training.item, "rating": training.rating.double()}
    frame = pandas.DataFrame({name: column.numpy() for name, column in columns.items()})
    reader = surprise.Reader(rating_scale=training.scale)
    return surprise.Dataset.load_from_df(frame, reader).build_full_trainset()


# --- implicit -------------------------------------------------------------------------------------------


def als(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """Factors of the 0/1 matrix by alternating least squares, a 1 weighing ``alpha`` times as much as a 0."""
    model = import_package("implicit.cpu.als").AlternatingLeastSquares(
        factors=settings["factors"],
        regularization=settings["l2"],
        alpha=settings["alpha"],
        iterations=settings["sweeps"],
        num_threads=1,
        random_state=seed,
    )
    model.fit(_sparse(training).astype(np.float32), show_progress=False)
    return product(torch.from_numpy(model.user_factors), torch.from_numpy(model.item_factors))


# --- myFM -----------------------------------------------------------------------------------------------


def bayesian_fm(
    training: Ratings, seed: int, settings: Settings, *, implicit: bool = False, side: bool = False
) -> Fitted:
    """Bayesian factorisation machine on user and item, the mean over Gibbs samples.

    With ``implicit`` who rated what is a further block of features of both (Rendle, Zhang and Koren 2019),
    with ``side`` what :func:`~lunet_fast.recsys.data.features.side_features` knows of them. Each block has
    priors of its own.
    """
    myfm, sparse = import_package("myfm"), import_package("scipy.sparse")
    shape = shape_of(training)
    blocks = [[sparse.identity(n, format="csr")] for n in shape]
    if implicit:
        seen = _sparse(training)
        for block, others in zip(blocks, (seen, seen.T.tocsr()), strict=True):
            block.append(_weighed(others, settings["history_power"]))
    if side:
        for block, known in zip(blocks, side_features(training), strict=True):
            if known is not None:
                block.append(sparse.csr_matrix(known.double().numpy()))
    groups = [part.shape[1] for block in blocks for part in block]
    sides = [sparse.hstack(block, format="csr") for block in blocks]

    def related(users: Tensor, items: Tensor) -> list[Any]:
        indices = (users.tolist(), items.tolist())
        return [myfm.RelationBlock(rows, known) for rows, known in zip(indices, sides, strict=True)]

    rank, samples = settings["rank"], settings["samples"]
    priors = {name: settings[name] for name in ("alpha_0", "beta_0", "gamma_0")}
    model = myfm.MyFMRegressor(rank=rank, random_seed=seed, **priors)
    model.fit(
        None,
        training.rating.double().numpy(),
        X_rel=related(training.user, training.item),
        n_iter=samples,
        n_kept_samples=max(1, round(samples * (1 - settings["burn_in"]))),
        group_shapes=groups,
    )

    def predict(users: Tensor, items: Tensor) -> Tensor:
        return torch.from_numpy(model.predict(None, related(users, items), n_workers=1)).float()

    return Fitted(1 + sum(groups) * (1 + rank), predict=predict)


def _weighed(seen: Any, power: float) -> Any:
    """Rows divided by their number of entries to a power."""
    counts = np.maximum(seen.getnnz(axis=1), 1)
    return seen.multiply(counts[:, None] ** -power).tocsr()


def _sparse(training: Ratings) -> Any:
    """The 0/1 matrix of interactions [n_users, n_items], SciPy's CSR in float64."""
    seen = interactions_of(training)
    columns = (np.ones(len(seen.indices)), seen.indices.numpy(), seen.indptr.numpy())
    return import_package("scipy.sparse").csr_matrix(columns, shape=shape_of(training))
