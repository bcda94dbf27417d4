"""Whether the kernels are right on this GPU, and how fast: one command, 8 minutes, one table.

    python -m benchmarks.gpu.check          benchmarks/results/DEVICE-DATE.json and .md
    python -m benchmarks.gpu.check --tiny   the same in Triton's interpreter, in sizes that take seconds

First every launcher and the public functions are compared with float64 (``correctness*.py``), in
processes side by side, and what the benchmarks need is compiled. Then one stage after another takes times
(``speed.py``), in order of importance. Each stage is a process: one that fails, hangs or spoils the
device costs only itself, and what it found until then is kept. A stage for which no time is left is named.

Run from the repository, with lunet_fast installed or the repository on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: Seconds for everything, for what runs side by side, and for the large tensors.
BUDGET, ASIDE, LARGE = 480.0, 190.0, 30.0

#: Seconds that a stage may overrun its own by, until it is ended.
GRACE = 10.0

#: Processes that share a stage of checks; the others have one. Compiling takes most of their time.
PARTS = {"stack": 4, "public functions": 4, "inverse": 3, "layer": 3, "gradient": 3, "kinds of nets": 3}
PARTS |= {"LUNet": 2, "scores": 2}

#: Processes that compile ahead for a stage of times.
AHEAD = {"layer": 4, "stack": 3, "training": 4, "inverse": 1}

Row = dict[str, Any]


# --- one stage, in its process --------------------------------------------------------------------------


#: Checks that run side by side, the slowest first.
SIDE_BY_SIDE = (
    *("stack", "public functions", "inverse", "layer", "gradient", "kinds of nets", "LUNet", "scores"),
    *("graphs and streams", "activation"),
)


def checks_side_by_side() -> dict[str, Any]:
    from benchmarks.gpu import correctness, correctness_public

    found = {**correctness.STAGES, **correctness_public.STAGES}
    return {name: found[name] for name in SIDE_BY_SIDE}


def stages() -> dict[str, Any]:
    from benchmarks.gpu import correctness_public, speed

    checks = {**checks_side_by_side(), **correctness_public.ALONE}
    named = {f"check {name}": stage for name, stage in checks.items()}
    return named | {f"time {name}": stage for name, (stage, _) in speed.STAGES.items()}


def run_stage(
    name: str, *, tiny: bool, measure: bool, seconds: float, share: tuple[int, int]
) -> Iterator[Row]:
    """The rows of a stage; an exception is one more row."""
    import torch

    from benchmarks.gpu.common import Place

    device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
    torch.manual_seed(0)
    if device.type == "cuda" and not measure:
        # Compiled ahead beside others: it may run out of memory then, but not the others.
        torch.cuda.set_per_process_memory_fraction(0.06)
    # Fills new memory with NaN; not while times are taken.
    torch.use_deterministic_algorithms(name.startswith("check"), warn_only=True)
    place = Place(device, tiny, measure, time.monotonic() + seconds, share)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in stages()[name](place):
                yield row
                if place.left() < 0:  # checks come by the dozen, and none of them looks at the clock
                    yield {"kind": "skipped", "what": f"{name}: the rest, after {seconds:.0f} s"}
                    break
    except Exception as failure:
        where = traceback.extract_tb(failure.__traceback__)[-1]
        what = f"{type(failure).__name__}: {failure}"[:500]
        yield {
            "kind": "failure",
            "what": name,
            "error": f"{what} ({Path(where.filename).name}:{where.lineno})",
        }
    finally:
        torch.use_deterministic_algorithms(False)


# --- the whole ------------------------------------------------------------------------------------------


def child(name: str, seconds: float, *, share: tuple[int, int] = (0, 1), measure: bool = True) -> list[Row]:
    """The rows that a stage's process gives in ``seconds``, of a share of its sizes."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.gpu.check",
        "--stage",
        name,
        "--seconds",
        str(seconds),
    ]
    command += ["--share", *map(str, share)] + ["--tiny"] * (os.environ.get("TRITON_INTERPRET") == "1")
    command += ["--ahead"] * (not measure)
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    # A kernel that hangs does not look at the deadline.
    killer = threading.Timer(seconds + GRACE, process.kill)
    killer.start()
    try:
        out, error = process.communicate()
    finally:
        killer.cancel()
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if process.returncode != 0:
        said = " ".join(error.strip().splitlines()[-3:])[-500:]
        how = "stopped: out of time" if process.returncode == -9 else f"exit {process.returncode}: {said}"
        rows.append({"kind": "failure", "what": name, "error": how})
    return [{**row, "stage": name} for row in rows]


