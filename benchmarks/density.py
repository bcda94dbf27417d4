"""LU-Net as a density, beside the flows people use, in one harness: digits, 2-D toy densities, its parts.

    python benchmarks/density.py digits      quality: losses over seeds, outliers        (2 hours of 1 core)
    python benchmarks/density.py plane       divergence from known densities             (1 hour)
    python benchmarks/density.py ablation    splines: where, how many bins, tails; depth  (1 hour)
    python benchmarks/density.py speed       a training step and a sample, interleaved   (2 minutes, quiet)
    python benchmarks/density.py pictures    what flows of size M learnt, as pictures       (5 minutes)
    python benchmarks/density.py report      density.md and density.png from the four files

Every flow gets the same rows, noise, optimiser, averaging and stopping (lunet_fast/density/training.py),
and is tuned by the same rule on the validation part of seed 0 (density_flows.LADDERS); then it is trained
with the five seeds of SEEDS, whose parts nothing was chosen on. A row that was measured is kept in
benchmarks/results/density-*.json and not measured again by the same code and constants.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from density_flows import (
    ABLATED,
    ABLATION,
    DIGITS,
    DIGITS_FLOWS,
    GAUSSIAN,
    LADDERS,
    PLANE,
    PLANE_FLOWS,
    PLANE_LADDERS,
    Ladders,
    Make,
    lunet,
)
from density_report import report, rows_of
from lunet_fast import ConditionalLUNet, LUNet
from lunet_fast.density import data
from lunet_fast.density.config import DensityConfig
from lunet_fast.density.evaluation import TEST_DRAWS, accuracy, auroc, divergence, grid, integral
from lunet_fast.density.model import DensityModel
from lunet_fast.density.pictures import SIDE, interpolation, show_density, show_sheet, show_slopes
from lunet_fast.density.preprocessing import Preprocessing
from lunet_fast.density.training import fit_flow
from lunet_fast.training.figures import new_figure
from lunet_fast.training.files import write_figure
from lunet_fast.training.seeding import seeded
from machine import Results, kept_bytes, open_results, parser

#: Of what is reported; what is chosen is chosen with seed 0, parts are judged with these of tuning.
SEEDS = (5, 6, 7, 8, 9)
TUNING_SEEDS = (0, 1, 2)
TUNING_STEPS = 1500

#: Seeds with which outliers are looked for, too: a second training each.
AUROC_SEEDS = SEEDS[:2]


def _model(make: Make, parts: data.Parts, config: DensityConfig) -> DensityModel:
    """The untrained model: first weights by the seed, preprocessing by the training part."""
    training = parts.training
    preprocessing = Preprocessing.of(training.values, training.levels)
    rows = preprocessing.forward(training.values, torch.Generator().manual_seed(config.seed))[0]
    with seeded(config.seed):
        flow = make(rows, config, training.classes)
    shares = None
    if training.labels is not None and isinstance(getattr(flow, "net", None), ConditionalLUNet):
        counts = torch.bincount(training.labels)
        shares = counts / counts.sum()
    return DensityModel(flow, preprocessing, training.features, shares)


def _train(make: Make, parts: data.Parts, config: DensityConfig) -> tuple[DensityModel, dict[str, Any]]:
    model = _model(make, parts, config)
    trained, curve, chosen = fit_flow(model, parts, config)
    return trained, {
        "validation": curve.test[chosen - 1] if chosen else None,
        "curve": [round(loss, 4) for loss in curve.test],
        "rounds": len(curve.train),
        "chosen": chosen,
        "parameters": sum(p.numel() for p in model.flow.parameters()),
        "seconds": round(curve.seconds, 2),
    }


def _tune(make: Make, parts: data.Parts, config: DensityConfig, ladders: Ladders) -> dict[str, Any]:
    """The settings that the validation part likes best, found rung by rung."""
    tried: list[dict[str, Any]] = []
    chosen = {name: getattr(config, name) for name in ladders}
    full = chosen.get("steps", config.steps)

    def loss(settings: dict[str, Any], short: bool) -> float:
        own = config.replace(**{**settings, "steps": min(TUNING_STEPS, full)} if short else settings)
        try:
            validation = _train(make, parts, own)[1]["validation"]
        except ArithmeticError:
            validation = None
        tried.append({**settings, "steps": own.steps, "validation": validation})
        return math.inf if validation is None else validation

    best = loss(chosen, short=True)
    for name, ladder in ladders.items():
        short = name != "steps"
        if not short:
            best = loss(chosen, short)
        start = ladder.index(chosen[name])
        for rungs in (ladder[start + 1 :], ladder[:start][::-1]):
            for rung in rungs:
                found = loss({**chosen, name: rung}, short)
                if found >= best:
                    break
                best, chosen = found, {**chosen, name: rung}
            if chosen[name] != ladder[start]:
                break
    return {"chosen": chosen, "tried": tried}


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


class Kept:
    """Rows of a results file, written after each; what this code measured is not measured again.

    ``keys`` tell one row from another.
    """

    def __init__(self, name: str, results: Results, *keys: str) -> None:
        self.name, self.results, self.keys = name, results, keys
        self.rows = rows_of(name.removeprefix("density-"), results.folder)

    def has(self, **keys: Any) -> bool:
        wanted = {**keys, "code": self.results.code}
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Each row names its own commit and code: the others may be older. It takes the place of its like."""
        new = {**row, "commit": self.results.machine["commit"], "code": self.results.code}
        like = [n for n, old in enumerate(self.rows) if all(old.get(key) == row[key] for key in self.keys)]
        if like:
            self.rows[like[0]] = new
        else:
            self.rows.append(new)
        self.results.write(self.name, {"rows": self.rows})
        shown = {k: v for k, v in row.items() if not isinstance(v, list | dict)}
        print(
            " ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()),
            flush=True,
        )


