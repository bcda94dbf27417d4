"""LU-Net as a density of real tables, beside the flows people use, all of about one size.

    python benchmarks/density_tables.py tables      eight tables, six flows             (50 minutes of 1 core)
    python benchmarks/density_tables.py fashion     Fashion-MNIST, a model a class      (70 minutes at most)
    python benchmarks/density_tables.py pictures    samples of LU-Net, a line a class   (30 minutes)
    python benchmarks/density_tables.py report      density-tables.md from both files

**Tables.** letter, shuttle and satellite with their published test rows; spam, vehicle, pima, vowel and
breast_cancer divided at random. Integers are dequantised and their loss is in bits a dimension, that of vowel
and breast_cancer in nats a row. magic is not among them: no package has it. vowel's published test rows are
spoken by others than the training rows, so that they tell how speakers differ, and are not used.

To keep it within an hour, at most VALIDATION_ROWS rows choose and TEST_ROWS test, of shuttle MORE_TEST_ROWS;
trainings have STEPS steps of 256 rows, and those that only tune TUNING_STEPS; the parts are the same for all
seeds, which draw first weights, batches and noise. Every peer has the width of WIDTHS that is nearest below
LU-Net's parameters, or the least; LU-Net has as many layers as :func:`layers_of` says. All are tuned by
density.py's rule on the same ladders with the validation part and seed 0, then trained with SEEDS.
Differences are paired: of each test row the mean over the seeds, less that of LU-Net, and the standard error
over the rows.

**Fashion-MNIST**, by the protocol of the original LU-Net: 784 pixels, one model a class, 3 LU blocks, batch
256, ``--epochs`` (80), bits a pixel. Nothing is tuned but when to stop, by the validation part. An epoch of
the three flows of a class takes 5.4 seconds of one core, so 80 epochs take 7 minutes a class: ``--classes``
and ``--epochs`` take less.

A row that was measured is kept in benchmarks/results/density-tables.json or density-fashion.json and not
measured again by the same code and constants.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tables_of_real_data import LUNET, fashion_table, packed, real_table
from torch import Tensor, nn

from density import Kept
from density_flows import LEAKY, SPLINES, Make, lunet, nflows, zuko
from lunet_fast import LUFlow
from lunet_fast.density import data
from lunet_fast.density.config import DensityConfig
from lunet_fast.density.evaluation import TEST_DRAWS
from lunet_fast.density.model import DensityModel
from lunet_fast.density.pictures import SIDE, show_sheet
from lunet_fast.density.preprocessing import Preprocessing
from lunet_fast.density.training import fit_flow
from lunet_fast.training.figures import new_figure
from lunet_fast.training.files import write_figure
from lunet_fast.training.seeding import seeded
from machine import Results, open_results, parser, where, write_text
from tables_of_densities import rows_of

SEEDS = (1, 2, 3, 4, 5)
STEPS, TUNING_STEPS, ROUND_STEPS = 800, 200, 50
VALIDATION_ROWS, TEST_ROWS = 500, 1000

#: Of shuttle all rows of its test: a few of them, far from the others, decide a mean of fewer.
MORE_TEST_ROWS = {"shuttle": 14_500}

TABLES = ("letter", "shuttle", "satellite", "spam", "vehicle", "pima", "vowel", "breast_cancer")

LADDERS: dict[str, tuple[float, ...]] = {
    "learning_rate": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    "weight_decay": (0.05, 0.2, 0.5, 1.0, 3.0),
    "components": (1, 30),
}
START = LEAKY.replace(
    steps=STEPS,
    round_steps=ROUND_STEPS,
    patience=1000,
    learning_rate=5e-3,
    weight_decay=0.5,
    components=30,
)
WIDTHS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
FASHION_LAYERS = 3


def layers_of(features: int) -> int:
    """Of LU-Net: 8 where they are small, else 4."""
    return 8 if features <= 20 else 4


#: Family → the flow of this width; the LU-Nets have none.
PEERS: dict[str, Callable[[int], Make]] = {
    "LULinear + splines (nflows)": lambda width: nflows(2, width),
    "RealNVP (zuko)": lambda width: zuko("RealNVP", 6, (width,)),
    "MAF (zuko)": lambda width: zuko("MAF", 3, (width,)),
    "NSF, coupling (zuko)": lambda width: zuko("NSF", 2, (width,), passes=2, bins=4),
}


def parameters(flow: nn.Module) -> int:
    return sum(parameter.numel() for parameter in flow.parameters())


def flows_of(rows: Tensor) -> dict[str, tuple[Make, int | None]]:
    """Family → (flow, its width): peers as wide as fits into LU-Net's parameters, or of the least width."""
    layers, config = layers_of(rows.shape[1]), START.replace(components=1)

    def count(make: Make) -> int:
        with seeded(0):
            return parameters(make(rows[:64], config, 0))

    found: dict[str, tuple[Make, int | None]] = {
        LUNET: (lunet(layers, **SPLINES), None),
        "LU-Net, LeakySoftplus": (lunet(layers), None),
    }
    most = count(found[LUNET][0])
    for family, make in PEERS.items():
        fitting = [width for width in WIDTHS if count(make(width)) <= most]
        width = max(fitting, default=WIDTHS[0])
        found[family] = (make(width), width)
    return found


