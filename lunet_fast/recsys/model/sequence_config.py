"""Every setting of recipe ``sequence``: the next item, from the order of those before."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lunet_fast.recsys.model.config import (
    RECIPES,
    Epochs,
    Several,
    TrainConfig,
    Width,
    nearest_dataset,
    recipe,
)
from lunet_fast.training.schema import Count, NotNegative, Positive, Seed, Settings, Threads, shown

SEQUENCE = "sequence"


class SequenceConfig(Settings):
    """Settings of one training of :class:`~lunet_fast.recsys.model.state_network.StateNetwork`.

    A value that cannot work raises ``ValueError`` naming the field, the value and what is allowed.
    """

    recipe: Literal["sequence"] = "sequence"
    """Tells these settings from those of the other recipes."""
    seed: Seed = 0
    """Seeds the split, the order of what ties in time, the weights, batches, negatives and dropout."""
    split: Literal["leave-one-out", "time", "none"] = "leave-one-out"
    """``leave-one-out``: each user's most recent rating is held out; ``time``: the latest 20 % of all, of
    which each user's first is to be found; ``none``: nothing is tested."""

    order: bool = True
    """Give the user's state the last items, the more recent the heavier, by learned exponential decays."""
    user_history: bool = True
    """Give it the normalised sum of a vector for each item that the user rated, whatever the order."""
    elapsed: bool = False
    """Tell it, coarsely, how long ago the user's last choice was when it is asked for the next: within an
    hour, a day, 30 days, or longer ago. In a test that is the time of the held-out rating."""
    identity: bool = True
    """Give each item a vector of its own beside what describes it."""
    side_features: bool = False
    """Add vectors of what is known of users and items, where anything is: genres, age, gender, occupation."""
    text: bool = False
    """Add a vector of each item's text to the item's own; items that nobody has chosen have it too."""
    social: bool = False
    """Give a user's state the choices of its friends."""
    confidence: NotNegative = 0.0
    """Weight of counts (plays, clicks), where the ratings have them: an entry of weight w counts 1 +
    confidence log(1 + w / the median weight) in the loss, after Hu, Koren and Volinsky."""
    length: Annotated[int, Field(ge=1, le=4096)] = 200
    """How many of the last items the order is read of."""
    decays: Annotated[int, Field(ge=1, le=64)] = 4
    """Exponential decays side by side."""
    history_power: NotNegative = 0.5
    """A history of n entries is divided by n to this power."""
    network: Literal["lu-net", "identity"] = "lu-net"
    """f, from the state to the vector that items are scored with: ``lu-net``, or ``identity`` beside it."""

    members: Several = 1
    """Networks trained side by side on the same batches; the score is the mean of theirs."""
    embedding_size: Width = 128
    """d, the size of a user's state and of an item's vector."""
    layers: Several = 2
    """M, the number of LU layers. The last one has no activation (2.7)."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Slope of LeakySoftplus (2.6) on the far left, 0 < alpha < 1."""
    embedding_std: NotNegative = 0.05
    """Standard deviation of the initial vectors."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of the entries' coordinates set to zero while training (the rest are scaled up)."""

    negatives: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Items that a step's softmax is taken over beside the next one, drawn uniformly and shared by the step;
    with as many or more as there are items it is over all."""
    epochs: Epochs = 16
    """Passes over the training ratings."""
    batch_size: Count = 4096
    """Ratings a step."""
    learning_rate: Positive = 3e-3
    """Adam's rate for everything but the network."""
    net_learning_rate: Positive = 2e-3
    """Adam's rate for the LU layers."""
    schedule: Literal["constant", "linear"] = "linear"
    """``constant``, or ``linear``: both rates fall to zero at the last step."""
    threads: Threads = 1
    """CPU threads; another number may change the last digits of the result."""

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if not (self.order or self.user_history):
            raise ValueError(
                "order=False and user_history=False leave nothing to know a user by: turn one of them on"
            )
        if self.length > self.batch_size:
            raise ValueError(f"length={self.length} must be at most batch_size={self.batch_size}")
        return self


# Bundled data set -> what is not the default there.
_SETTINGS: dict[str, dict[str, Any]] = {
    "ml-100k": {"embedding_size": 64, "batch_size": 2048, "learning_rate": 4e-3, "members": 2},
    "ml-1m": {},
}

_UNORDERED = {"epochs": 48}
"""Where order is not read, and each epoch draws another for what has no time, more epochs pay."""

STEPS, LEAST_BATCH = 40, 256
"""Smaller data take smaller batches, for this many steps an epoch: few steps teach nothing."""


def settings_of(name: str, n_ratings: int, /, **overrides: Any) -> TrainConfig | SequenceConfig:
    """The settings of any recipe for data of ``n_ratings`` ratings; ``ValueError`` for an unknown one."""
    if name == SEQUENCE:
        return sequence_recipe(n_ratings, **overrides)
    if name == "auto":
        # What can be said without the ratings; the settings are those of auto_config.
        return recipe("best", n_ratings, **overrides).replace(recipe=name)
    if not isinstance(name, str) or name not in RECIPES:
        known = ", ".join((*RECIPES, "auto", SEQUENCE))
        raise ValueError(f"recipe={shown(name)} is unknown: choose one of {known}")
    return recipe(name, n_ratings, **overrides)


def sequence_recipe(n_ratings: int, /, **overrides: Any) -> SequenceConfig:
    """The settings of recipe ``sequence`` for data of ``n_ratings`` ratings, with some overridden."""
    settings = {**_SETTINGS[nearest_dataset(n_ratings)]}
    if overrides.get("order") is False:
        settings |= _UNORDERED
    most = settings.get("batch_size", SequenceConfig().batch_size)
    settings["batch_size"] = min(most, max(n_ratings // STEPS, LEAST_BATCH))
    return SequenceConfig.from_dict({**settings, **overrides})
