"""``lunet-fast bench``: timings of layers, flows and training steps on this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lunet_fast.cli.options import Device, existing_device
from lunet_fast.cli.output import Output, fail, wide_console
from lunet_fast.cli.signatures import grouped

Suites = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SUITE]...",
        help="`layers`: one layer beside what others offer. `cached`: one whose parameters stay as they are. "
        "`claims`: is the inverse O(D²) and the log-determinant O(D)? `stacks`: flows of M layers. "
        "`training`: steps of the recommender.",
        show_default="layers",
    ),
]


@grouped
def bench_command(
    *,
    suites: Suites = None,
    scale: Annotated[
        str, typer.Option(metavar="quick|all", help="A few sizes in about a minute a suite, or every size.")
    ] = "quick",
    seconds: Annotated[
        float | None,
        typer.Option(help="For one comparison; three rounds are made in any case.", show_default="3, all: 4"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="PyTorch's")] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="Of weights and rows.")] = "float32",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write JSON, Markdown and plots there.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What an earlier --out wrote: its ratios are shown beside the new."),
    ] = None,
    output: Output,
) -> None:
    """Time LU layers, flows and training steps on this machine, beside what else there is.

    Contenders take turns in one process, after each has been compared with float64; a result is printed
    only if all of them agree. "times ours" above 1 means that LUDense is the faster one; "times the floor"
    is the distance from what this machine's matrix products and memory allow. Peers that are not installed
    are named: `pip install "lunet-fast[bench]"` brings them.

    Examples:

        lunet-fast bench

        lunet-fast bench claims --scale all --out results

        lunet-fast bench layers stacks --device cuda --dtype bfloat16
    """
    import torch

    from lunet_fast.bench import plots, results
    from lunet_fast.bench.contest import CheckFailed
    from lunet_fast.cli.progress import counted
    from lunet_fast.training.files import write_text

    chosen = suites or ["layers"]
    for name in chosen:
        _check_choice(f"{name!r} is no suite", name, results.SUITES)
    _check_choice(f"--scale {scale}", scale, results.SCALES)
    _check_choice(f"--dtype {dtype}", dtype, ("float32", "bfloat16"))
    if threads is not None:
        torch.set_num_threads(threads)
    console = wide_console()
    try:
        place = existing_device(device)
        for name in chosen:
            file = results.file_name(name, place, dtype)
            before = None if baseline is None else results.Result.load(baseline / file)
            contests = len(results.SUITES[name].specs(scale))
            with counted(contests, "comparisons", quiet=output.quiet) as tell:
                result = results.run_suite(
                    name,
                    scale,
                    place,
                    getattr(torch, dtype),
                    seconds=seconds,
                    told=partial(_tell_contest, tell),
                )
            _show_suite(console, result, before)
            if out is not None:
                path = result.save(out / file)
                write_text(path.with_suffix(".md"), results.markdown(result))
                plots.draw(result, path.with_suffix(".png"))
                output.line(f"written to {path}, .md and .png")
    except CheckFailed as error:
        fail(error, 1)
    except (OSError, ValueError, RuntimeError) as error:
        fail(error, 2)


def _tell_contest(tell: Callable[..., None], spec: Any, rows: list[Any]) -> None:
    tell(1, f"{spec.suite}: {spec}")


def _check_choice(told: str, given: str, known: Collection[str]) -> None:
    if given not in known:
        raise typer.BadParameter(f"{told}: choose from {', '.join(known)}")


def _show_suite(console: Console, result: Any, before: Any) -> None:
    from lunet_fast.bench import claims, results

    for spec, rows in result.groups().items():
        table = Table(title=str(spec), title_justify="left")
        for place, heading in enumerate((*results.HEADER, *(["ratio before"] if before else []))):
            table.add_column(heading, justify="left" if place == 0 else "right")
        for row in rows:
            table.add_row(*results.cells(row, before), style="bold" if row.ours else None)
        console.print(table)
    reasons = {(name, why) for entry in result.missing.values() for name, why in entry.items()}
    for name, why in sorted(reasons):
        typer.echo(f"{name}: {why}")
    if result.counts:
        typer.echo("\n".join(claims.verdicts(result.rows, result.counts)))
    typer.echo(result.where())