def digits(seeds: int, results: Results, only: list[str] | None) -> None:
    """Bits a dimension over the seeds; AUROC of 0–4 against 5–9 by a flow that saw only 0–4."""
    kept = Kept("density-digits", results, "family", "size")
    rows = data.read("digits")
    assert rows.labels is not None
    for family, flows in DIGITS_FLOWS.items():
        for size, make in flows.items():
            if kept.has(family=family, size=size) or (only and f"{family}, {size}" not in only):
                continue
            tuned = _tune(make, data.split(rows, 0), DIGITS, LADDERS)
            runs = []
            for seed in SEEDS[:seeds]:
                config = DIGITS.replace(seed=seed, **tuned["chosen"])
                parts = data.split(rows, seed)
                model, run = _train(make, parts, config)
                run["test"] = float(model.loss(parts.test.values, TEST_DRAWS).double().mean())
                if model.shares is not None:
                    run["accuracy"] = accuracy(model, parts.test)
                if seed in AUROC_SEEDS and (size == "M" or family == GAUSSIAN):
                    few = data.split(rows.where(rows.labels < 5), seed)
                    narrow, _ = _train(make, few, config)
                    others = rows.where(rows.labels >= 5).values
                    known, unknown = (narrow.log_prob(x, TEST_DRAWS) for x in (few.test.values, others))
                    run["auroc"] = auroc(known, unknown)
                runs.append(run)
            kept.add(
                {
                    "family": family,
                    "size": size,
                    "parameters": runs[0]["parameters"],
                    "test": statistics.fmean(run["test"] for run in runs),
                    "test_std": statistics.stdev(run["test"] for run in runs) if len(runs) > 1 else 0.0,
                    "auroc": _mean([run["auroc"] for run in runs if "auroc" in run]),
                    "tuned": tuned,
                    "runs": runs,
                }
            )


def plane(seeds: int, results: Results, only: list[str] | None) -> None:
    """Kullback–Leibler divergence from the truth, nats, and the integral of what was learnt."""
    kept = Kept("density-plane", results, "target", "family", "size")
    for size in ("M", "L", "S"):
        for family, flows in PLANE_FLOWS.items():
            for name in data.TARGETS:
                if kept.has(target=name, family=family, size=size):
                    continue
                if only and f"{family}, {size}" not in only:
                    continue
                make = flows[size]
                rows = data.read(name, seed=0)
                tuned = _tune(make, data.split(rows, 0), PLANE, PLANE_LADDERS)
                runs = []
                for seed in SEEDS[:seeds]:
                    rows = data.read(name, seed=seed)
                    assert rows.target is not None
                    parts = data.split(rows, seed)
                    model, run = _train(make, parts, PLANE.replace(seed=seed, **tuned["chosen"]))
                    run["kl"], run["kl_error"] = divergence(model, rows.target)
                    run["integral"] = integral(model, rows.target)
                    runs.append(run)
                kept.add(
                    {
                        "target": name,
                        "family": family,
                        "size": size,
                        "parameters": runs[0]["parameters"],
                        "kl": statistics.fmean(run["kl"] for run in runs),
                        "kl_std": statistics.stdev(run["kl"] for run in runs) if len(runs) > 1 else 0.0,
                        "tuned": tuned,
                        "runs": runs,
                    }
                )


