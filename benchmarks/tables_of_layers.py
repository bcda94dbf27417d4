"""The tables of what layers, flows and training steps cost, from the suites of ``lunet-fast bench``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from committed import read_results
from lunet_fast.bench.claims import verdicts
from lunet_fast.bench.results import Result, seconds_text
from lunet_fast.bench.training import samples_per_second
from machine import RESULTS
from tables import Cell, least_bold, load, measured, number, table

SIZES = [(D, B) for B in (8192, 128, 1) for D in (16, 64, 256, 784, 1024)]
ORIGINAL = "original LU-Net's way"

TRAINING = {
    "nn.Linear + softplus": "nn.Linear",
    "two triangular products + softplus": "two triangular products",
    "W formed, torch.compile": "torch.compile",
    "nflows LULinear + softplus": "nflows",
    "normflows LULinearPermute + softplus": "normflows",
    "zuko LULinearTransform + softplus": "zuko",
    "dense + slogdet + softplus": "dense + slogdet",
    ORIGINAL: ORIGINAL,
}
INVERSE = {
    "torch.linalg.solve": "linalg.solve",
    "dense, torch.linalg.inv": "linalg.inv",
    "two triangular products": "two solve_triangular",
    "nflows LULinear": "nflows",
    "normflows LULinearPermute": "normflows",
    "zuko LULinearTransform": "zuko",
    ORIGINAL: ORIGINAL,
}
LOGABSDET = {
    "torch.linalg.slogdet": "linalg.slogdet",
    "nflows LULinear": "nflows",
    "normflows LULinearPermute": "normflows",
    "zuko LULinearTransform": "zuko",
    ORIGINAL: ORIGINAL,
}
"""Contenders: the name in the results, and the column's."""


@cache
def bench(suite: str) -> Result:
    read_results(RESULTS / f"{suite}-cpu.json")  # refuses what no commit holds
    return Result.load(RESULTS / f"{suite}-cpu.json")


def _where(suite: str, command: str) -> str:
    result = bench(suite)
    packages = ("triton", "nflows", "normflows", "zuko")
    versions = {name: result.versions[name] for name in packages if name in result.versions}
    rates = (
        f"Its rates: {result.rates.flops / 1e9:.0f} GFLOP/s in matrix products, "
        f"{result.rates.bytes / 1e9:.0f} GB/s in copies."
    )
    return f"{measured({'machine': result.machine}, command, versions=versions)} {rates}"


def _ratios(what: str, sizes: list[tuple[int, int]], names: dict[str, str]) -> list[str]:
    """A line a size: our time, its distance from the floor, and the others' times as multiples of ours."""
    rows: list[list[Cell | str]] = []
    for D, B in sizes:
        ours = bench("layers").row(what, D, B, "LUDense")
        if ours is None:
            raise SystemExit(f"the results have no {what}, D = {D}, B = {B}: run make bench-all")
        found = [bench("layers").row(what, D, B, name) for name in names]
        cells = [Cell(seconds_text(ours.median), 1.0)]
        cells += [number(None if row is None else row.ratio, ".3g") for row in found]
        first, *others = least_bold(cells)
        rows.append([str(D), f"{B:,}", first, f"{ours.median / ours.floor:.3g}", *others])
    return table(["D", "B", "LUDense", "times the floor", *names.values()], rows, {})


def layers_training() -> list[str]:
    found = _ratios("forward + backward", SIZES, TRAINING)
    return [*found, "", _where("layers", "lunet-fast bench layers --scale all")]


def layers_inverse() -> list[str]:
    return _ratios("inverse, linear part", SIZES, INVERSE)


def layers_logabsdet() -> list[str]:
    return _ratios("log-determinant", [(D, B) for D, B in SIZES if B == 1], LOGABSDET)


def layers_inverse_active() -> list[str]:
    return _ratios("inverse", SIZES, {"its own forward": "its own forward", ORIGINAL: ORIGINAL})


def cached() -> list[str]:
    """A line a size: our time forward and back with kept matrices, and the others' as multiples of it."""
    names = ["nn.Linear", "nflows LULinear, using_cache"]
    rows: list[list[Cell | str]] = []
    for spec, contest in bench("cached").groups().items():
        ours = next(row for row in contest if row.ours)
        ratios = {row.contender: row.ratio for row in contest}
        cells = [Cell(seconds_text(ours.median), 1.0), *(number(ratios.get(name), ".2f") for name in names)]
        rows.append([spec.what, str(spec.features), f"{spec.rows:,}", *least_bold(cells)])
    found = table(["", "D", "B", "LUDense", *names], rows, {})
    return [*found, "", _where("cached", "lunet-fast bench cached --scale all")]


def claims() -> list[str]:
    result = bench("claims")
    lines = [f"- {verdict}" for verdict in verdicts(result.rows, result.counts)]
    return [*lines, "", _where("claims", "lunet-fast bench claims --scale all")]


def stacks() -> list[str]:
    names = ["nflows LULinear, LeakyReLU", "zuko RealNVP", "zuko MAF", ORIGINAL]
    rows: list[list[Cell | str]] = []
    for spec, contest in bench("stacks").groups().items():
        ours = next(row for row in contest if row.ours)
        ratios = {row.contender: row.ratio for row in contest}
        cells = [Cell(seconds_text(ours.median), 1.0), *(number(ratios.get(name), ".3g") for name in names)]
        sizes = [str(spec.features), spec.detail.removeprefix("M = "), f"{spec.rows:,}"]
        rows.append([spec.what, *sizes, *least_bold(cells)])
    found = table(["", "D", "M", "B", "LUFlow", *names], rows, {})
    return [*found, "", _where("stacks", "lunet-fast bench stacks --scale all")]


def training() -> list[str]:
    names = ["nn.Linear MLP", "MLP control of table 2", "LU-Net, torch.compile"]
    rows: list[list[Cell | str]] = []
    for spec, contest in bench("training").groups().items():
        ours = next(row for row in contest if row.ours)
        ratios = {row.contender: row.ratio for row in contest}
        cells = [Cell(seconds_text(ours.median), 1.0), *(number(ratios.get(name), ".3g") for name in names)]
        first, *others = least_bold(cells)
        rate = f"{samples_per_second(ours):,.0f}"
        rows.append([spec.detail, str(spec.features), f"{spec.rows:,}", first, rate, *others])
    found = table(["step of", "D", "batch", "LU-Net", "samples a second", *names], rows, {})
    return [*found, "", _where("training", "lunet-fast bench training --scale all")]


def reversible() -> list[str]:
    result = load("reversible-cpu")
    rows = []
    for row in result["rows"]:
        kept = [f"{row[f'{way}_kept_bytes'] / 1e6:.1f}" for way in ("saved", "reversible")]
        peak = [f"{row[f'{way}_peak_bytes'] / 1e6:.0f}" for way in ("saved", "reversible")]
        rows.append([str(row["layers"]), str(row["alpha"]), *kept, *peak, f"{row['time_ratio']:.2f}"])
    ways = [f"{what}, {way}, MB" for what in ("kept", "peak") for way in ("saved", "reversible")]
    found = table(["layers", "α", *ways, "time of a step, reversible to saved"], rows, {})
    return [*found, "", measured(result, "python benchmarks/reversible.py")]


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "layers-training": layers_training,
    "layers-inverse": layers_inverse,
    "layers-logabsdet": layers_logabsdet,
    "layers-inverse-active": layers_inverse_active,
    "layers-cached": cached,
    "claims": claims,
    "stacks": stacks,
    "training": training,
    "reversible": reversible,
}
