"""Every setting of a training, declared once, and the two recipes."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lunet_fast.training.schema import Count, NotNegative, Positive, Seed, Settings, Threads

Recipe = Literal["paper", "best", "auto"]
TransformName = Literal["none", "standard", "log", "rank"]
RECIPES = ("paper", "best")
"""Those whose settings the number of ratings tells; for ``auto`` see :mod:`~lunet_fast.recsys.model.auto`."""

Width = Annotated[int, Field(ge=1, le=1 << 14)]
"""Of a vector: a matrix of the network has 4 times its square, and 4 GiB at the bound."""
Several = Annotated[int, Field(ge=1, le=1000)]
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]


_SAMPLED: dict[str, Any] = {
    "network": "identity",
    "readout": "pair",
    "biases": True,
    "loss": "mse",
    "gamma": 1.0,
    "dropout": 0.0,
    "offset": "mean",
    "strength": 1.0,
    "patience": None,
}
"""What inference ``gibbs`` can sample."""


class TrainConfig(Settings):
    """Settings of one training: the model, its regularisation, the optimiser, the seed and the split.

    The defaults are recipe ``best`` for data of ML-100K's size; :func:`recipe` gives either recipe for any
    size. A value that cannot work raises ``ValueError`` naming the field, the value and what is allowed.
    """

    recipe: Recipe = "best"
    """Name of the recipe that the settings started from; a label that changes nothing."""
    seed: Seed = 0
    """Seeds the split, the initial weights, the order of the batches and dropout."""
    split: Literal["random", "per-user", "leave-one-out", "joint", "time", "files", "stream", "none"] = (
        "random"
    )
    """What is held out for the test. ``random``: 20 % of all ratings; ``per-user``: 20 % of each user's.
    ``leave-one-out``: each user's most recent one, for ranking; ``joint``: that, and 20 % of the rest.
    ``time``: the latest 20 % of all, of which each user's first is for ranking.
    ``files``: both parts are given; ``stream``: 20 % by a rule on the ids; ``none``: nothing is tested."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """γ of (2.11), the weight of the ratings' loss; the interactions' has 1 - γ. 1 trains ratings alone, 0
    interactions alone, which need no ratings. Below 1 the model learns to rank as well."""
    loss: Literal["mse", "huber", "ordinal", "bpr"] = "mse"
    """``mse``: squared error (2.12) and cross-entropy (2.13). ``huber``: Huber's loss with delta 1 instead of
    the square. ``ordinal``: ratings by the proportional-odds model, bounded to the scale. ``bpr``:
    interactions by Bayesian personalised ranking instead of cross-entropy."""
    negatives: Annotated[int, Field(ge=1, le=100_000)] = 4
    """Items without interaction drawn for each training rating."""
    negative_sampling: Literal["uniform", "popularity"] = "uniform"
    """How they are drawn: ``uniform``, or ``popularity``: with probability proportional to count^0.75."""
    negatives_outside: Literal["known", "training"] = "training"
    """Which of a user's pairs are never drawn: those of ``training`` alone, as if nothing else were known, or
    ``known``, of any part of the data. The second tells the model what is held out, by what is never a
    negative, and its ranking then looks better than it is."""
    positive_from: float | None = None
    """Ratings below are no choices, and the interactions are learnt and measured of the others alone; by
    default every rating is one. Histories and what ``recommend`` leaves out have all of them."""
    below: Literal["dislike", "ignore"] = "dislike"
    """What a rating below ``positive_from`` tells the interactions: ``dislike``, that the user does not want
    the item, as a drawn pair without interaction does; ``ignore``, nothing."""
    confidence: NotNegative = 0.0
    """Weight of counts (plays, clicks), where the ratings have them: an entry of weight w counts 1 +
    confidence log(1 + w / the median weight) in the interactions' loss, after Hu, Koren and Volinsky."""
    interaction_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of each half of z whose product is the interactions'; the rest is the ratings'. Without effect
    where gamma is 0 or 1."""

    transform: TransformName = "none"
    """What is learnt of a rating: ``none``, itself; ``standard``, in units of its spread, so that no result
    depends on the unit; ``log`` or ``rank`` of it, for counts, whose few large values drown all others.
    Errors are of the ratings themselves."""
    offset: Literal["mean", "biases"] = "mean"
    """What the network's rating is added to: the mean, or with ``biases`` to shrunk biases of user and item
    too, in closed form."""
    offset_l2_user: NotNegative = 5.0
    """L2 of the users' biases of ``offset``: those of n ratings are shrunk by n / (n + l2)."""
    offset_l2_item: NotNegative = 5.0
    """The same of the items'."""
    strength: NotNegative = 1.0
    """What the network's rating is multiplied by once it is trained: 0 leaves the offset alone."""

    inference: Literal["gradient", "gibbs"] = "gradient"
    """How the model is found: ``gradient``, by Adam; ``gibbs``: with f the identity, each member is a sample
    of the posterior (:mod:`~lunet_fast.recsys.model.gibbs`), with priors in place of all penalties,
    ``epochs`` sweeps and no batches or rates."""
    noise: NotNegative = 0.0
    """Of inference ``gibbs``: the variance of what is learnt of a rating about its expectation; with 0 it is
    sampled too."""

    members: Several = 16
    """Independent models trained side by side, or samples; the prediction is the mean of theirs."""
    embedding_size: Width = 16
    """k, the size of a user's and of an item's vector. The network works in D = 2k dimensions."""
    layers: Several = 2
    """M, the number of LU layers. The last one has no activation (2.7)."""
    network: Literal["lu-net", "identity"] = "lu-net"
    """f, from x to z: ``lu-net``, or ``identity`` beside it, which is one linear layer held at A = I."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Slope of LeakySoftplus (2.6) on the far left, 0 < alpha < 1."""
    readout: Literal["linear", "pair"] = "pair"
    """``linear``: w.z; ``pair``: w.z + z_u.z_i, with z_u and z_i the two halves of z."""
    biases: bool = True
    """Add a bias for each user and each item to the read-out."""
    user_history: bool = True
    """Add to the user's vector the normalised sum of a vector for each item that the user rated (SVD++)."""
    item_history: bool = True
    """Add to the item's vector the normalised sum of a vector for each user who rated it."""
    side_features: bool = True
    """Add to each half a vector for what is known of the user (age, gender, occupation) and of the item
    (genres), where the data set says it."""
    history_power: NotNegative = 0.4
    """A history of n entries is divided by n to this power: 1 is the mean, 0.5 SVD++'s."""
    embedding_std: NotNegative = 0.1
    """Standard deviation of the initial embeddings."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of x's coordinates set to zero while training (the rest are scaled up)."""
    l2_latent: NotNegative = 0.04
    """Weight of |z|^2, the mean over the batch, in the loss."""
    l2_embedding: NotNegative = 0.0
    """Weight of |x|^2 in the loss."""
    l2_bias: NotNegative = 0.005
    """Weight of the squared biases in the loss."""
    l2_interaction_latent: NotNegative = 0.0
    """As ``l2_latent``, for the interactions' part of z, in their loss."""
    l2_interaction_embedding: NotNegative = 0.0
    """As ``l2_embedding``, for the interactions' part of x."""
    weight_decay: NotNegative = 0.0
    """Adam's own L2 on the embedding tables (each whole table, at each step)."""
    net_weight_decay: NotNegative = 0.0
    """The same on the LU layers, which it draws towards the identity."""

    epochs: Epochs = 12
    """Passes over the training ratings; the option of the command is that of the MLP control too."""
    patience: Annotated[int | None, Field(ge=1)] = None
    """With recipe ``auto``, look for the number of epochs, ``epochs`` at most: a first training, without a
    validation part of the training ratings, ends once the error there has not fallen for so many epochs, and
    the model is trained for as many as had the least."""
    batch_size: Count = 1024
    """Ratings a step."""
    learning_rate: Positive = 5e-3
    """Adam's rate for everything but the network."""
    net_learning_rate: Positive = 3e-4
    """Adam's rate for the LU layers."""
    schedule: Literal["constant", "linear"] = "linear"
    """``constant``, or ``linear``: both rates fall to zero at the last step."""

    threads: Threads = 1
    """CPU threads. The matrices are too small for more to pay, and another number may change the last digits
    of the result."""

    mlp: bool = True
    """Train the MLP control of table 2 too, where gamma is 1. It has the budget of recipe ``paper``."""
    mlp_embedding_size: Width = 16
    """Size of the control's vectors."""
    mlp_hidden: Annotated[tuple[Width, ...], Field(strict=False, min_length=1)] = (64, 32)
    """Sizes of the hidden layers; the last one is the latent layer whose decoder is measured."""
    mlp_epochs: Epochs = 50
    """Epochs of the control, and of its decoder after it."""
    mlp_batch_size: Count = 128
    """Ratings a step of the control."""
    mlp_learning_rate: Positive = 1e-3
    """Constant, Adam."""
    mlp_weight_decay: NotNegative = 1e-2
    """Adam's L2 on the control's embeddings."""
    mlp_net_weight_decay: NotNegative = 1e-3
    """Adam's L2 on its layers."""

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.patience is not None and self.gamma == 0:
            raise ValueError(
                f"patience={self.patience} looks at the error of ratings, which gamma=0.0 leaves out: raise "
                "gamma, or leave patience away and give epochs"
            )
        if self.loss == "bpr" and self.gamma == 1:
            raise ValueError("loss='bpr' is a loss of interactions, which gamma=1.0 leaves out: lower gamma")
        for name, unset in (("positive_from", None), ("confidence", 0)):
            if self.gamma == 1 and getattr(self, name) != unset:
                raise ValueError(
                    f"{name}={getattr(self, name):g} is for interactions, which gamma=1.0 leaves out: lower "
                    "gamma"
                )
        if self.loss == "bpr" and self.positive_from is not None and self.below == "dislike":
            raise ValueError(
                "loss='bpr' compares a choice with pairs without one, and below='dislike' has no choice to "
                "compare: choose below='ignore', or loss='mse'"
            )
        if self.loss in ("huber", "ordinal") and self.gamma == 0:
            raise ValueError(
                f"loss={self.loss!r} is a loss of ratings, which gamma=0.0 leaves out: raise gamma"
            )
        if self.loss == "ordinal" and (self.transform, self.offset, self.strength) != ("none", "mean", 1):
            raise ValueError(
                "loss='ordinal' has levels and thresholds of its own: leave transform, offset and strength "
                "away"
            )
        if self.embedding_size < 2 and 0 < self.gamma < 1:
            raise ValueError(
                f"embedding_size={self.embedding_size} cannot be shared by ratings and interactions: "
                "give at least 2, or gamma=0 or 1"
            )
        return self

    @model_validator(mode="after")
    def _can_be_sampled(self) -> Self:
        if self.inference != "gibbs":
            if self.noise:
                raise ValueError(
                    f"noise={self.noise:g} is of inference='gibbs': choose it, or leave noise away"
                )
            return self
        for name, value in _SAMPLED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    "inference='gibbs' needs ratings linear in each vector, with squared errors, and "
                    f"{name} is {getattr(self, name)!r}: choose {name}={value!r}, or inference='gradient'"
                )
        if self.epochs < self.members:
            raise ValueError(
                f"epochs={self.epochs} sweeps of inference='gibbs' give no {self.members} members: raise "
                "epochs, or lower members"
            )
        return self

    @property
    def needs_ratings(self) -> bool:
        """Whether the values of the ratings are looked at."""
        return self.gamma > 0 or self.positive_from is not None

    @property
    def depth(self) -> int:
        """How many layers f has."""
        return 1 if self.network == "identity" else self.layers

    @property
    def interaction_size(self) -> int:
        """How many of the k coordinates of each half are the interactions': the last ones."""
        if self.gamma in (0, 1):
            return 0 if self.gamma == 1 else self.embedding_size
        return min(max(round(self.embedding_size * self.interaction_share), 1), self.embedding_size - 1)


