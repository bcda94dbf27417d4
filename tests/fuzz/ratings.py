"""Feeds changed files to everything that reads files of others, and counts how that ends.

    python tests/fuzz/ratings.py --inputs 100000 --seed 0

An input ends well in a result, whose invariants are checked, or in the error of that reader, which must name
the file. Everything else is a failure: another exception, a message without the file's name or with a control
character, a process that dies, takes more than --seconds for one input or needs more than --megabytes.
Failures are kept, and the exit code is 1; ``--again FILE`` reads one of them, with its traceback.

With atheris (the extra ``fuzz``, for some Pythons on Linux and macOS) inputs are chosen by which lines
of our readers they reach; without it, and with ``--no-guide``, each is a few random changes of a good file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if sys.path[0] == str(Path(__file__).parent):
    sys.path[0] = str(ROOT)

from tests.fuzz import inputs  # noqa: E402
from tests.fuzz.inputs import CASES  # noqa: E402
from tests.fuzz.reader import Failure, Reader  # noqa: E402

GUIDED = [
    *(
        f"lunet_fast.recsys.data.{name}"
        for name in ("archives", "limits", "movielens", "movielens_tables", "parquet_sizes", "parquet_table")
    ),
    *(f"lunet_fast.recsys.data.{name}" for name in ("ratings", "table", "text_table", "values")),
    "lunet_fast.training.files",
    "lunet_fast.recsys.model.model_files",
    "lunet_fast.cli.predict",
    "lunet_fast.cli.recommend",
]
MAX_INPUT = 1 << 18
LIMIT_BYTES = 64 << 20
"""$LUNET_FAST_MAX_BYTES while fuzzing."""
_SLOT = struct.Struct("<Qd I")  # inputs begun, when the last was, its bytes
_KINDS = {"ratings": ["ratings", "pairs", "users", "like"], "archives": ["archive"], "models": ["model"]}


# ------------------------------------------------------------------------------------------------------------
# A process that reads inputs until there are enough; the one that watches it


def work(arguments: argparse.Namespace) -> None:
    """Read inputs of ``--kind`` and write a line of the log for each; the input at hand lies in the slot."""
    guide = None
    if not arguments.no_guide:
        with contextlib.suppress(ImportError):
            import atheris as guide  # type: ignore[import-untyped,unused-ignore,no-redef]
    folder = Path(arguments.work)
    os.environ["LUNET_FAST_MAX_BYTES"] = str(LIMIT_BYTES)
    os.environ.pop("LUNET_FAST_DATA", None)
    if guide is not None:
        with guide.instrument_imports(include=GUIDED):
            reader = Reader(folder)
    else:
        reader = Reader(folder)
    import torch

    torch.set_num_threads(1)
    seeds = inputs.seed_inputs(_KINDS[arguments.kind], (folder / "model.seed").read_bytes())
    for data in seeds:
        reader.ending(data)  # so that what is imported on use is there before memory is bounded
    before = _status("VmSize")
    cap = (before << 10) + (arguments.megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
    with open(folder / "slot", "r+b") as stream:
        slot = mmap.mmap(stream.fileno(), 0)
    log = open(folder / "log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    log.write(f"start {_status('VmRSS')}\n")
    done = 0

    def one(data: bytes) -> None:
        nonlocal done
        data = data[:MAX_INPUT]
        done += 1
        slot[_SLOT.size : _SLOT.size + len(data)] = data
        begin = time.monotonic()
        slot[: _SLOT.size] = _SLOT.pack(done, begin, len(data))
        kind = CASES[data[0] % len(CASES)].kind if data else "ratings"
        try:
            ending = reader.ending(data)
        except Failure as failure:
            ending = f"FAILED {failure}"
            _keep(Path(arguments.keep), data, str(failure))
        seconds = time.monotonic() - begin
        log.write(json.dumps([kind, ending[:300], round(seconds, 4), _status("VmHWM")]) + "\n")
        if done >= arguments.inputs:
            log.close()
            slot[: _SLOT.size] = _SLOT.pack(done, 0.0, 0)
            os._exit(0)

    if guide is None:
        rng = random.Random(arguments.seed)
        pool = list(seeds)
        while True:
            data = _of_kind(inputs.changed(rng.choice(pool), rng), arguments.kind)
            if len(data) < 4096 and rng.random() < 0.05:  # changes of changes
                pool[len(seeds) :] = [*pool[len(seeds) :], data][-200:]
            one(data)

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        start = _of_kind(data, arguments.kind) if rng.random() < 0.5 else rng.choice(seeds)
        try:
            return inputs.changed(start, rng, most)
        except Exception:
            traceback.print_exc()  # atheris would not say
            raise

    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for data in seeds:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    guide.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-seed={arguments.seed + 1}",
            f"-max_len={MAX_INPUT}",
            "-timeout=3600",  # of its own; whoever watches has a shorter one
            "-rss_limit_mb=0",
            "-verbosity=0",
            "-detect_leaks=0",
            f"-artifact_prefix={folder}/",
        ],
        lambda data: one(_of_kind(data, arguments.kind)),
        custom_mutator=mutator,
    )
    guide.Fuzz()


def _of_kind(data: bytes, kind: str) -> bytes:
    """``data`` with a first byte that stands for a case of the kind."""
    cases = [n for n, case in enumerate(CASES) if case.kind in _KINDS[kind]]
    first = data[0] if data else 0
    return data if data and first in cases else bytes([cases[first % len(cases)]]) + data[1:]


def _status(field: str) -> int:
    """KiB of this process: VmSize, VmRSS, VmHWM. Linux; elsewhere the most that was resident."""
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            return next(int(line.split()[1]) for line in stream if line.startswith(field))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _keep(folder: Path, data: bytes, why: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(data).hexdigest()[:16]
    (folder / name).write_bytes(data)
    (folder / f"{name}.txt").write_text(why + "\n", encoding="utf-8", errors="backslashreplace")


def watch(arguments: argparse.Namespace, kind: str, count: int, folder: Path) -> dict[str, Any]:
    """Have ``count`` inputs of ``kind`` read, in a new process after each that dies or hangs."""
    (folder / "slot").write_bytes(bytes(_SLOT.size + MAX_INPUT))
    (folder / "log").write_text("", encoding="utf-8")
    stopped: list[tuple[str, str]] = []
    begun = time.monotonic()
    left = count
    turn = 0
    while left > 0:
        command = [sys.executable, __file__, "--work", str(folder), "--kind", kind, "--inputs", str(left)]
        command += ["--seed", str(arguments.seed + 1000 * turn), "--keep", str(arguments.keep)]
        command += ["--megabytes", str(arguments.megabytes)] + ["--no-guide"] * arguments.no_guide
        turn += 1
        with open(folder / "said", "w+b") as said, open(folder / "slot", "r+b") as stream:
            slot = mmap.mmap(stream.fileno(), 0)
            slot[: _SLOT.size] = _SLOT.pack(0, 0.0, 0)
            process = subprocess.Popen(command, stdout=said, stderr=said, cwd=folder)
            why = ""
            while process.poll() is None:
                time.sleep(0.2)
                number, since, _ = _SLOT.unpack(slot[: _SLOT.size])
                if since and time.monotonic() - since > arguments.seconds:
                    why = f"hang: more than {arguments.seconds:g} s"
                    process.kill()
                    process.wait()
            number, since, size = _SLOT.unpack(slot[: _SLOT.size])
            data = bytes(slot[_SLOT.size : _SLOT.size + size])
            said.seek(0)
            text = said.read().decode("utf-8", "replace")
        if not since and process.returncode == 0:
            break
        if number == 0:
            raise SystemExit(f"the process that reads ended before its first input:\n{text[-3000:]}")
        why = why or f"died with exit code {process.returncode}: {text.strip()[-1500:]}"
        _keep(Path(arguments.keep), data, why)
        stopped.append((CASES[data[0] % len(CASES)].kind if data else "ratings", why))
        left -= number
    found = _summary(folder / "log", stopped, time.monotonic() - begun)
    if not arguments.no_guide:
        found["inputs_with_new_coverage"] = len(list((folder / "corpus").iterdir()))
    return found


def _summary(log: Path, stopped: list[tuple[str, str]], seconds: float) -> dict[str, Any]:
    endings: dict[str, Counter[str]] = {}
    failures: Counter[str] = Counter(why for _, why in stopped)
    worst, peak, start = 0.0, 0, 0
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("start"):
            start = start or int(line.split()[1])
            continue
        kind, ending, took, resident = json.loads(line)
        if ending.startswith("FAILED"):
            failures[ending.removeprefix("FAILED ")] += 1
            ending = "FAILED"
        endings.setdefault(kind, Counter())[ending] += 1
        worst, peak = max(worst, took), max(peak, resident)
    for kind, why in stopped:
        endings.setdefault(kind, Counter())[why.split(":")[0].split(" with")[0]] += 1
    return {
        "inputs": sum(sum(counts.values()) for counts in endings.values()),
        "endings": {kind: dict(sorted(counts.items())) for kind, counts in sorted(endings.items())},
        "failures": dict(failures.most_common(50)),
        "failed": sum(failures.values()),
        "worst_seconds": worst,
        "peak_megabytes": round(peak / 1024, 1),
        "megabytes_before": round(start / 1024, 1),
        "seconds": round(seconds, 1),
    }


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="files of ratings, pairs and users")
    parser.add_argument("--archives", type=int, default=5_000, help="zips of a MovieLens data set")
    parser.add_argument("--models", type=int, default=5_000, help="model files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="most for one input")
    parser.add_argument(
        "--megabytes", type=int, default=2048, help="most address space beyond that at the start"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz-ratings.json")
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "runs" / "fuzz", help="folder for inputs that fail"
    )
    parser.add_argument("--no-guide", action="store_true", help="random changes even where atheris is there")
    parser.add_argument("--again", type=Path, help="read this kept input once more, with its traceback")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = _parsed()
    if arguments.work:
        work(arguments)
        return 1
    arguments.keep = arguments.keep.resolve()
    if arguments.again is not None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(Reader(Path(folder)).ending(arguments.again.read_bytes()))
            except Failure:
                traceback.print_exc()
                return 1
        return 0
    try:
        guide: str | None = version("atheris")
    except PackageNotFoundError:
        guide = None
    if guide is None and not arguments.no_guide:
        print("atheris is not installed (the extra fuzz; not for every Python): random changes instead")
        arguments.no_guide = True
    with tempfile.TemporaryDirectory(prefix="lunet-fast-fuzz-") as name:
        folder = Path(name)
        from lunet_fast.training.machine import describe
        from tests.cli.invoke import save_model

        save_model(folder / "seed")
        (folder / "model.seed").write_bytes((folder / "seed" / "model.safetensors").read_bytes())
        parts = {}
        for kind, count in (
            ("ratings", arguments.inputs),
            ("archives", arguments.archives),
            ("models", arguments.models),
        ):
            if count > 0:
                (folder / kind).mkdir()
                (folder / kind / "model.seed").write_bytes((folder / "model.seed").read_bytes())
                parts[kind] = watch(arguments, kind, count, folder / kind)
                print(kind, json.dumps(parts[kind], indent=1), flush=True)
    report = {
        "command": f"python tests/fuzz/ratings.py --inputs {arguments.inputs} "
        f"--archives {arguments.archives} --models {arguments.models} --seed {arguments.seed}"
        + " --no-guide"
        * arguments.no_guide,
        "machine": describe(),
        "seed": arguments.seed,
        "inputs": sum(part["inputs"] for part in parts.values()),
        "failed": sum(part["failed"] for part in parts.values()),
        "most_seconds": arguments.seconds,
        "most_megabytes": arguments.megabytes,
        "most_bytes_of_a_file": LIMIT_BYTES,
        "guided_by": None if arguments.no_guide else f"atheris {guide}",
        "versions": {name: version(name) for name in ("pandas", "pyarrow", "safetensors")},
        **parts,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, arguments.out)
    print(f"{report['inputs']:,} inputs, {report['failed']:,} failed; written to {arguments.out}")
    if report["failed"]:
        print(f"kept in {arguments.keep}: read one again with --again FILE")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
