"""LU-Net as a density, beside the flows people use, in one harness: digits, points of the plane, depth.

    python benchmarks/density.py digits      quality: losses over seeds, outliers        (2 hours of 1 core)
    python benchmarks/density.py plane       divergence from known densities             (1 hour)
    python benchmarks/density.py depth       1 to 32 layers, started in three ways       (30 minutes)
    python benchmarks/density.py speed       a training step and a sample, interleaved   (2 minutes, quiet)
    python benchmarks/density.py pictures    what flows of size M learnt, as pictures       (5 minutes)
    python benchmarks/density.py report      density.md and density.png from the four files

Every flow gets the same rows, noise, optimiser, averaging and stopping (lunet_fast/density/training.py), and
the same budget of tuning: each of GRID once with seed 0 and TUNING_STEPS steps, the validation part chooses,
then the five seeds. A part that was measured is kept in benchmarks/results/density-*.json and not measured
again; delete it there to do so.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast import ConditionalLUNet, LUNet, NormalMixture, StandardNormal
from lunet_fast.density import data
from lunet_fast.density.config import DensityConfig
from lunet_fast.density.evaluation import TEST_DRAWS, accuracy, auroc, divergence, grid, integral
from lunet_fast.density.model import DensityModel, build_flow, whiten
from lunet_fast.density.pictures import SIDE, interpolation, show_density, show_sheet
from lunet_fast.density.preprocessing import Preprocessing
from lunet_fast.density.training import fit_flow
from lunet_fast.training.files import write_figure
from lunet_fast.training.loop import cpu_threads
from lunet_fast.training.seeding import seeded
from machine import RESULTS, write, write_text

SEEDS = (0, 1, 2, 3, 4)

#: Of each flow: the base, Adam's rate, the decay of matrices.
GRID = tuple(
    {"components": components, "learning_rate": rate, "weight_decay": decay}
    for components in (1, 30)
    for rate, decay in ((1e-3, 0.01), (5e-3, 0.01), (5e-3, 0.2))
)
TUNING_STEPS = 1500

DIGITS = DensityConfig(steps=5000, patience=12, learning_rate=5e-3)
PLANE = DensityConfig(steps=2500, patience=25, batch_size=512, weight_decay=0.0, signs="random")


class Peer(nn.Module):
    """Another library's transform between standardised rows and a base."""

    def __init__(self, transform: nn.Module, features: int, components: int, rows: Tensor) -> None:
        super().__init__()
        self.transform = transform
        self.base: Any = NormalMixture(features, components) if components > 1 else StandardNormal(features)
        self.register_buffer("shift", rows.mean(0))
        self.register_buffer("scale", rows.std(0))

    def log_prob(self, y: Tensor) -> Tensor:
        z, logabsdet = self.call((y - self.shift) / self.scale)
        return self.base.log_prob(z) + logabsdet - self.scale.log().sum()

    def sample(self, n: int) -> Tensor:
        with torch.no_grad():
            return self.inverse(self.base.sample((n,))) * self.scale + self.shift


