"""What training on a stream costs against the number of ratings, users and items and against D.

    python benchmarks/scale.py             12 minutes: results/scale.{json,png} and scale.md
    python benchmarks/scale.py --quick     a hundredth of the sizes, into runs/benchmarks
    python benchmarks/scale.py --render    the page and the figure anew from scale.json and sharding.json

Each size is made by ``lunet-fast data synth`` and trained for one epoch in a process of its own, whose peak
of resident memory is the operating system's figure; the test part and a full ranking of a sample of users are
evaluated in it too. One thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sharding
from lunet_fast.training.figures import BLUE, new_figure, plain
from lunet_fast.training.files import write_figure
from machine import RESULTS, ROOT, open_results, parser, write_text

PAGE = ROOT / "benchmarks" / "scale.md"

USERS, ITEMS, SIZE = 200_000, 90_000, 16
RATINGS = (320_000, 1_000_000, 3_200_000, 10_000_000, 32_000_000)
AT = 3_200_000
"""Ratings where users, items or D vary."""

CONTRASTS: dict[str, list[dict[str, int]]] = {
    "ratings": [{"ratings": n} for n in RATINGS],
    "users": [{"users": n} for n in (6_300, 20_000, 63_000, 200_000, 630_000)],
    "items": [{"items": n} for n in (2_800, 9_000, 28_000, 90_000, 280_000)],
    "D": [{"size": n} for n in (4, 8, 16, 32, 64, 128)],
}


def measure(path: Path, size: int) -> dict[str, Any]:
    """One epoch and the evaluation, in this process."""
    import resource

    import torch

    from lunet_fast.recsys.data.streaming import RatingStream
    from lunet_fast.recsys.model.config import recipe
    from lunet_fast.recsys.model.streamed_training import STREAM_SETTINGS, train_stream
    from lunet_fast.training.loop import Progress

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    libraries = peak()
    began = time.perf_counter()
    stream = RatingStream.open(path, seed=0)
    opened = time.perf_counter() - began

    class Clock(Progress):
        def start(self, phase: str, epochs: int, steps: int, done: int) -> None:
            self.began = time.perf_counter()

        def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
            self.ended = time.perf_counter()

    clock = Clock()
    settings = {"members": 1, "embedding_size": size, "epochs": 1, "batch_size": 8192, "l2_latent": 0.01}
    config = recipe("best", stream.n_rows, **{**STREAM_SETTINGS, **settings})
    result = train_stream(stream, config, progress=clock)
    trained = result.curve.seconds
    return {
        "rows": len(stream),
        "train_rows": stream.n_rows,
        "D": 2 * size,
        "open_seconds": opened,
        "train_seconds": trained,
        "test_seconds": clock.ended - clock.began - trained,
        "ranking_seconds": time.perf_counter() - clock.ended,
        "ranked_users": result.metrics["full_users"],
        "seconds_a_rating": trained / stream.n_rows,
        "test_mse": result.metrics["test_mse"],
        "parameters": result.metrics["parameters"],
        "peak_bytes": peak(),
        "library_bytes": libraries,
        "file_bytes": path.stat().st_size,
        "threads": torch.get_num_threads(),
    }


def run(quick: bool, remark: str) -> dict[str, Any]:
    rows = []
    shrink = 100 if quick else 1
    with tempfile.TemporaryDirectory() as folder:
        for contrast, cases in CONTRASTS.items():
            for case in cases:
                at = {"users": USERS, "items": ITEMS, "ratings": AT, "size": SIZE, **case}
                sizes = {name: max(200, at[name] // shrink) for name in ("users", "items", "ratings")}
                name = "-".join(str(sizes[key]) for key in sizes)
                path = Path(folder) / f"{name}.parquet"
                began = time.perf_counter()
                if not path.exists():
                    options = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
                    command = [sys.executable, "-m", "lunet_fast", "data", "synth", *options, "-o", str(path)]
                    subprocess.run(command, check=True, capture_output=True)
                made = time.perf_counter() - began
                command = [sys.executable, __file__, "--measure", str(path), str(at["size"])]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                values = json.loads(done.stdout.splitlines()[-1])
                rows.append({"contrast": contrast, **sizes, "synth_seconds": made, **values})
                print(contrast, case, f"{values['seconds_a_rating'] * 1e6:.2f} µs a rating,",
                      f"{values['peak_bytes'] / 2**30:.2f} GiB", flush=True)  # fmt: skip
                if contrast == "ratings" and at["ratings"] != AT:
                    path.unlink()
    return {"quick": quick, "remark": remark, "rows": rows}


def page(result: dict[str, Any]) -> str:
    """The results as Markdown, and the arithmetic of 10⁹ ratings from them."""
    rows = result["rows"]
    lines = [
        "# Training on a stream: cost against size",
        "",
        "Made by `python benchmarks/scale.py`; every row is one epoch of `lunet-fast train --stream` with "
        "one member, two layers, batch 8192 and one thread, on a file of `lunet-fast data synth`, in a "
        f"process of its own. {result['machine']['processor']}, {result['machine']['date']}.",
        *(["", result["remark"]] if result.get("remark") else []),
        "",
        "![cost and memory against ratings, users, items and D](results/scale.png)",
        "",
        "| varied | ratings | users | items | D | file | opened, M rows/s | µs a training rating | test pass "
        "| ranking of users | peak memory | test MSE |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['contrast']} | {row['ratings']:,} | {row['users']:,} | {row['items']:,} | {row['D']} "
            f"| {row['file_bytes'] / 1e6:.0f} MB | {row['rows'] / row['open_seconds'] / 1e6:.1f} "
            f"| {row['seconds_a_rating'] * 1e6:.2f} | {row['test_seconds']:.1f} s "
            f"| {row['ranking_seconds'] / row['ranked_users'] * 1e3:.0f} ms each "
            f"| {row['peak_bytes'] / 2**30:.2f} GiB | {row['test_mse']:.3f} |"
        )
    by_ratings = [row for row in rows if row["contrast"] == "ratings"]
    from_one = [row for row in by_ratings if row["ratings"] >= (1_000_000 if not result["quick"] else 0)]
    costs = [row["seconds_a_rating"] for row in from_one]
    largest = by_ratings[-1]
    spread = max(costs) / min(costs) - 1
    lines += [
        "",
        f"From {from_one[0]['ratings']:,} to {largest['ratings']:,} ratings the cost of a rating varies by "
        f"{spread:.0%} (largest over smallest), and the peak memory from "
        f"{min(r['peak_bytes'] for r in from_one) / 2**30:.2f} to "
        f"{max(r['peak_bytes'] for r in from_one) / 2**30:.2f} GiB, of which the libraries are "
        f"{largest['library_bytes'] / 2**30:.2f}.",
        "",
        *_extrapolation(largest),
        "",
        *sharding.section(json.loads((RESULTS / "sharding.json").read_text(encoding="utf-8"))),
    ]
    return "\n".join(lines) + "\n"


def _extrapolation(row: dict[str, Any]) -> list[str]:
    """10⁹ ratings of 10 M users and 1 M items, k 64."""
    users, items, k, layers, ratings, batch = 10_000_000, 1_000_000, 64, 2, 10**9, 65_536
    d = 2 * k
    table = (users + items) * k * 4
    bytes_a_row = row["file_bytes"] / row["rows"]
    forward = 2 * layers * d * d
    flops = 3 * forward
    touched = 2 * batch * k * 4
    net = layers * (d * d + d) * 4
    reads = row["rows"] / row["open_seconds"]
    return [
        "## 10⁹ ratings, by arithmetic",
        "",
        f"Take {users:,} users, {items:,} items, k = {k} (D = {d}), M = {layers} layers, one member.",
        "",
        f"- **Bytes of the model.** Tables: ({users:,} + {items:,}) · {k} · 4 B = {table / 1e9:.2f} GB; with "
        f"Adam's two moments {3 * table / 1e9:.2f} GB, biases and counts "
        f"{(users + items) * (3 * 4 + 2 * 8) / 1e9:.2f} GB more; the network {net / 1e3:.0f} kB. That fits "
        "one machine of 16 GB, or one GPU; where it does not, `--shard-tables` divides the tables (below).",
        f"- **Bytes of the ratings.** {bytes_a_row:.1f} B a rating in Parquet (measured, with times) = "
        f"{ratings * bytes_a_row / 1e9:.0f} GB on disk, none of it in memory but one shuffle buffer. At "
        f"{reads / 1e6:.1f} M rows/s read and checked (measured, one core) a pass takes "
        f"{ratings / reads / 60:.0f} min.",
        f"- **Flops.** A pair costs M · 2 D² = {forward:,} forward and twice that backward: {flops:,} flops, "
        f"{flops * ratings / 1e12:,.0f} Tflop an epoch. At 50 Gflop/s of one core in such products "
        f"{flops * ratings / 50e9 / 3600:.1f} core hours; at 20 Tflop/s of a GPU in float32 "
        f"{flops * ratings / 20e12:.0f} s, so that there reading and the tables decide.",
        f"- **Measured.** {row['seconds_a_rating'] * 1e6:.2f} µs a rating with D = {row['D']} at "
        f"{row['ratings']:,} ratings: an epoch of 10⁹ such is {row['seconds_a_rating'] * 1e9 / 3600:.2f} "
        "core hours, provided that the cost stays as flat as above.",
        f"- **Network.** With data-parallel processes and dense gradients each step would move the tables, "
        f"{table / 1e9:.2f} GB, which no network bears; with sparse gradients the rows of the batch, at most "
        f"2 · {batch:,} · {k} · 4 B = {touched / 1e6:.0f} MB at batch {batch:,}, and the network's "
        f"{net / 1e3:.0f} kB. Over 10 Gbit/s that is {touched * 8 / 10e9 * 1e3:.0f} ms a step, "
        f"{ratings / batch * touched * 8 / 10e9 / 60:.0f} min an epoch: less than the arithmetic of one "
        "core, more than that of a GPU, so several GPUs want a faster network, or tables that are divided.",
        "",
        "None of this was run at 10⁹: it is what the measured rows and the formulas give.",
    ]


def draw(result: dict[str, Any], path: Path) -> None:
    figure = new_figure(9.2, 4.6)
    axes = figure.subplots(2, len(CONTRASTS), sharey="row")
    for column, contrast in enumerate(CONTRASTS):
        rows = [row for row in result["rows"] if row["contrast"] == contrast]
        x = [row[contrast] for row in rows]
        for line, (label, values) in enumerate(
            (
                ("µs a training rating", [row["seconds_a_rating"] * 1e6 for row in rows]),
                ("peak memory, GiB", [row["peak_bytes"] / 2**30 for row in rows]),
            )
        ):
            axis = axes[line][column]
            axis.plot(x, values, "o-", color=BLUE)
            axis.set_xscale("log")
            plain(axis)
            axis.set_xlabel(contrast)
            if column == 0:
                axis.set_ylabel(label)
    # After all are drawn: the panels of a line share their limits.
    for axis in axes[:, 0]:
        axis.set_ylim(bottom=0)
    write_figure(path, figure)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--render", action="store_true")
    options.add_argument("--remark", default="", help="what the reader must know of this run")
    options.add_argument("--measure", nargs=2, help="FILE and k: one size, in this process")
    chosen = options.parse_args()
    if chosen.measure:
        print(json.dumps(measure(Path(chosen.measure[0]), int(chosen.measure[1]))))
        return
    folder = RESULTS
    if not chosen.render:
        chosen.allow_dirty = chosen.allow_dirty or chosen.quick  # both are trials
        results = open_results(chosen, threads=1)
        results.write("scale", run(chosen.quick, chosen.remark))
        folder = results.folder
    result = json.loads((folder / "scale.json").read_text())
    draw(result, folder / "scale.png")
    write_text(PAGE if folder == RESULTS else folder / "scale.md", page(result))


if __name__ == "__main__":
    main()