_GIBBS: dict[str, Any] = {
    "network": "identity",
    "transform": "standard",
    "members": 96,
    "embedding_size": 24,
    "epochs": 800,
    # Where it is sampled it goes on falling, and the longer the chain the worse it predicts.
    "noise": 0.7,
}

# The paper prints Adam, 1e-3, batch 128, 50 epochs and the final linear layer; the rest is ours to choose and
# was chosen on a validation part of the training data.
_PAPER: dict[str, Any] = {
    "readout": "linear",
    "biases": False,
    "user_history": False,
    "item_history": False,
    "side_features": False,
    "members": 1,
    "embedding_size": 16,
    "layers": 2,
    "dropout": 0.1,
    "l2_latent": 0.0,
    "l2_embedding": 0.0,
    "l2_bias": 0.0,
    "weight_decay": 3e-4,
    # Without it the network grows while the embeddings shrink, and a round trip loses its digits.
    "net_weight_decay": 1e-4,
    "epochs": 50,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "net_learning_rate": 1e-3,
    "schedule": "constant",
}

# A user's row is in fewer of ML-1M's batches, while weight decay acts at every step: it must be weaker there.
_MLP_1M = {"mlp_weight_decay": 3e-4, "mlp_net_weight_decay": 3e-5}

# Bundled data set -> number of ratings, and what each recipe sets there: for ratings, and on top of that
# "hybrid" for 0 < gamma < 1 and "ranking" for gamma 0 (of recipe best), "gibbs" and "ordinal" where they are
# asked for.
_SETTINGS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "ml-100k": (
        100_000,
        {
            "paper": _PAPER,
            "best": {},
            "gibbs": _GIBBS,
            # Its loss is about half of the squared error, and so must its penalty be.
            "ordinal": {"l2_latent": 0.015},
            "hybrid": {
                "members": 4,
                "embedding_size": 48,
                "interaction_share": 2 / 3,
                "l2_interaction_embedding": 1e-3,
            },
            "ranking": {
                "members": 4,
                "embedding_size": 64,
                "epochs": 8,
                "l2_interaction_embedding": 1e-3,
            },
        },
    ),
    "ml-1m": (
        1_000_209,
        {
            "paper": {**_PAPER, **_MLP_1M, "weight_decay": 5e-5},
            "best": {
                **_MLP_1M,
                "members": 4,
                "embedding_size": 48,
                "history_power": 0.5,
                "l2_latent": 0.025,
                "l2_embedding": 0.003,
                "epochs": 6,
                "batch_size": 4096,
            },
            "gibbs": {**_GIBBS, "members": 60, "embedding_size": 32, "epochs": 300, "noise": 0.65},
            "ordinal": {"l2_latent": 0.01},
            "hybrid": {
                "members": 2,
                "embedding_size": 64,
                "l2_interaction_embedding": 3e-4,
            },
            "ranking": {
                "members": 1,
                "l2_interaction_embedding": 3e-4,
            },
        },
    ),
}


