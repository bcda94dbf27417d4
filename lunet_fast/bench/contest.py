"""A contest: ways to one end at one size, checked first and then timed in turn.

How it is timed. All contenders take turns in one process, in an order that moves on by one each round, so
that a slow spell of the machine meets all of them and none always follows the same neighbour. A turn repeats
a short call until it lasts some 20 milliseconds; the number of calls is fixed before the first round. What is
kept are medians with quartiles, of times and of the ratio to ours round by round, since a ratio of two times
taken together is steadier than either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lunet_fast.bench.machine import Rates, median_and_quartiles, peak_bytes, synchronize

Run = Callable[[], object]

#: A turn lasts about this long, or one call if that is longer: as in a training loop, most calls of a turn
#: then follow one of their own kind.
TURN_SECONDS = 20e-3

#: Rounds that are kept at least and at most.
ROUNDS = (3, 500)

OURS = "LUDense"


class CheckFailed(Exception):
    """A contender does not compute what the others compute; nothing of the run is kept."""


@dataclass(frozen=True)
class Spec:
    """What a contest is about. ``rows`` is the batch."""

    suite: str
    what: str
    features: int
    rows: int
    detail: str = ""
    """What else tells it from others: "M = 4"."""

    def __str__(self) -> str:
        return f"{self.what}, D = {self.features}, B = {self.rows}" + f", {self.detail}" * bool(self.detail)


@dataclass(frozen=True)
class Contest:
    """``runs`` by name; the ratio of each is to the one named ``ours``."""

    spec: Spec
    runs: Mapping[str, Run]
    errors: Mapping[str, float]
    """Relative error against float64 of what each run computes."""
    tolerance: float
    flops: float = 0.0
    """Of the matrix products that cannot be avoided."""
    bytes_moved: float = 0.0
    """Operands and results, each moved once."""
    ours: str = OURS
    missing: Mapping[str, str] = field(default_factory=dict)
    """Contenders that could not take part, and why."""
    parameters: Mapping[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """
        Raises:
            CheckFailed: a contender is off by more than the tolerance, or has not been checked.
        """
        for name in self.runs:
            error = self.errors.get(name)
            if error is None or not error <= self.tolerance:
                raise CheckFailed(
                    f"{self.spec}: {name} has relative error {error} where {self.tolerance:.0e} is allowed; "
                    "nothing is timed"
                )


@dataclass(frozen=True)
class Row:
    """One contender of one contest, as it is stored. Times are seconds a call."""

    suite: str
    what: str
    features: int
    rows: int
    detail: str
    contender: str
    ours: bool
    median: float
    quartiles: tuple[float, float]
    ratio: float
    """Its time over ours: above 1, ours is faster."""
    ratio_quartiles: tuple[float, float]
    rounds: int
    calls: int
    error: float
    floor: float
    """Seconds that the machine needs at least, by its rates; 0 if that was not stated."""
    peak_bytes: int | None
    parameters: int | None

    @property
    def spec(self) -> Spec:
        return Spec(self.suite, self.what, self.features, self.rows, self.detail)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Row:
        pairs = {name: tuple(entry[name]) for name in ("quartiles", "ratio_quartiles")}
        return cls(**(entry | pairs))


def time_in_turn(
    runs: Mapping[str, Run], seconds: float, device: torch.device
) -> dict[str, tuple[list[float], int]]:
    """Seconds a call of each, round by round, and the calls that a turn repeats, in about ``seconds``."""

    def turn(run: Run, calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, run in runs.items():
        turn(run, 1)  # the first call may compile, allocate or choose a kernel
        calls[name] = max(1, min(1000, int(TURN_SECONDS / turn(run, 1))))
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() > end:
            break
        shift = done % len(names)
        for name in (*names[shift:], *names[:shift]):
            times[name].append(turn(runs[name], calls[name]))
    return {name: (times[name], calls[name]) for name in names}


def compete(
    contest: Contest, seconds: float, rates: Rates, device: torch.device, *, memory: bool = True
) -> list[Row]:
    """Check and time a contest; a row for each contender.

    Args:
        seconds: for all rounds together; no fewer than three are made.
        memory: measure each contender's peak of allocated memory too, one more call.

    Raises:
        CheckFailed: as ``Contest.check``.
    """
    contest.check()
    timed = time_in_turn(contest.runs, seconds, device)
    our_times = timed[contest.ours][0]
    floor = rates.floor(contest.flops, contest.bytes_moved)
    spec = contest.spec
    rows = []
    for name, (times, calls) in timed.items():
        middle, *quartiles = median_and_quartiles(times)
        ratio, *spread = median_and_quartiles([a / b for a, b in zip(times, our_times, strict=True)])
        rows.append(
            Row(
                **asdict(spec),
                contender=name,
                ours=name == contest.ours,
                median=middle,
                quartiles=(quartiles[0], quartiles[1]),
                ratio=ratio,
                ratio_quartiles=(spread[0], spread[1]),
                rounds=len(times),
                calls=calls,
                error=contest.errors[name],
                floor=floor,
                peak_bytes=peak_bytes(contest.runs[name], device) if memory else None,
                parameters=contest.parameters.get(name),
            )
        )
    return rows