def whole_run(budget: float) -> list[Row]:
    """Everything on the GPU: checks and compilation side by side, then the stages of times."""
    from benchmarks.gpu import correctness_public, speed

    start = time.monotonic()

    def left() -> float:
        return budget - (time.monotonic() - start)

    def tell(text: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s  {text}", file=sys.stderr, flush=True)

    def aside(job: tuple[str, int, int, bool]) -> list[Row]:
        name, part, parts, measure = job
        seconds = ASIDE - (time.monotonic() - start)
        if seconds < 5:
            return [{"kind": "skipped", "what": f"{name}, part {part + 1} of {parts}"}] if measure else []
        rows = child(name, seconds, share=(part, parts), measure=measure)
        # What is only compiled here fails again, and is told, where it is timed.
        return rows if measure else []

    rows: list[Row] = []
    workers = max(2, min(14, (os.cpu_count() or 2) - 2))
    tell(f"checks and compilation, {workers} processes")
    jobs = [
        (f"check {name}", part, PARTS.get(name, 1), True)
        for name in SIDE_BY_SIDE
        for part in range(PARTS.get(name, 1))
    ]
    jobs += [(f"time {name}", part, parts, False) for name, parts in AHEAD.items() for part in range(parts)]
    with ThreadPoolExecutor(workers) as pool:
        for (name, part, parts, measure), found in zip(jobs, pool.map(aside, jobs), strict=True):
            rows += found
            count = sum(row["kind"] == "check" for row in found)
            wrong = sum(row["kind"] == "failure" or not row.get("ok", True) for row in found)
            tell(
                f"{name}, part {part + 1} of {parts}: "
                + (f"{count} checks, {wrong} wrong" if measure else "compiled")
            )
    for name in correctness_public.ALONE:
        tell(f"check {name}")
        rows += child(f"check {name}", min(LARGE, max(1.0, left() - 15.0)))
    waiting = {name: share for name, (_, share) in speed.STAGES.items()}
    for name in list(waiting):
        seconds = (left() - 15.0) * waiting[name] / sum(waiting.values())
        del waiting[name]
        if seconds < 8:
            rows.append({"kind": "skipped", "what": f"time {name}"})
            continue
        tell(f"time {name}, at most {seconds:.0f} s")
        rows += child(f"time {name}", seconds)
    tell("done")
    return rows


def tiny_run() -> list[Row]:
    """Every stage in this process, in the interpreter."""
    rows = []
    for name in stages():
        for row in run_stage(name, tiny=True, measure=False, seconds=math.inf, share=(0, 1)):
            rows.append({**row, "stage": name})
    return rows


# --- what comes of it -----------------------------------------------------------------------------------


def floors(rows: list[Row]) -> None:
    """Add to every row of times the least that its task can take, ms, and that over its time."""
    rates = {row["what"]: row["rate"] for row in rows if row["kind"] == "ceiling"}
    tf32 = rates.get("tf32")
    flops = {
        "ieee": rates.get("ieee"),
        # Three products in tf32 make one with float32's accuracy.
        "tf32x3": tf32 and tf32 / 3,
        "highest": tf32 and tf32 / 3,
        "tf32": tf32,
        "high": tf32,
    }
    for row in rows:
        if row["kind"] != "time":
            continue
        rate = flops.get(row["precision"])
        if not rates.get("copy") or not rate or not row["bytes"]:
            row["floor ms"] = row["floor / time"] = None
            continue
        row["floor ms"] = max(row["bytes"] / rates["copy"] / 1e6, row["flops"] / rate / 1e9)
        row["floor / time"] = row["ms"] and row["floor ms"] / row["ms"]


def task_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("what", "D", "B", "precision"))


def ratios(rows: list[Row]) -> None:
    """Add to every row of times how many times as long as ours it took."""
    ours = {task_of(row): row["ms"] for row in rows if row["kind"] == "time" and row["contender"] == "ours"}
    for row in rows:
        if row["kind"] == "time":
            base = ours.get(task_of(row))
            row["× ours"] = row["ms"] / base if base and row["ms"] else None


def failures_of(rows: list[Row]) -> list[Row]:
    """The failures, one for each row of times too in which ours was wrong, or raised: what nothing was timed
    of would be missing from the targets without a word. Others may run out of memory."""
    found = [row for row in rows if row["kind"] == "failure"]
    for row in rows:
        if row["kind"] == "time" and row["contender"].startswith("ours"):
            error = "wrong result" if row.get("wrong") else row.get("failed")
            if row.get("graph") is False:
                error = "it cannot be captured as a CUDA graph"
            if error:
                where = f"{row['what']}, D = {row['D']}, B = {row['B']}, {row['precision']}"
                found.append({"kind": "failure", "what": f"{where}: {row['contender']}", "error": error})
    return found


def targets(rows: list[Row]) -> list[Row]:
    """What was to be reached, and the least that was, over D, B and precision, with B ≥ 65,536."""
    from benchmarks.gpu.speed import TARGETS

    found = []
    for what, contender, factor, largest in TARGETS:
        seen = [
            row
            for row in rows
            if row["kind"] == "time" and (row["what"], row["contender"]) == (what, contender)
            and row["D"] <= largest and row["B"] >= 65_536 and row.get("× ours")
        ]  # fmt: skip
        worst = min(seen, key=lambda row: row["× ours"], default=None)
        found.append(
            {
                "what": f"{what}, D ≤ {largest}: {contender} over ours",
                "required": factor,
                "least": worst and worst["× ours"],
                "at": worst and f"D = {worst['D']}, B = {worst['B']}, {worst['precision']}",
                "ok": worst and worst["× ours"] >= factor,
            }
        )
    return found