class Zuko(Peer):
    def call(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform().call_and_ladj(y)

    def inverse(self, z: Tensor) -> Tensor:
        return self.transform().inv(z)


class Nflows(Peer):
    def call(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(y)

    def inverse(self, z: Tensor) -> Tensor:
        return self.transform.inverse(z)[0]


#: (preprocessed training rows, settings, how many labels) → flow.
Make = Callable[[Tensor, DensityConfig, int], nn.Module]


def lunet(layers: int, *, by_label: bool = False) -> Make:
    def make(rows: Tensor, config: DensityConfig, classes: int) -> nn.Module:
        flow = build_flow(config.replace(layers=layers, conditional=by_label), rows.shape[1], classes)
        whiten(flow, rows)
        return flow

    return make


def zuko(kind: str, transforms: int, hidden: tuple[int, ...]) -> Make:
    def make(rows: Tensor, config: DensityConfig, classes: int) -> nn.Module:
        import zuko.flows

        features = rows.shape[1]
        flow = getattr(zuko.flows, kind)(features, transforms=transforms, hidden_features=hidden)
        return Zuko(flow.transform, features, config.components, rows)

    return make


def nflows(blocks: int, hidden: int) -> Make:
    """LULinear and a rational-quadratic coupling, alternating, as nflows' users stack them."""

    def make(rows: Tensor, config: DensityConfig, classes: int) -> nn.Module:
        from nflows.nn.nets import ResidualNet
        from nflows.transforms import CompositeTransform, PiecewiseRationalQuadraticCouplingTransform
        from nflows.transforms.lu import LULinear
        from nflows.utils import create_alternating_binary_mask

        features = rows.shape[1]
        parts: list[nn.Module] = []
        for block in range(blocks):
            parts += [
                LULinear(features, identity_init=True),
                PiecewiseRationalQuadraticCouplingTransform(
                    create_alternating_binary_mask(features, even=block % 2 == 0),
                    lambda inputs, outputs: ResidualNet(inputs, outputs, hidden, num_blocks=1),
                    num_bins=4,
                    tails="linear",
                    tail_bound=5.0,
                ),
            ]
        return Nflows(CompositeTransform(parts), features, config.components, rows)

    return make


GAUSSIAN = "Gaussian or mixture (M = 1)"

#: Family → size → flow, on digits (D 64).
DIGITS_FLOWS: dict[str, dict[str, Make]] = {
    "LU-Net": {"S": lunet(2), "M": lunet(4), "L": lunet(12)},
    "LU-Net, a context for each label": {"M": lunet(4, by_label=True)},
    GAUSSIAN: {"S": lunet(1)},
    "RealNVP (zuko)": {
        "S": zuko("RealNVP", 4, (24,)),
        "M": zuko("RealNVP", 6, (32,)),
        "L": zuko("RealNVP", 6, (96,)),
    },
    "MAF (zuko)": {"S": zuko("MAF", 2, (24,)), "M": zuko("MAF", 3, (32,)), "L": zuko("MAF", 4, (80,))},
    "NSF (zuko)": {
        "S": zuko("NSF", 1, (8,)),
        "M": zuko("NSF", 1, (16,)),
        "L": zuko("NSF", 2, (24,)),
    },
    "LULinear + splines (nflows)": {"S": nflows(1, 8), "M": nflows(2, 12), "L": nflows(3, 32)},
}

#: On the plane (D 2), at three sizes of about 150, 300 and 1,200 numbers.
PLANE_FLOWS: dict[str, dict[str, Make]] = {
    "LU-Net": {"S": lunet(8), "M": lunet(16), "L": lunet(32)},
    "RealNVP (zuko)": {
        "S": zuko("RealNVP", 4, (8,)),
        "M": zuko("RealNVP", 6, (12,)),
        "L": zuko("RealNVP", 8, (32,)),
    },
    "NSF (zuko)": {"S": zuko("NSF", 1, (4,)), "M": zuko("NSF", 2, (4,)), "L": zuko("NSF", 3, (12,))},
}


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
        "validation": curve.test[chosen - 1] if chosen else math.inf,
        "curve": [round(loss, 4) for loss in curve.test],
        "rounds": len(curve.train),
        "chosen": chosen,
        "parameters": sum(p.numel() for p in model.flow.parameters()),
        "seconds": round(curve.seconds, 2),
    }


def _tune(make: Make, parts: data.Parts, config: DensityConfig, grid: Any) -> dict[str, Any]:
    """The settings of the grid that the validation part likes best."""
    tried = []
    for settings in grid:
        short = config.replace(steps=min(TUNING_STEPS, config.steps // 2), **settings)
        try:
            validation = _train(make, parts, short)[1]["validation"]
        except ArithmeticError:
            validation = math.inf
        tried.append((validation, settings))
    return {
        "chosen": min(tried, key=lambda pair: pair[0])[1],
        "tried": [{**settings, "validation": v if math.isfinite(v) else None} for v, settings in tried],
    }


class Kept:
    """Rows of a results file, written after each, so that what was measured is not measured again."""

    def __init__(self, name: str) -> None:
        self.name = name
        path = RESULTS / f"{name}.json"
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def has(self, **keys: Any) -> bool:
        return any(all(row.get(key) == value for key, value in keys.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        write(self.name, {"rows": self.rows})
        shown = {k: v for k, v in row.items() if not isinstance(v, list | dict)}
        print(
            " ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()),
            flush=True,
        )


def digits(seeds: int) -> None:
    """Bits a dimension over the seeds; AUROC of 0–4 against 5–9 by a flow that saw only 0–4."""
    kept = Kept("density-digits")
    rows = data.read("digits")
    assert rows.labels is not None
    for size in ("M", "S", "L"):
        for family, flows in DIGITS_FLOWS.items():
            if size not in flows or kept.has(family=family, size=size):
                continue
            make = flows[size]
            tuned = _tune(make, data.split(rows, 0), DIGITS, GRID)
            runs = []
            for seed in SEEDS[:seeds]:
                config = DIGITS.replace(seed=seed, **tuned["chosen"])
                parts = data.split(rows, seed)
                model, run = _train(make, parts, config)
                run["test"] = float(model.loss(parts.test.values, TEST_DRAWS).double().mean())
                if model.shares is not None:
                    run["accuracy"] = accuracy(model, parts.test)
                if size == "M" or family == GAUSSIAN:
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
                    "auroc": statistics.fmean(run["auroc"] for run in runs) if "auroc" in runs[0] else None,
                    "tuned": tuned,
                    "runs": runs,
                }
            )


def plane(seeds: int) -> None:
    """Kullback–Leibler divergence from the truth, nats, and the integral of what was learnt."""
    kept = Kept("density-plane")
    grid = tuple(
        {"components": components, "learning_rate": rate} for components in (1, 32) for rate in (5e-3, 2e-2)
    )
    for size in ("M", "L", "S"):
        for name in data.TARGETS:
            for family, flows in PLANE_FLOWS.items():
                if kept.has(target=name, family=family, size=size):
                    continue
                make = flows[size]
                rows = data.read(name, seed=0)
                tuned = _tune(make, data.split(rows, 0), PLANE, grid)
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


def depth(seeds: int) -> None:
    """What depth does on digits, by how the net starts, and what is left of a row after there and back."""
    kept = Kept("density-depth")
    rows = data.read("digits")
    # As LU-Net starts by itself; then each with one thing more.
    starts: dict[str, tuple[bool, dict[str, Any]]] = {
        "identity at 0": (False, {"alpha": 0.1, "signs": "positive"}),
        "white": (True, {"alpha": 0.1, "signs": "positive"}),
        "white, slopes near 1": (True, {"alpha": 0.7, "signs": "positive"}),
        "white, slopes near 1, negative signs": (True, {"alpha": 0.7, "signs": "negative"}),
    }
    for layers in (32, 4, 12, 8, 2):
        for name, (white, settings) in starts.items():
            if kept.has(layers=layers, start=name):
                continue
            runs = []
            for seed in SEEDS[:seeds]:
                config = DIGITS.replace(seed=seed, layers=layers, **settings)
                parts = data.split(rows, seed)

                def make(y: Tensor, config: DensityConfig, classes: int, white: bool = white) -> nn.Module:
                    flow = build_flow(config, y.shape[1])
                    if white:
                        whiten(flow, y)
                    return flow

                first = float(_model(make, parts, config).loss(parts.test.values).double().mean())
                try:
                    model, run = _train(make, parts, config)
                except ArithmeticError as error:
                    runs.append({"first": first, "diverged": str(error)})
                    continue
                run["first"] = first
                run["test"] = float(model.loss(parts.test.values, TEST_DRAWS).double().mean())
                y = model.preprocessing.forward(parts.test.values, torch.Generator().manual_seed(0))[0]
                net: LUNet = model.flow.net
                run["digits_kept"] = net._digits_kept(y)
                with torch.no_grad():
                    back = (net.inverse(net(y)) - y).norm(dim=-1) / y.norm(dim=-1)
                run["round_trip_median"], run["round_trip_worst"] = float(back.median()), float(back.max())
                run["digits_lost_at_most"] = sum(each.digits_lost for each in net.condition(y).layers)
                runs.append(run)
            good = [run for run in runs if "test" in run]
            row: dict[str, Any] = {
                "layers": layers,
                "start": name,
                "first": statistics.fmean(r["first"] for r in runs),
            }
            for key in (
                "test",
                "round_trip_median",
                "round_trip_worst",
                "digits_kept",
                "digits_lost_at_most",
            ):
                row[key] = statistics.fmean(run[key] for run in good) if good else None
            kept.add({**row, "diverged": len(runs) - len(good), "runs": runs})


def _kept_for_backward(call: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes of the tensors that autograd keeps until backward, the parameters themselves aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(kept.values())
    del result
    return total


def speed(repeats: int = 40) -> None:
    """Medians of a training step of 256 rows and of 256 samples, all flows in turn, one thread."""
    rows = data.read("digits")
    parts = data.split(rows, 0)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    runs: dict[tuple[str, str], tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for family, flows in DIGITS_FLOWS.items():
        for size, make in flows.items():
            for components in (1, 30):
                config = DIGITS.replace(components=components)
                model = _model(make, parts, config)
                optimizer = torch.optim.AdamW(model.flow.parameters(), lr=0.0, fused=True)
                y = model.preprocessing.forward(
                    parts.training.values[:256], torch.Generator().manual_seed(0)
                )[0]

                labels = parts.training.labels
                context = () if model.shares is None or labels is None else (labels[:256],)

                def step(
                    flow: nn.Module = model.flow,
                    optimizer: Any = optimizer,
                    y: Tensor = y,
                    context: tuple[Tensor, ...] = context,
                ) -> None:
                    optimizer.zero_grad()
                    flow.log_prob(y, *context).mean().neg().backward()
                    optimizer.step()

                def sample(flow: Any = model.flow, context: tuple[Tensor, ...] = context) -> Tensor:
                    return flow.sample((), *context) if context else flow.sample(256)

                name = (family, f"{size}, base of {components}" if components > 1 else size)
                runs[name] = (step, sample)
                kept = _kept_for_backward(
                    lambda flow=model.flow, y=y, context=context: flow.log_prob(y, *context),
                    list(model.flow.parameters()),
                )
                found[name] = {
                    "family": family,
                    "size": size,
                    "components": components,
                    "parameters": sum(p.numel() for p in model.flow.parameters()),
                    "kept_bytes": kept,
                    "step": [],
                    "sample": [],
                }
    for repeat in range(repeats + 3):
        for name, (step, sample) in runs.items():
            for what, call in (("step", step), ("sample", sample)):
                if what == "sample" and repeat % 4:
                    continue  # MAF's takes D passes
                start = time.perf_counter()
                call()
                if repeat >= 3:
                    found[name][what].append(time.perf_counter() - start)
    table = [
        {**row, **{f"{what}_ms": 1e3 * statistics.median(row.pop(what)) for what in ("step", "sample")}}
        for row in found.values()
    ]
    write("density-speed", {"rows": table, "batch": 256})
    for row in table:
        print(
            f"{row['family']:30} {row['size']} K {row['components']:2} {row['parameters']:7,} "
            f"step {row['step_ms']:7.2f} ms  sample {row['sample_ms']:8.2f} ms"
        )


def pictures() -> None:
    """density-plane.png: the true densities and those that flows of size M learnt, seed 0, settings as tuned.

    density-digits.png: digits, samples of LU-Net M and its interpolations.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tuned = {
        (row["target"], row["family"]): row["tuned"]["chosen"] for row in _rows("plane") if row["size"] == "M"
    }
    figure = Figure(figsize=(9.0, 9.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(4, len(PLANE_FLOWS) + 1)
    for row, name in zip(places, data.TARGETS, strict=True):
        rows = data.read(name, seed=0)
        target = rows.target
        assert target is not None
        points, _ = grid(target.extent, 201)
        shown = {"truth": target.log_prob(points)}
        for family, flows in PLANE_FLOWS.items():
            config = PLANE.replace(seed=0, **tuned[name, family])
            model, _ = _train(flows["M"], data.split(rows, 0), config)
            shown[f"{family}, M"] = model.log_prob(points.float())
            print(f"{name}, {family}", flush=True)
        highest = float(shown["truth"].exp().max())
        for axes, (title, log_prob) in zip(row, shown.items(), strict=True):
            show_density(axes, log_prob, target.extent, highest)
            axes.set_axis_off()
            if name == "ring":
                axes.set_title(title, loc="left", fontsize=11)
    write_figure(RESULTS / "density-plane.png", figure)

    rows = data.read("digits")
    assert rows.image is not None
    assert rows.levels is not None
    chosen = next(
        row["tuned"]["chosen"] for row in _rows("digits") if (row["family"], row["size"]) == ("LU-Net", "M")
    )
    parts = data.split(rows, 0)
    model, _ = _train(DIGITS_FLOWS["LU-Net"]["M"], parts, DIGITS.replace(**chosen))
    with seeded(0):
        samples = model.sample(SIDE * SIDE)
    figure = Figure(figsize=(9.0, 3.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    shown_sheets = {
        "data": parts.test.values[: SIDE * SIDE],
        "samples of LU-Net, M": samples,
        "between two digits (first and last of a row)": interpolation(model, parts.test).flatten(0, 1),
    }
    for axes, (title, sheet) in zip(figure.subplots(1, 3), shown_sheets.items(), strict=True):
        show_sheet(axes, sheet, rows.image, rows.levels)
        axes.set_title(title, loc="left", fontsize=10)
    write_figure(RESULTS / "density-digits.png", figure)


# The report -------------------------------------------------------------------------------------------------


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"density-{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def _step_times() -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(row["family"], row["size"], row["components"]): row for row in _rows("speed")}


def digits_table() -> list[str]:
    """Quality, cost and outliers on digits, the best flow first."""
    times = _step_times()
    rows = sorted(_rows("digits"), key=lambda row: row["test"])
    # A likelihood that most flows get to, for the time to it.
    wanted = 2.15
    lines = [
        "| flow | numbers | bits/dim, test | base of | a step, ms | trained, s | "
        f"to {wanted} on validation, s | 256 samples, ms | AUROC 0–4 / 5–9 |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        components = row["tuned"]["chosen"]["components"]
        time_of = times.get((row["family"], row["size"], components))
        step = time_of["step_ms"] if time_of else math.nan
        steps = [len(run["curve"]) * DIGITS.round_steps for run in row["runs"]]
        reached = [
            next((i + 1 for i, loss in enumerate(run["curve"]) if loss <= wanted), None)
            for run in row["runs"]
        ]
        after = [r * DIGITS.round_steps * step / 1e3 for r in reached if r is not None]
        ours = row["family"] == "LU-Net"
        bold = "**" if ours else ""
        name = f"{row['family']}, {row['size']}" if row["family"] != GAUSSIAN else row["family"]
        cells = [
            f"{bold}{name}{bold}",
            f"{row['parameters']:,}",
            f"{bold}{row['test']:.4f}{bold} ± {row['test_std'] / math.sqrt(len(row['runs'])):.4f}",
            "1" if components == 1 else f"{components} Gaussians",
            f"{step:.2f}",
            f"{statistics.fmean(steps) * step / 1e3:.0f}",
            f"{statistics.fmean(after):.1f}"
            if len(after) == len(reached)
            else "never"
            if not after
            else "not always",
            f"{time_of['sample_ms']:.1f}" if time_of else "",
            "" if row["auroc"] is None else f"{row['auroc']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def speed_table() -> list[str]:
    lines = [
        "| flow | numbers | base of | a training step, ms | 256 samples, ms | kept for backward, MB |",
        "|---" * 6 + "|",
    ]
    for row in _rows("speed"):
        base = "1" if row["components"] == 1 else f"{row['components']} Gaussians"
        lines.append(
            f"| {row['family']}, {row['size']} | {row['parameters']:,} | {base} | {row['step_ms']:.2f} | "
            f"{row['sample_ms']:.2f} | {row['kept_bytes'] / 1e6:.1f} |"
        )
    return lines


def plane_table() -> list[str]:
    rows = _rows("plane")
    names = list(data.TARGETS)
    lines = ["| flow | numbers | " + " | ".join(names) + " | mean |", "|---" * (len(names) + 3) + "|"]
    for size in ("S", "M", "L"):
        for family in PLANE_FLOWS:
            found = {row["target"]: row for row in rows if (row["family"], row["size"]) == (family, size)}
            if not found:
                continue
            numbers = sorted({row["parameters"] for row in found.values()})
            cells = [f"{found[name]['kl']:.3f}" if name in found else "" for name in names]
            mean = statistics.fmean(row["kl"] for row in found.values())
            cells.append(f"{mean:.3f}" if len(found) == len(names) else "")
            span = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,}–{numbers[-1]:,}"
            bold = "**" if family == "LU-Net" else ""
            lines.append(f"| {bold}{family}, {size}{bold} | {span} | " + " | ".join(cells) + " |")
    return lines


def depth_table() -> list[str]:
    lines = [
        "| layers | start | before training | bits/dim, test | round trip, median | worst | digits kept |",
        "|---" * 7 + "|",
    ]
    for row in sorted(_rows("depth"), key=lambda row: (row["layers"], row["start"])):
        if row["test"] is None:
            lines.append(f"| {row['layers']} | {row['start']} | {row['first']:.3g} | diverged | | | |")
            continue
        lines.append(
            f"| {row['layers']} | {row['start']} | {row['first']:.3g} | {row['test']:.4f} | "
            f"{row['round_trip_median']:.1e} | {row['round_trip_worst']:.1e} | {row['digits_kept']:.1f} |"
        )
    return lines


def report() -> None:
    """density.md and density.png."""
    machine = json.loads((RESULTS / "density-digits.json").read_text())["machine"]
    text = [
        "# LU-Net as a density, beside other flows",
        "",
        f"{machine['processor']}, one thread, torch {machine['torch']}, {machine['date']}. Every flow: "
        "the same rows, noise, AdamW with averaged weights, the same stopping; the base, the rate and the "
        f"decay chosen from {len(GRID)} settings by the validation part of seed 0. Means over five seeds, "
        "which also draw the parts anew (± standard error). Times are medians of interleaved steps, and "
        "steps times that for whole trainings.",
        "",
        "## Digits (scikit-learn, 8 × 8, 17 levels, 64-D; all Jacobians counted)",
        "",
        *digits_table(),
        "",
        "![quality against size and time](density.png)",
        "",
        "![digits, samples, interpolations](density-digits.png)",
        "",
        "## A training step and sampling, batch 256, D 64",
        "",
        *speed_table(),
        "",
        "## Points of the plane: KL(truth ‖ flow), nats",
        "",
        *plane_table(),
        "",
        "![true and learnt densities](density-plane.png)",
        "",
        "## Depth (digits, base of 30 Gaussians, two seeds)",
        "",
        *depth_table(),
        "",
    ]
    write_text(RESULTS / "density.md", "\n".join(text))
    _plot(RESULTS / "density.png")


def _plot(path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    times = _step_times()
    colours = dict(
        zip(
            DIGITS_FLOWS,
            ("#d1662b", "#e0a080", "#888888", "#1f5f99", "#4c9a5b", "#8d5aa8", "#b8972c"),
            strict=True,
        )
    )
    for family, colour in colours.items():
        rows = sorted(
            (row for row in _rows("digits") if row["family"] == family), key=lambda r: r["parameters"]
        )
        if not rows:
            continue
        errors = [row["test_std"] / math.sqrt(len(row["runs"])) for row in rows]
        tests = [row["test"] for row in rows]
        style: dict[str, Any] = {
            "color": colour,
            "marker": "o",
            "markersize": 4,
            "capsize": 2,
            "label": family,
        }
        left.errorbar([row["parameters"] for row in rows], tests, errors, **style)
        spent = [
            statistics.fmean(len(run["curve"]) for run in row["runs"])
            * DIGITS.round_steps
            * times[(family, row["size"], row["tuned"]["chosen"]["components"])]["step_ms"]
            / 1e3
            for row in rows
        ]
        right.errorbar(spent, tests, errors, **style)
    for axes, label in ((left, "numbers learnt"), (right, "seconds of training, one core")):
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.grid(color="#dddddd")
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    left.set_ylabel("digits: bits a dimension, test")
    right.legend(frameon=False, fontsize=8)
    write_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("digits", "plane", "depth", "speed", "pictures", "report"))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="fewer for a try")
    options = parser.parse_args()
    with cpu_threads(1):
        if options.part in ("digits", "plane", "depth"):
            {"digits": digits, "plane": plane, "depth": depth}[options.part](options.seeds)
        elif options.part == "speed":
            speed()
        elif options.part == "pictures":
            pictures()
        else:
            report()


if __name__ == "__main__":
    main()
