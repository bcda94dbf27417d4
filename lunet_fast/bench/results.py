"""How a run of a suite is kept, read again and shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from lunet_fast.bench import cached, claims, layers, stacks, training
from lunet_fast.bench.claims import Counts
from lunet_fast.bench.contenders import quietly
from lunet_fast.bench.contest import Contest, Row, Spec, compete
from lunet_fast.bench.machine import Rates, measure_rates, versions
from lunet_fast.training.files import write_json
from lunet_fast.training.machine import describe


class Suite(Protocol):
    """What a module of contests has."""

    SUITE: str

    def specs(self, scale: str) -> list[Spec]:
        """What is compared in scale "quick" or "all"."""

    def contests(
        self, specs: Sequence[Spec], scale: str, device: torch.device, dtype: torch.dtype
    ) -> Iterator[Contest]:
        """The contests of ``specs``."""


#: The suites by name.
SUITES: dict[str, Suite] = {
    module.SUITE: cast(Suite, module) for module in (layers, cached, claims, stacks, training)
}

SCALES = ("quick", "all")

#: Seconds for all rounds of one contest.
SECONDS = {"quick": 3.0, "all": 4.0}


@dataclass(frozen=True)
class Result:
    """One run of one suite."""

    suite: str
    scale: str
    dtype: str
    machine: dict[str, Any]
    versions: dict[str, str]
    rates: Rates
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)
    """Why a contender did not take part, by contest."""
    counts: list[Counts] = field(default_factory=list)

    def save(self, path: Path) -> Path:
        """Write it as JSON, whole or not at all; the folder is made."""
        content = {name: getattr(self, name) for name in ("suite", "scale", "dtype", "machine", "versions")}
        content |= {"rates": self.rates._asdict(), "missing": self.missing}
        content["rows"] = [row.as_json() for row in self.rows]
        if self.counts:
            content["counts"] = [asdict(each) for each in self.counts]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """
        Raises:
            ValueError: the file is not one that ``save`` wrote.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["rates"] = Rates(**content["rates"])
            content["rows"] = [Row.from_json(entry) for entry in content["rows"]]
            content["counts"] = [Counts(**entry) for entry in content.get("counts", [])]
            return cls(**content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of `lunet-fast bench`: {error}") from None

    def groups(self) -> dict[Spec, list[Row]]:
        """Rows by contest, in the order in which they were run."""
        found: dict[Spec, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.spec, []).append(row)
        return found

    def row(self, what: str, features: int, rows: int, contender: str, detail: str = "") -> Row | None:
        """One contender of one contest, None if it is not there."""
        spec = Spec(self.suite, what, features, rows, detail)
        return next((row for row in self.rows if row.spec == spec and row.contender == contender), None)

    def where(self) -> str:
        """The machine and versions in a line."""
        machine = self.machine
        peers = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        place = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
        return (
            f"{place}, {self.rates.flops / 1e9:.0f} GFLOP/s in matrix products and "
            f"{self.rates.bytes / 1e9:.0f} GB/s in copies, {self.dtype}, torch {machine['torch']}, {peers}, "
            f"{machine['date']}, commit {machine['commit'] or 'unknown'}"
        )


def run_suite(
    suite: str,
    scale: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float | None = None,
    told: Callable[[Spec, list[Row]], None] = lambda spec, rows: None,
) -> Result:
    """Run every contest of a suite.

    Args:
        suite: one of ``SUITES``.
        scale: "quick" or "all".
        seconds: for one contest; by default ``SECONDS`` of the scale.
        told: called after each contest.

    Raises:
        CheckFailed: a contender does not compute what it should; nothing is returned.
    """
    specs = SUITES[suite].specs(scale)
    rates = measure_rates(device, dtype)
    result = Result(suite, scale, str(dtype).removeprefix("torch."), describe(device), versions(), rates)
    with quietly():
        for contest in SUITES[suite].contests(specs, scale, device, dtype):
            rows = compete(contest, SECONDS[scale] if seconds is None else seconds, rates, device)
            result.rows.extend(rows)
            if contest.missing:
                result.missing[str(contest.spec)] = dict(contest.missing)
            told(contest.spec, rows)
    if suite == claims.SUITE:
        sizes = sorted({row.features for row in result.rows})
        result.counts.extend(claims.count_operations(sizes))
    return result


# --- shown ----------------------------------------------------------------------------------------------


def seconds_text(seconds: float) -> str:
    """1.23 ms, 45.6 µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def bytes_text(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e6:.3g} MB" if size >= 1e5 else f"{size / 1e3:.3g} kB"


def ratio_text(row: Row) -> str:
    """ "1.71 (1.69 to 1.75)"; ours is "1"."""
    if row.ours:
        return "1"
    low, high = row.ratio_quartiles
    return f"{row.ratio:.3g} ({low:.3g} to {high:.3g})"


HEADER = ("contender", "time", "times ours", "times the floor", "peak memory", "error")


def cells(row: Row, baseline: Result | None = None) -> list[str]:
    """A row of a contest's table, under ``HEADER``; with a baseline its ratio too."""
    floor = f"{row.median / row.floor:.3g}" if row.floor else ""
    found = [
        row.contender,
        seconds_text(row.median),
        ratio_text(row),
        floor,
        bytes_text(row.peak_bytes),
        f"{row.error:.0e}",
    ]
    if baseline is not None:
        before = baseline.row(row.what, row.features, row.rows, row.contender, row.detail)
        found.append("" if before is None or row.ours else f"{before.ratio:.3g}")
    return found


def markdown(result: Result) -> str:
    """The whole run: a table for each contest, and the verdicts of ``claims``."""
    lines = [
        f"# Suite {result.suite}, {result.dtype}",
        "",
        result.where() + ".",
        "",
        "Medians; in brackets the quartiles of the ratio, taken round by round. "
        "The floor is what the matrix products and the memory traffic that cannot be avoided would take at "
        "the machine's rates above. Errors are relative, against float64.",
    ]
    if result.counts:
        lines += ["", *(f"- {verdict}" for verdict in claims.verdicts(result.rows, result.counts))]
        lines += ["", *counts_table(result.counts)]
    for spec, rows in result.groups().items():
        lines += ["", f"## {spec}", "", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
        lines += [
            f"\n{name}: {reason}." for name, reason in sorted(result.missing.get(str(spec), {}).items())
        ]
    return "\n".join([*lines, ""])


def counts_table(counts: Sequence[Counts]) -> list[str]:
    """Operations a sample over D."""
    lines = [
        "| D | inverse, needed | executed | once a batch | log-determinant |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {c.features} | {c.inverse_needed} | {c.inverse_executed:.0f} | {c.inverse_setup} "
        f"| {c.logabsdet_needed} |"
        for c in counts
    ]


def file_name(suite: str, device: torch.device, dtype: str) -> str:
    """layers-cpu.json, layers-cuda-bfloat16.json."""
    return f"{suite}-{device.type}{'' if dtype == 'float32' else '-' + dtype}.json"