def parts_of(name: str) -> data.Parts:
    """The parts of a table, the same for all flows and seeds."""
    rows = data.read(name)
    if name == "vowel":
        rows = replace(rows, part=None)
    parts = data.split(rows, 0)
    order = torch.randperm(len(parts.test), generator=torch.Generator().manual_seed(0))
    order = order[: MORE_TEST_ROWS.get(name, TEST_ROWS)]
    few = torch.arange(min(len(parts.validation), VALIDATION_ROWS))
    return data.Parts(parts.training, parts.validation.where(few), parts.test.where(order))


def start(make: Make, parts: data.Parts, config: DensityConfig) -> DensityModel:
    """The untrained model: first weights by the seed, preprocessing by the training part."""
    training = parts.training
    preprocessing = Preprocessing.of(training.values, training.levels, standardise=training.image is None)
    rows = preprocessing.forward(training.values, torch.Generator().manual_seed(config.seed))[0]
    with seeded(config.seed):
        flow = make(rows, config, 0)
    return DensityModel(flow, preprocessing, training.features)


def trained(make: Make, parts: data.Parts, config: DensityConfig) -> tuple[DensityModel, dict[str, Any]]:
    first = start(make, parts, config)
    model, curve, chosen = fit_flow(first, parts, config)
    return model, {
        "seed": config.seed,
        "validation": curve.test[chosen - 1] if chosen else None,
        "chosen": chosen,
        "rounds": len(curve.train),
        "seconds": round(curve.seconds, 2),
    }


def tune(make: Make, parts: data.Parts) -> dict[str, Any]:
    """The settings that the validation part likes best with seed 0, one after another: from a rung of its
    ladder up, or else down, for as long as the next one is better."""
    tried: list[dict[str, Any]] = []
    chosen: dict[str, Any] = {name: getattr(START, name) for name in LADDERS}

    def loss(settings: dict[str, Any]) -> float:
        try:
            found = trained(make, parts, START.replace(steps=TUNING_STEPS, seed=0, **settings))[1][
                "validation"
            ]
        except ArithmeticError:
            found = None
        tried.append({**settings, "validation": found})
        return math.inf if found is None else found

    best = loss(chosen)
    for name, ladder in LADDERS.items():
        place = ladder.index(chosen[name])
        for rungs in (ladder[place + 1 :], ladder[:place][::-1]):
            for rung in rungs:
                found = loss({**chosen, name: rung})
                if found >= best:
                    break
                best, chosen = found, {**chosen, name: rung}
            if chosen[name] != ladder[place]:
                break
    return {"chosen": chosen, "tried": tried}


def measured(make: Make, parts: data.Parts, configs: list[DensityConfig]) -> dict[str, Any]:
    """Trainings with these settings: mean test loss, its spread over the seeds, and the loss of each row."""
    runs, losses = [], []
    for config in configs:
        model, run = trained(make, parts, config)
        rows = model.loss(parts.test.values, TEST_DRAWS).double().numpy()
        runs.append({**run, "test": float(rows.mean())})
        losses.append(rows)
    tests = [run["test"] for run in runs]
    return {
        "parameters": parameters(model.flow),
        "unit": model.preprocessing.unit,
        "test": statistics.fmean(tests),
        "test_std": statistics.stdev(tests) if len(tests) > 1 else 0.0,
        "runs": runs,
        "test_losses": {"float32": packed(np.mean(losses, 0))},
    }


def tables(options: Any, results: Results) -> None:
    kept = Kept("density-tables", results, "table", "family")
    for name in options.tables:
        parts = parts_of(name)
        if options.quick:
            parts = data.Parts(parts.training, parts.validation, parts.test.where(torch.arange(50)))
        rows = start(lunet(1), parts, START).preprocessing.forward(
            parts.training.values[:256], torch.Generator().manual_seed(0)
        )[0]
        for family, (make, width) in flows_of(rows).items():
            if kept.has(table=name, family=family):
                continue
            tuned = {"chosen": {}, "tried": []} if options.quick else tune(make, parts)
            seeds = SEEDS[: options.seeds]
            configs = [START.replace(seed=seed, **tuned["chosen"]) for seed in seeds]
            if options.quick:
                configs = [config.replace(steps=20, round_steps=10) for config in configs]
            kept.add(
                {
                    "table": name,
                    "family": family,
                    "features": parts.training.features,
                    "train_rows": len(parts.training),
                    "test_rows": len(parts.test),
                    "width": width,
                    **measured(make, parts, configs),
                    "tuned": tuned,
                }
            )


# Fashion-MNIST ----------------------------------------------------------------------------------------------


def for_data(rows: Tensor, config: DensityConfig, classes: int) -> nn.Module:
    """What ``LUFlow.for_data`` makes, of this many components."""
    return LUFlow.for_data(rows, FASHION_LAYERS, components=config.components)