def markdown(columns: dict[str, str], rows: list[Row]) -> str:
    """A table of these columns: {heading: key}."""

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "**no**"
        return (
            f"{value:.3g}"
            if isinstance(value, float)
            else ""
            if value is None
            else str(value).replace("|", "\\|")
        )

    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell(row.get(key)) for key in columns.values())} |" for row in rows]
    return "\n".join(lines)


def times_table(rows: list[Row]) -> str:
    shown = []
    for row in rows:
        if row["kind"] == "time":
            note = row.get("failed") or ("wrong, not timed" if row.get("wrong") else None)
            shown.append(row | {"time": note or ("not measured" if row["ms"] is None else row["ms"])})
    names = ("what", "D", "B", "precision", "contender", "floor ms", "floor / time", "× ours", "graph")
    columns = {name: name for name in names}
    order = [*list(columns)[:5], "ms", *list(columns)[5:]]
    return markdown({name: "time" if name == "ms" else name for name in order}, shown)


def report(machine: dict[str, Any], rows: list[Row]) -> str:
    """The Markdown file."""
    checks = [row for row in rows if row["kind"] == "check"]
    wrong = [row for row in checks if not row["ok"]]
    lines = [f"# {machine['gpu']}, {machine['date']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in machine.items()]
    lines += ["", f"{len(checks)} checks, {len(wrong)} wrong.", ""]
    lines += [f"- failed: {row['what']}: {row['error']}" for row in failures_of(rows)]
    lines += [f"- not run for lack of time: {row['what']}" for row in rows if row["kind"] == "skipped"]
    lines += [f"- {row['what']}" for row in rows if row["kind"] == "note"]
    same = {name: name for name in ("what", "required", "least", "at", "ok")}
    lines += ["", "## What was to be reached", "", markdown(same, targets(rows))]
    ceilings = [row for row in rows if row["kind"] == "ceiling"]
    lines += ["", "## Ceilings", "", markdown({name: name for name in ("what", "rate", "unit")}, ceilings)]
    lines += [
        *("", "## Times", ""),
        "Medians in milliseconds, the L2 cache flushed before each call. The floor is the bytes at the rate",
        "of the copy or the flops at cuBLAS's (a third of tf32's for highest), whichever takes longer. Small",
        "batches, which may wait for the host, are timed as CUDA graphs (no: could not be captured).",
        *("", times_table(rows)),
        *("", "## Checks", ""),
        markdown({name: name for name in ("what", "error", "limit", "ok")}, checks),
    ]
    return "\n".join([*lines, ""])


def smi() -> str | None:
    """Clocks, power and temperature as nvidia-smi says, now."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(
        f"{name} {value.strip()}"
        for name, value in zip(fields.split(","), done.stdout.split(","), strict=False)
    )


def describe_gpu() -> dict[str, Any]:
    import torch
    import triton

    from benchmarks.machine import describe

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "Triton's interpreter"
    return {"gpu": gpu, "triton": triton.__version__, "cuda": torch.version.cuda, **describe()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="in Triton's interpreter; written only with --out"
    )
    parser.add_argument("--out", type=Path, help="folder for the results (default benchmarks/results)")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (default 480)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    parser.add_argument("--ahead", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"

    import torch

    from benchmarks.machine import RESULTS, write_text
    from lunet_fast import set_backend

    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --tiny runs the same program in Triton's interpreter")
    set_backend("triton")
    if options.stage:
        measure = not (options.ahead or options.tiny)
        share = (options.share[0], options.share[1])
        for row in run_stage(
            options.stage, tiny=options.tiny, measure=measure, seconds=options.seconds, share=share
        ):
            print(json.dumps(row), flush=True)
        return

    machine = {**describe_gpu(), "before": smi()}
    rows = tiny_run() if options.tiny else whole_run(options.budget)
    machine["after"] = smi()
    floors(rows)
    ratios(rows)
    checks = [row for row in rows if row["kind"] == "check"]
    bad = [row for row in checks if not row["ok"]]
    failures = failures_of(rows)
    print(times_table(rows))
    print()
    same = {name: name for name in ("what", "required", "least", "at", "ok")}
    print(markdown(same, targets(rows)))
    print(f"\n{len(checks)} checks, {len(bad)} wrong, {len(failures)} failures")
    for row in bad:
        print(f"wrong: {row['what']}: {row['error']:.2e}, limit {row['limit']:.2e}")
    for row in failures:
        print(f"failed: {row['what']}: {row['error']}")
    for row in rows:
        if row["kind"] == "skipped":
            print(f"not run for lack of time: {row['what']}")
    if options.out or not options.tiny:
        folder = options.out or RESULTS
        name = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-") + f"-{machine['date']}"
        # JSON has no infinity.
        text = json.dumps({"machine": machine, "rows": rows}, indent=1).replace("Infinity", "1e999")
        write_text(folder / f"{name}.json", text + "\n")
        print(f"written to {write_text(folder / f'{name}.md', report(machine, rows))} and .json")
    if bad or failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