def ablation(seeds: int, results: Results, only: list[str] | None) -> None:
    """What each part of LU-Net M is worth on the validation part of digits; the error of there and back.

    All with the settings that were chosen for M, so that what another would gain by its own is not in it.
    """
    kept = Kept("density-ablation", results, "group", "name")
    rows = data.read("digits")
    for group, changes in ABLATION.items():
        for name, change in changes.items():
            if kept.has(group=group, name=name) or (only and f"{group}, {name}" not in only):
                continue
            runs = []
            for seed in TUNING_SEEDS[:seeds]:
                settings = {key: value for key, value in change.items() if key != "between"}
                config = ABLATED.replace(seed=seed, **settings)
                parts = data.split(rows, seed)
                try:
                    model, run = _train(lunet(config.layers, between=change.get("between")), parts, config)
                except ArithmeticError as error:
                    runs.append({"seed": seed, "diverged": str(error)})
                    continue
                y = model.preprocessing.forward(parts.test.values, torch.Generator().manual_seed(0))[0]
                net: LUNet = model.flow.net
                with torch.no_grad():
                    back = (net.inverse(net(y)) - y).norm(dim=-1) / y.norm(dim=-1)
                runs.append({"seed": seed, **run, "round_trip": float(back.max())})
            good = [run for run in runs if "validation" in run]
            kept.add(
                {
                    "group": group,
                    "name": name,
                    "parameters": good[0]["parameters"] if good else None,
                    "validation": _mean([run["validation"] for run in good]),
                    "round_trip": max((run["round_trip"] for run in good), default=None),
                    "diverged": len(runs) - len(good),
                    "change": {key: getattr(value, "__name__", value) for key, value in change.items()},
                    "runs": runs,
                }
            )


def _timed(model: DensityModel, parts: data.Parts) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """(a training step of 256 rows, a draw of 256 samples, bytes that the step keeps for backward)."""
    flow: Any = model.flow
    optimizer = torch.optim.AdamW(flow.parameters(), lr=0.0, fused=True)
    noise = torch.Generator().manual_seed(0)
    y = model.preprocessing.forward(parts.training.values[:256], noise)[0]
    labels = parts.training.labels
    context = () if model.shares is None or labels is None else (labels[:256],)

    def step() -> None:
        optimizer.zero_grad()
        flow.log_prob(y, *context).mean().neg().backward()
        optimizer.step()

    def sample() -> Tensor:
        return flow.sample((), *context) if context else flow.sample(256)

    return step, sample, kept_bytes(lambda: flow.log_prob(y, *context), flow)


def speed(results: Results, repeats: int = 40) -> None:
    """Medians of a training step of 256 rows and of 256 samples, all flows in turn, one thread."""
    parts = data.split(data.read("digits"), 0)
    found: list[dict[str, Any]] = []
    runs: list[dict[str, Callable[[], Any]]] = []
    for family, flows in DIGITS_FLOWS.items():
        for size, make in flows.items():
            for components in (1, 30):
                model = _model(make, parts, DIGITS.replace(components=components))
                step, sample, kept = _timed(model, parts)
                runs.append({"step": step, "sample": sample})
                found.append(
                    {
                        "family": family,
                        "size": size,
                        "components": components,
                        "parameters": sum(p.numel() for p in model.flow.parameters()),
                        "kept_bytes": kept,
                        "step": [],
                        "sample": [],
                    }
                )
    for repeat in range(repeats + 3):
        for row, calls in zip(found, runs, strict=True):
            for what, call in calls.items():
                if what == "sample" and repeat % 4:
                    continue  # MAF's takes D passes
                start = time.perf_counter()
                call()
                if repeat >= 3:
                    row[what].append(time.perf_counter() - start)
    for row in found:
        row |= {f"{what}_ms": 1e3 * statistics.median(row.pop(what)) for what in ("step", "sample")}
        print(
            f"{row['family']:30} {row['size']} K {row['components']:2} {row['parameters']:7,} "
            f"step {row['step_ms']:7.2f} ms  sample {row['sample_ms']:8.2f} ms"
        )
    results.write("density-speed", {"rows": found, "batch": 256})


