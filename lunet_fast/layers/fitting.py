"""Training of a flow by maximum likelihood, for a notebook: one call, early stopping, the best weights kept.

``lunet_fast.density`` trains with the same optimiser and the same mean of the weights, and has checkpoints,
run folders and several processes besides.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast.layers.arguments import checked_number, checked_size

#: Rows in one pass of an evaluation.
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class FitRecord:
    """What a training was like: losses are mean −log p in nats a row, one a round."""

    train: list[float] = field(default_factory=list)
    """Mean over the steps of each round."""
    validation: list[float] = field(default_factory=list)
    """Of the mean of the weights, at the end of each round."""
    first: float = math.nan
    """The validation loss before the first step."""
    best_round: int = 0
    """Whose weights the flow has now, from 1; 0 for those before the first step."""
    steps: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> float:
        """The least validation loss, that of the flow as it is now."""
        return self.validation[self.best_round - 1] if self.best_round else self.first


def default_rate(features: int) -> float:
    """Adam's rate on ℝᴰ: 5e-3, and in more than 64 dimensions less by 64/D.

    A step of Adam's moves every entry of a [D, D] matrix by about the rate, and so A by up to D times it.
    """
    return 5e-3 * min(1.0, 64 / features)


def parameter_groups(flow: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """An optimiser's groups, with decay on what of the map is a matrix: LU factors, and splines, which it
    draws to the identity. Biases, slopes and the base want no zero."""
    base = getattr(flow, "base", None)
    spared = {id(p) for p in base.parameters()} if isinstance(base, nn.Module) else set()
    parameters = list(flow.parameters())
    decayed = [p for p in parameters if p.dim() > 1 and id(p) not in spared]
    of_matrices = {id(p) for p in decayed}
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in of_matrices], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def average_(averages: list[Tensor], weights: list[Tensor], factor: float, updates: int) -> None:
    """averages ← factor·averages + (1 − factor)·weights, after so many updates.

    Over the last tenth of the updates at most: the first weights shall not linger in a short training.
    """
    torch._foreach_lerp_(averages, weights, 1.0 - min(factor, updates / (updates + 10.0)))


def fit(
    flow: nn.Module,
    x: Tensor,
    context: Tensor | None = None,
    *,
    validation: float | Tensor = 0.1,
    steps: int = 4000,
    round_steps: int = 100,
    patience: int = 20,
    batch_size: int = 256,
    learning_rate: float | None = None,
    weight_decay: float = 0.5,
    clip: float = 5.0,
    average: float = 0.998,
    seed: int = 0,
    progress: bool = True,
) -> FitRecord:
    """``LUFlow.fit`` of any module with ``log_prob(x)`` or ``log_prob(x, context)``."""
    steps, round_steps = checked_size("steps", steps), checked_size("round_steps", round_steps)
    patience, batch_size = checked_size("patience", patience), checked_size("batch_size", batch_size)
    if learning_rate is not None and not checked_number("learning_rate", learning_rate) > 0.0:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate}")
    generator = torch.Generator(x.device).manual_seed(seed)
    training, held_out = _parts(x, context, validation, generator)
    batch_size = min(batch_size, len(training[0]))
    rate = default_rate(x.shape[-1]) if learning_rate is None else learning_rate
    optimizer = torch.optim.AdamW(parameter_groups(flow, weight_decay), lr=rate)
    mean = copy.deepcopy(flow).requires_grad_(False)
    averages: list[Tensor] = list(mean.parameters())
    weights: list[Tensor] = list(flow.parameters())
    batches = _batches(training, batch_size, generator)
    first = least = _loss(mean, held_out)
    best, best_round, updates = copy.deepcopy(mean.state_dict()), 0, 0
    train: list[float] = []
    losses: list[float] = []
    began = time.perf_counter()
    rounds, tell = _told(range(-(-steps // round_steps)), progress)
    for _ in rounds:
        total = x.new_zeros((), dtype=torch.float64)
        for _ in range(round_steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * max(0.0, 1.0 - updates / steps)
            loss = -flow.log_prob(*next(batches)).mean()  # type: ignore[operator]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, clip)
            optimizer.step()
            updates += 1
            average_(averages, weights, average, updates)
            total += loss.detach()
        train.append(float(total) / round_steps)
        losses.append(_loss(mean, held_out))
        if not math.isfinite(losses[-1]):
            raise ArithmeticError(
                f"the loss became {losses[-1]} after {updates} steps: use a lower learning_rate than {rate:g}"
            )
        if losses[-1] < least:
            least, best_round = losses[-1], len(losses)
            best = copy.deepcopy(mean.state_dict())
        tell(f"validation {losses[-1]:.4f}, best {least:.4f}")
        if len(losses) - best_round >= patience:
            break
    flow.load_state_dict(best)
    return FitRecord(train, losses, first, best_round, updates, time.perf_counter() - began)


Rows = tuple[Tensor, ...]


def _parts(
    x: Tensor, context: Tensor | None, validation: float | Tensor, generator: torch.Generator
) -> tuple[Rows, Rows]:
    """(training, validation) rows, each with its contexts if there are any."""
    if x.dim() != 2 or len(x) < 2 or not bool(x.isfinite().all()):
        raise ValueError(f"x must be at least 2 rows [N, D], all finite, got shape {tuple(x.shape)}")
    if context is not None and len(context) != len(x):
        raise ValueError(f"context must have one row for each of {len(x)} of x, got {len(context)}")
    columns = (x,) if context is None else (x, context)
    if isinstance(validation, Tensor):
        if context is not None:
            raise ValueError("validation must be a share of the rows where there are contexts")
        return columns, (validation,)
    if not 0.0 < validation < 1.0:
        raise ValueError(f"validation must be rows or a share between 0 and 1, got {validation}")
    order = torch.randperm(len(x), generator=generator, device=x.device)
    count = min(len(x) - 1, math.ceil(validation * len(x)))
    return tuple(c[order[count:]] for c in columns), tuple(c[order[:count]] for c in columns)


def _batches(columns: Rows, size: int, generator: torch.Generator) -> Iterator[Rows]:
    """Batches without end: pass after pass, each in a new order, without its last, smaller batch."""
    count = len(columns[0])
    while True:
        order = torch.randperm(count, generator=generator, device=columns[0].device)
        for start in range(0, count - size + 1, size):
            rows = order[start : start + size]
            yield tuple(column[rows] for column in columns)


def _loss(flow: nn.Module, columns: Rows) -> float:
    """Mean −log p in nats."""
    with torch.no_grad():
        parts = zip(*(column.split(ROWS_AT_ONCE) for column in columns), strict=True)
        return float(torch.cat([-flow.log_prob(*part).double() for part in parts]).mean())  # type: ignore[operator]


def _told(rounds: range, progress: bool) -> tuple[Iterable[int], Callable[[str], object]]:
    """The rounds with a progress bar of tqdm or rich, whichever is there, and who is told how it goes."""
    if progress:
        try:
            from tqdm.auto import tqdm

            bar = tqdm(rounds, unit="round")
            return bar, bar.set_postfix_str
        except ImportError:
            pass
        try:
            from rich.progress import track

            return track(rounds, description="rounds"), lambda _: None
        except ImportError:
            pass
    return rounds, lambda _: None