FASHION: dict[str, Make] = {
    LUNET: for_data,
    "LU-Net, LeakySoftplus": lunet(FASHION_LAYERS),
    "RealNVP (zuko)": zuko("RealNVP", 6, (256,)),
}


def fashion_parts(rows: data.Rows, label: int, quick: bool) -> data.Parts:
    parts = data.split(data.of_class(rows, str(label)), 0)
    if not quick:
        return parts
    few = [torch.arange(n) for n in (600, 50, 50)]
    sides = (parts.training, parts.validation, parts.test)
    return data.Parts(*(side.where(rows) for side, rows in zip(sides, few, strict=True)))


def fashion_config(parts: data.Parts, options: Any) -> DensityConfig:
    """An epoch a round; half of the pixels are 0 in all rows of a class, and the rate is that of 784."""
    an_epoch = -(-len(parts.training) // START.batch_size)
    steps = 4 if options.quick else options.epochs * an_epoch
    return LEAKY.replace(
        steps=steps,
        round_steps=min(an_epoch, steps),
        patience=10,
        learning_rate=None,
        weight_decay=0.5,
        components=1,
        seed=0,
    )


def fashion(options: Any, results: Results) -> None:
    kept = Kept("density-fashion", results, "label", "family", "epochs")
    rows = data.read("fashion-mnist")
    for label in options.classes:
        parts = fashion_parts(rows, label, options.quick)
        for family, make in FASHION.items():
            if not kept.has(label=label, family=family, epochs=options.epochs):
                found = measured(make, parts, [fashion_config(parts, options)])
                kept.add({"label": label, "family": family, "epochs": options.epochs, **found})


def pictures(options: Any, results: Results) -> None:
    """density-fashion.png: test rows and samples of LU-Net, trained as for the table, with its test loss."""
    rows = data.read("fashion-mnist")
    assert rows.image is not None
    assert rows.levels is not None
    losses = {
        row["label"]: row["test"] for row in rows_of("fashion", results.folder) if row["family"] == LUNET
    }
    sheets: dict[str, list[Tensor]] = {"test rows": [], "samples of LU-Net": []}
    for label in options.classes:
        parts = fashion_parts(rows, label, options.quick)
        model, run = trained(for_data, parts, fashion_config(parts, options))
        print(f"class {label}: {run['seconds']:.0f} s", flush=True)
        torch.manual_seed(0)
        drawn = model.sample(SIDE)
        for sheet, shown in zip(sheets.values(), (parts.test.values[:SIDE], drawn), strict=True):
            sheet.append(shown)
    lines = len(options.classes)
    figure = new_figure(9.6, 0.55 * lines + 0.5, dpi=110)
    places = figure.subplots(1, 2)
    for axes, (title, sheet) in zip(places, sheets.items(), strict=True):
        show_sheet(axes, torch.cat(sheet), rows.image, rows.levels, lines)
        axes.set_title(title, loc="left", fontsize=10)
    height, width = (side + 1 for side in rows.image)
    above = {"xycoords": "axes fraction", "xytext": (0, 6), "textcoords": "offset points"}
    places[1].annotate("bits a pixel", (1.02, 1.0), fontsize=9, **above)
    for line, label in enumerate(options.classes):
        if label in losses:
            middle = (line + 0.5) * height
            places[1].text(width * SIDE + 8, middle, f"{losses[label]:.2f}", fontsize=9, va="center")
    write_figure(results.path("density-fashion.png"), figure)


# Report -----------------------------------------------------------------------------------------------------


def report(results: Results) -> None:
    """density-tables.md."""
    told = (
        "Test loss of LU-Net, less is better; of the others what they lose more on the same test rows, ± the "
        "standard error over the rows: above 0, LU-Net is better. Bold is the best."
    )
    text = ["# Densities of real tables", "", told, ""]
    for name, title, make in (
        ("tables", "Tables", real_table),
        ("fashion", "Fashion-MNIST by class, bits a pixel", fashion_table),
    ):
        path = results.path(f"density-{name}.json")
        if path.is_file():
            about = json.loads(path.read_text())
            text += [f"## {title}", "", *make(results.folder), "", f"Measured on {where(about)}", ""]
    path = results.path("density-tables.md")
    write_text(path, "\n".join(text))
    print(f"written to {path}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("part", choices=("tables", "fashion", "pictures", "report"))
    options.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    options.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=len(SEEDS))
    options.add_argument("--classes", nargs="+", type=int, choices=range(10), default=range(10))
    options.add_argument("--epochs", type=int, default=80, help="of Fashion-MNIST")
    options.add_argument(
        "--quick", action="store_true", help="a few steps, nothing tuned: does it run? With --allow-dirty"
    )
    given = options.parse_args()
    if given.quick and not given.allow_dirty:
        raise SystemExit("--quick measures nothing: with --allow-dirty its files go to runs/benchmarks")
    results = open_results(given, threads=1)
    if given.part == "tables":
        tables(given, results)
    elif given.part == "fashion":
        fashion(given, results)
    elif given.part == "pictures":
        pictures(given, results)
    else:
        report(results)


if __name__ == "__main__":
    main()