def pictures(results: Results) -> None:
    """density-plane.png: the true densities and those that measured flows of size M learnt, seed 0, as tuned.

    density-digits.png: digits, samples of LU-Net M and its interpolations; density-splines.png: the slopes
    of its splines.
    """
    _draw_plane(results)
    _draw_digits(results)


def _draw_plane(results: Results) -> None:
    tuned = {
        (row["target"], row["family"]): row["tuned"]["chosen"]
        for row in rows_of("plane", results.folder)
        if row["size"] == "M"
    }
    families = [family for family in PLANE_FLOWS if all((name, family) in tuned for name in data.TARGETS)]
    figure = new_figure(9.0, 9.0, dpi=110)
    places = figure.subplots(4, len(families) + 1)
    for row, name in zip(places, data.TARGETS, strict=True):
        rows = data.read(name, seed=0)
        target = rows.target
        assert target is not None
        points, _ = grid(target.extent, 200)
        shown = {"truth": target.log_prob(points)}
        for family in families:
            config = PLANE.replace(seed=0, **tuned[name, family])
            model, _ = _train(PLANE_FLOWS[family]["M"], data.split(rows, 0), config)
            shown[family] = model.log_prob(points.float())
            print(f"{name}, {family}", flush=True)
        highest = float(shown["truth"].exp().max())
        for axes, (title, log_prob) in zip(row, shown.items(), strict=True):
            show_density(axes, log_prob, target.extent, highest)
            axes.set_axis_off()
            if name == "ring":
                axes.set_title(title, loc="left", fontsize=10)
    write_figure(results.path("density-plane.png"), figure)


def _draw_digits(results: Results) -> None:
    rows = data.read("digits")
    assert rows.image is not None
    assert rows.levels is not None
    chosen = next(
        row["tuned"]["chosen"]
        for row in rows_of("digits", results.folder)
        if (row["family"], row["size"]) == ("LU-Net", "M")
    )
    parts = data.split(rows, 0)
    model, _ = _train(DIGITS_FLOWS["LU-Net"]["M"], parts, DIGITS.replace(**chosen))
    torch.manual_seed(0)
    samples = model.sample(SIDE * SIDE)
    figure = new_figure(9.0, 3.3, dpi=110)
    shown_sheets = {
        "data": parts.test.values[: SIDE * SIDE],
        "samples of LU-Net, M": samples,
        "between two digits (first and last of a row)": interpolation(model, parts.test).flatten(0, 1),
    }
    for axes, (title, sheet) in zip(figure.subplots(1, 3), shown_sheets.items(), strict=True):
        show_sheet(axes, sheet, rows.image, rows.levels)
        axes.set_title(title, loc="left", fontsize=10)
    write_figure(results.path("density-digits.png"), figure)

    net: LUNet = model.flow.net
    splines = {"before layer 1": net.input}
    splines |= {f"after layer {i}": layer.activation for i, layer in enumerate(net.layers[:-1], 1)}
    figure = new_figure(9.0, 2.6, dpi=110)
    places = figure.subplots(1, len(splines), sharey=True)
    for axes, (title, spline) in zip(places, splines.items(), strict=True):
        show_slopes(axes, spline)
        axes.set_title(title, loc="left", fontsize=10)
    write_figure(results.path("density-splines.png"), figure)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("part", choices=("digits", "plane", "ablation", "speed", "pictures", "report"))
    options.add_argument("--seeds", type=int, default=len(SEEDS), help="fewer for a try")
    options.add_argument("--only", nargs="+", metavar="ROW", help='rows to measure, as "LU-Net, M"')
    chosen = options.parse_args()
    results = open_results(chosen, threads=1)
    if chosen.part in ("digits", "plane", "ablation"):
        {"digits": digits, "plane": plane, "ablation": ablation}[chosen.part](
            chosen.seeds, results, chosen.only
        )
    else:
        {"speed": speed, "pictures": pictures, "report": report}[chosen.part](results)


if __name__ == "__main__":
    main()
