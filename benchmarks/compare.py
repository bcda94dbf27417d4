"""Is this tree slower than another? Layers and nets of two versions of the library, timed in turn.

    python benchmarks/compare.py main            the work tree beside the commit that main names
    python benchmarks/compare.py v0.1.0 --seconds 20

The other version is checked out into a temporary git worktree. Each has a process of its own with the same
benchmark code in it, and they take turns: one waits while the other measures. A ratio above 1 is a
regression; the script ends with 1 if any ratio's lower quartile is above ``--limit``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: (D, B) of what is compared.
SIZES = ((32, 128), (64, 8192), (256, 8192), (784, 1024), (1024, 1))


def work(tree: Path) -> None:
    """Measure in a process of its own: a line with a case's name in, a line with its seconds out."""
    sys.path.insert(0, str(tree))
    import torch

    import lunet_fast

    found = Path(lunet_fast.__file__).resolve()
    if not found.is_relative_to(tree.resolve()):
        raise SystemExit(f"{tree} was asked for and {found} was imported; uninstall the other one")
    torch.manual_seed(0)
    runs = dict(cases(lunet_fast))
    calls: dict[str, int] = {}
    print(json.dumps(list(runs)), flush=True)
    for line in sys.stdin:
        name = line.strip()
        if name not in calls:
            runs[name]()
            start = time.perf_counter()
            runs[name]()
            calls[name] = max(1, int(5e-3 / (time.perf_counter() - start)))
        start = time.perf_counter()
        for _ in range(calls[name]):
            runs[name]()
        print((time.perf_counter() - start) / calls[name], flush=True)


def cases(library: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed, by name; nothing but the library's oldest public names."""
    import torch

    for D, B in SIZES:
        layer = library.LUDense(D, activation=library.LeakySoftplus(0.1))
        with torch.no_grad():
            layer.lu.copy_(torch.randn(D, D) * 0.2 / D**0.5)
        x, upstream = torch.randn(B, D, requires_grad=True), torch.randn(B, D)
        y = layer(x).detach()

        def train(layer: Any = layer, x: Any = x, upstream: Any = upstream) -> None:
            x.grad = None
            layer.zero_grad()
            layer(x).backward(upstream)

        no_grad = torch.no_grad()
        yield f"forward + backward, D = {D}, B = {B}", train
        yield f"forward, D = {D}, B = {B}", no_grad(lambda layer=layer, x=x: layer(x))
        yield f"inverse, D = {D}, B = {B}", no_grad(lambda layer=layer, y=y: layer.inverse(y))
        yield f"log-determinant, D = {D}", no_grad(layer.logabsdet)
    flow = library.LUFlow(library.LUNet(64, 4))
    data = torch.randn(256, 64)
    yield "log_prob of a flow, D = 64, M = 4, B = 256", torch.no_grad()(lambda: flow.log_prob(data))
    yield "its training step", lambda: flow.log_prob(data).mean().backward()
    yield "its samples", torch.no_grad()(lambda: flow.sample((256,)))


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary worktree of ``commit``."""
    with tempfile.TemporaryDirectory(prefix="lunet-fast-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        added = subprocess.run([*git, "add", "--detach", str(tree), commit], capture_output=True, text=True)
        if added.returncode:
            raise SystemExit(f"git cannot check out {commit!r}: {added.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False, capture_output=True)


class Worker:
    """A process that measures one tree."""

    def __init__(self, tree: Path) -> None:
        # An editable installation names its folder; the tree's own comes before it.
        # The threads of the one that waits must not spin while the other measures.
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", str(tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tree,
        )
        self.names: list[str] = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a measuring process ended before its time; its message is above")
        return line

    def measure(self, name: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(base: str, seconds: float, limit: float) -> bool:
    """Print a line for each case; whether any is a regression."""
    from lunet_fast.bench.machine import median_and_quartiles
    from lunet_fast.bench.results import seconds_text
    from lunet_fast.training.machine import describe

    worse = False
    with checked_out(base) as tree:
        workers = [Worker(ROOT), Worker(tree)]
        print(f"| case | now | {base} | now / {base} | quartiles |\n|---|---|---|---|---|")
        for name in workers[0].names:
            if name not in workers[1].names:
                print(f"| {name} | not in {base} | | | |")
                continue
            times: list[list[float]] = [[], []]
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or len(times[0]) < 7:
                for i in (0, 1) if len(times[0]) % 2 == 0 else (1, 0):
                    times[i].append(workers[i].measure(name))
            ratio, low, high = median_and_quartiles([a / b for a, b in zip(*times, strict=True)])
            now, before = (seconds_text(median_and_quartiles(each)[0]) for each in times)
            mark = " **slower**" if low > limit else ""
            worse = worse or low > limit
            print(f"| {name} | {now} | {before} | {ratio:.3f}{mark} | {low:.3f} to {high:.3f} |", flush=True)
        for worker in workers:
            worker.close()
    machine = describe()
    print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    return worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base", nargs="?", default="main", help="commit to compare with (default main)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case (default 3)")
    parser.add_argument(
        "--limit", type=float, default=1.05, help="ratio that is no regression (default 1.05)"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work)
    elif compare(options.base, options.seconds, options.limit):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