def nearest_dataset(n_ratings: int) -> str:
    """The bundled data set (``ml-100k`` or ``ml-1m``) whose number of ratings is nearest in ratio."""
    size = math.log(max(n_ratings, 1))
    return min(_SETTINGS, key=lambda name: abs(math.log(_SETTINGS[name][0]) - size))


def recipe(name: str, n_ratings: int, /, **overrides: Any) -> TrainConfig:
    """The settings of recipe ``paper`` or ``best`` for data of ``n_ratings`` ratings, with some overridden.

    Data other than the bundled sets takes the settings of the bundled set nearest in size. With ``gamma``
    below 1 among the overrides the split is ``joint``, with 0 ``leave-one-out``, and recipe ``best`` has the
    sizes and penalties that were found for it.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is unknown: choose one of {', '.join(RECIPES)}")
    recipes = _SETTINGS[nearest_dataset(n_ratings)][1]
    settings = {**recipes[name], "recipe": name}
    gamma = overrides.get("gamma", 1.0)
    if gamma in (0, 1) or not isinstance(gamma, (int, float)):
        kind, split = ("ranking", "leave-one-out") if gamma == 0 else (None, "random")
    else:
        kind, split = "hybrid", "joint"
    if kind is not None and name == "best":
        settings |= recipes[kind]
    if overrides.get("loss") == "ordinal" and name == "best":
        settings |= recipes["ordinal"]
    if overrides.get("inference") == "gibbs":
        settings |= recipes["gibbs"]
    return TrainConfig.from_dict({**settings, "split": split, **overrides})
