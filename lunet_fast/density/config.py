"""The settings of a density training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lunet_fast.layers.lunet import PERMUTATIONS, SIGNS

SLOPES = ("fixed", "layer", "coordinate")


@dataclass(frozen=True)
class DensityConfig:
    """Settings of one training; the defaults were chosen on the validation part of digits.

    A value that cannot work raises ``ValueError`` naming the field, the value and what is allowed.
    """

    seed: int = 0
    """Seeds the split, the first weights, the order of the rows and the noise of dequantisation."""

    layers: int = 4
    """M, the number of LU layers; the last one is linear."""
    alpha: float = 0.7
    """Left slope of LeakySoftplus where it starts. Near 1, a deep net starts near a linear one."""
    slopes: str = "coordinate"
    """What α is learnt for: each ``coordinate`` of each layer, each ``layer``, or nothing: ``fixed``."""
    permutation: str | None = None
    """The order in which layers pass their coordinates on: ``random``, ``reverse``, or None for their own.
    On whitened layers it makes no difference to the likelihood of digits."""
    signs: str = "negative"
    """Of the diagonals of U: ``positive``, ``negative``, so that activations bend to alternate sides, or
    ``random``."""
    components: int = 30
    """K Gaussians in the base; with 1 it is the standard normal."""
    whiten: bool = True
    """Start each layer at the map that makes its output on the training rows white."""
    conditional: bool = False
    """Learn p(x | label) with the labels of the data; p(x) is then their mixture."""

    steps: int = 8000
    round_steps: int = 100
    """Steps between two looks at the validation part, each with a checkpoint."""
    patience: int = 20
    """Rounds without a better validation loss after which training ends."""
    batch_size: int = 256
    learning_rate: float | None = None
    """Adam's, falling linearly to 0 at the last step; None is :meth:`rate`'s for the number of features."""
    weight_decay: float = 0.2
    """Of the matrices (decoupled, as in AdamW), which it draws towards the identity."""
    clip: float = 5.0
    """Longest gradient; longer ones are shortened to it."""
    average: float = 0.998
    """The result is the exponential mean of the weights with this factor a step; 0 takes the last ones."""
    threads: int = 1
    """CPU threads; with a fixed number the result does not depend on how many cores there are."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("slopes", SLOPES),
            ("signs", SIGNS),
            ("permutation", (*PERMUTATIONS, None)),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(str, allowed))
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("layers", "components", "steps", "round_steps", "patience", "batch_size", "threads"):
            self._check(name, 1, math.inf, whole=True)
        self._check("seed", 0, 2**63 - 1, whole=True)
        self._check("clip", 0, math.inf, open_low=True)
        if self.learning_rate is not None:
            self._check("learning_rate", 0, math.inf, open_low=True)
        self._check("weight_decay", 0, math.inf)
        low, high = (0, 1) if self.slopes == "fixed" else (1e-3, 1 - 1e-3)
        self._check("alpha", low, high, open_low=True)
        self._check("average", 0, 1)
        for name in ("whiten", "conditional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def _check(
        self, name: str, low: float, high: float, *, whole: bool = False, open_low: bool = False
    ) -> None:
        value = getattr(self, name)
        kind = int if whole else (int, float)
        above = isinstance(value, kind) and (value > low if open_low else value >= low)
        # An upper end is open wherever it is finite, seeds aside.
        below = above and (value < high or (whole and value == high))
        if isinstance(value, bool) or not below:
            what = "a whole number" if whole else "a number"
            ends = f"above {low:g}" if open_low else f"at least {low:g}"
            upto = "" if high == math.inf else f" and below {high:g}"
            raise ValueError(f"{name} must be {what} {ends}{upto}, got {value!r}")

    def rate(self, features: int) -> float:
        """The learning rate on ℝᴰ: 5e-3, and in more than 64 dimensions less by 64/D.

        A step of Adam's moves every entry of a [D, D] matrix by about the rate, and so A by up to D times it.
        """
        return 5e-3 * min(1.0, 64 / features) if self.learning_rate is None else self.learning_rate

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DensityConfig:
        """Raises ``ValueError`` for a setting that there is not."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = next((name for name in values if name not in known), None)
        if unknown is not None:
            raise ValueError(f"unknown setting {unknown!r}; known are {', '.join(known)}")
        return cls(**values)
