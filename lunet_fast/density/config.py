"""The settings of a density training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lunet_fast.training.schema import Count, NotNegative, Positive, Seed, Settings, Threads


class DensityConfig(Settings):
    """Settings of one training; the defaults were chosen on the validation part of digits.

    A value that cannot work raises ``ValueError`` naming the field, the value and what is allowed.
    """

    seed: Seed = 0
    """Seeds the split, the first weights, the order of the rows and the noise of dequantisation."""

    layers: Annotated[int, Field(ge=1, le=1000)] = 4
    """M, the number of LU layers; the last one is linear."""
    activation: Literal["spline", "leaky_softplus"] = "spline"
    """Between the layers: a monotone ``spline`` of each coordinate, or ``leaky_softplus``, one bend of it."""
    bins: Annotated[int, Field(ge=2, le=1000)] = 8
    """Of each spline between the layers."""
    input_bins: Annotated[int, Field(ge=0, le=1000)] = 16
    """Of a spline before the first layer, over the range of the training rows; at least 2, or 0 for none."""
    tails: Literal["free", "identity"] = "free"
    """Slopes of splines outside of their bins: ``free`` go on with those of the ends, ``identity`` are 1."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Left slope of LeakySoftplus where it starts. Near 1, a deep net starts near a linear one."""
    slopes: Literal["fixed", "layer", "coordinate"] = "coordinate"
    """What α is learnt for: each ``coordinate`` of each layer, each ``layer``, or nothing: ``fixed``."""
    permutation: Literal["reverse", "random"] | None = None
    """The order in which layers pass their coordinates on: ``random``, ``reverse``, or none, their own.
    On whitened layers it makes no difference to the likelihood of digits."""
    signs: Literal["positive", "negative", "random"] = "negative"
    """Of the diagonals of U: ``positive``, ``negative``, so that activations bend to alternate sides, or
    ``random``."""
    components: Annotated[int, Field(ge=1, le=100_000)] = 30
    """K Gaussians in the base; with 1 it is the standard normal."""
    whiten: bool = True
    """Start each layer at the map that makes its output on the training rows white."""
    conditional: bool = False
    """Learn p(x | label) with the labels of the data; p(x) is then their mixture."""

    steps: Count = 8000
    """Steps at most; validation may end the training earlier."""
    round_steps: Count = 100
    """Steps between two looks at the validation part, each with a checkpoint."""
    patience: Count = 20
    """Rounds (100 steps each) without a better validation loss after which training ends."""
    batch_size: Count = 256
    """Rows a step."""
    learning_rate: Positive | None = None
    """Adam's, falling linearly to 0 at the last step. By default 5e-3, and in more than 64 dimensions
    0.32/D."""
    weight_decay: NotNegative = 0.5
    """Of matrices and splines (decoupled, as in AdamW), which it draws towards the identity."""
    clip: Positive = 5.0
    """Longest gradient; longer ones are shortened to it."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.998
    """The result is the exponential mean of the weights with this factor a step; 0 takes the last ones."""
    threads: Threads = 1
    """CPU threads; another number may change the last digits of the result."""

    @model_validator(mode="after")
    def _learnable(self) -> Self:
        if self.input_bins == 1:
            raise ValueError("input_bins=1 must be 0, for no spline before the first layer, or at least 2")
        if self.slopes != "fixed" and not 1e-3 < self.alpha < 1 - 1e-3:
            raise ValueError(
                f"alpha={self.alpha} must be a number above 0.001 and below 0.999 where it is learnt: move "
                "it, or choose slopes='fixed'"
            )
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """As of every :class:`Settings`; those written before there were splines have none."""
        if isinstance(values, dict) and "activation" not in values:
            values = {"activation": "leaky_softplus", "input_bins": 0, "weight_decay": 0.2, **values}
        return super().from_dict(values)

    def rate(self, features: int) -> float:
        """The learning rate on ℝᴰ."""
        if self.learning_rate is not None:
            return self.learning_rate
        from lunet_fast.layers.fitting import default_rate  # here, so that settings do not wait for PyTorch

        return default_rate(features)
