"""Time other tiles than the table's on this GPU, and keep the ones that are faster.

    python -m benchmarks.gpu.tune_kernels tiles.json --features 64 256     writes tiles.json
    LUNET_FAST_TILES=tiles.json python train.py                        uses it

Every candidate must give the table's result before it is timed. A candidate is taken if it is faster by
more than ``--gain``; what it was measured on is in the file. Each has to be compiled, and all would take an
hour: those most like the table's come first, and each job has its share of ``--minutes``. The products of a
layer, of its weight's gradient and of its inverse are tuned, in the arithmetic that
torch.get_float32_matmul_precision() asks for and, with ``--bfloat16``, in bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.common import FAMILY, Place, normwise, packed
from benchmarks.machine import describe, write_text
from lunet_fast.kernels import gradient, layer, matrix, solve, tiles
from lunet_fast.kernels.inverse import layer_inverse
from lunet_fast.kernels.tiles import Tile
from lunet_fast.ops import triton

#: The same product in another tile differs by the order of its sums.
AGREES = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-3}


#: How many ``jobs`` gives.
JOBS = 3


class Job(NamedTuple):
    """A call of the table and what to launch with its answer."""

    call: str
    run: Callable[[], Tensor]
    table: Tile
    candidates: list[Tile]


def products(D: int, *, tiny: bool) -> list[Tile]:
    """Tiles of a product of rows by a D×D matrix."""
    widest = max(16, 1 << (D - 1).bit_length())
    sizes = itertools.product((32, 64, 128), (16, 32, 64, 128, 256), (16, 32, 64), (4, 8), (2, 3, 4))
    found = [Tile(*size) for size in sizes if size[1] <= widest and size[2] <= widest]
    return found[:2] if tiny else found


def jobs(place: Place, D: int, rows: int, dtype: torch.dtype, precision: str) -> Iterator[Job]:
    """What is tuned for D features."""
    architecture = tiles.architecture(torch.empty(0, device=place.device))
    parameters = packed(place, D)
    weight, constant = matrix.compose(parameters.lu, parameters.sign, None, dtype)
    x = place.randn(1, rows, D).to(dtype)

    def forward() -> Tensor:
        return layer.layer_forward(
            *(x, weight, parameters.bias, FAMILY),
            logabsdet=True,
            save=False,
            precision=precision,
            constant=constant,
        )[0]

    for function, run in (
        (tiles.layer_tile, forward),
        (tiles.weight_gradient_tile, lambda: gradient.weight_gradient(x, x, precision=precision)),
    ):
        arguments = (D, dtype, precision, architecture)
        yield Job(
            tiles.call_name(function.__name__, *arguments),
            run,
            function(*arguments),
            products(D, tiny=place.tiny),
        )

    exact = "ieee" if precision == "ieee" else "tf32x3"
    inverses, _ = solve.invert_blocks(parameters.lu, parameters.sign, block=tiles.substitution_block(D))

    def inverse() -> Tensor:
        return layer_inverse(
            *(x, parameters.lu, inverses, parameters.bias, FAMILY),
            permutation=None,
            logabsdet=True,
            save=False,
            precision=exact,
            constant=constant,
        )[0]

    table = tiles.substitution_tile(D, exact, architecture)
    sizes = itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3))
    candidates = [table._replace(rows=r, warps=w, stages=s) for r, w, s in sizes]
    yield Job(
        tiles.call_name("substitution_tile", D, exact, architecture),
        inverse,
        table,
        candidates[:2] if place.tiny else candidates,
    )


def nearest_first(job: Job) -> list[Tile]:
    """The candidates that differ from the table's tile, those first that differ in least."""
    others = [tile for tile in job.candidates if tile != job.table]
    return sorted(others, key=lambda tile: sum(a != b for a, b in zip(tile, job.table, strict=True)))


def best(place: Place, job: Job, tolerance: float, gain: float, until: float) -> tuple[Tile, float] | None:
    """The fastest candidate and how many times as fast as the table's it is, if by more than ``gain``, of
    those that the time until then is enough for."""
    expected = job.run().double()
    before = place.milliseconds(job.run)
    chosen: tuple[Tile, float] | None = None
    candidates = nearest_first(job)
    for number, tile in enumerate(candidates):
        if time.monotonic() > until:
            print(f"  {len(candidates) - number} of {len(candidates)} not tried", file=sys.stderr)
            break
        tiles.use_tuned({job.call: tile})
        try:
            agrees = normwise(job.run(), expected) <= tolerance
            after = place.milliseconds(job.run) if agrees else None
        except Exception as error:  # too much shared memory, or what the compiler refuses
            print(f"  {tile}: {type(error).__name__}", file=sys.stderr)
            continue
        finally:
            tiles.use_tuned({})
        if not agrees:
            print(f"  {tile}: another result", file=sys.stderr)
        elif before and after and before / after > max(gain, chosen[1] if chosen else 0.0):
            chosen = tile, before / after
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--gain", type=float, default=1.03, help="least speed-up that counts")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--tiny", action="store_true", help="a walk through the interpreter, without times")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("no CUDA device: tiles are tuned on the GPU that will use them")
    place = Place(device, tiny=options.tiny, measure=not options.tiny, deadline=float("inf"))
    dtype = torch.bfloat16 if options.bfloat16 else torch.float32
    precision = triton.precision_of(torch.empty(0, device=device))
    found: dict[str, Any] = {}
    end, left = time.monotonic() + 60.0 * options.minutes, JOBS * len(options.features)
    for D in options.features:
        for job in jobs(place, D, options.rows, dtype, precision):
            tolerance = 1e-2 if dtype == torch.bfloat16 else AGREES[precision]
            now = time.monotonic()
            better = best(place, job, tolerance, options.gain, now + (end - now) / left)
            left -= 1
            said = f"{better[1]:.2f} times as fast with {better[0]}" if better else "the table's tile stays"
            print(f"{job.call}: {said}", flush=True)
            if better:
                found[job.call] = list(better[0])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    text = json.dumps({"device": name, "machine": describe(), "tiles": found}, indent=1)
    print(f"{len(found)} tiles written to {write_text(options.out, text)}")


if __name__ == "__main__":
    main()
