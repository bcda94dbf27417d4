"""From where to where a search for settings looks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

NEAR_AN_END = 0.02
"""Share of a range, on its scale, within which a number lies at its end."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, whole ones if both are whole; drawn evenly, or evenly in the
    logarithm with ``log``."""

    low: float
    high: float
    log: bool = False

    def drawn(self, trial: optuna.Trial, name: str) -> Any:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return False
        return self.low <= value <= self.high

    def end(self, value: Any) -> str:
        """``low`` or ``high`` where ``value`` lies at that end, else "".

        At the lower end of a range from 0 nothing more can be asked for.
        """
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        share = (at - low) / (high - low)
        if share >= 1 - NEAR_AN_END:
            return "high"
        return "low" if share <= NEAR_AN_END and self.low > 0 else ""


@dataclass(frozen=True)
class Choice:
    """One of several values, which have no ends unless they are numbers in ascending order."""

    values: tuple[Any, ...]

    def drawn(self, trial: optuna.Trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)

    def holds(self, value: Any) -> bool:
        return any(value == each and type(value) is type(each) for each in self.values)

    def end(self, value: Any) -> str:
        if any(isinstance(each, str | bool) for each in self.values):
            return ""
        return {self.values[0]: "low", self.values[-1]: "high"}.get(value, "")
