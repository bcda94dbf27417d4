"""Feeds hostile files to everything that reads back files of ours, and counts how that ends.

    python tests/fuzz/files.py --inputs 20000 --seed 0

Kinds: models and their sequences, flows, checkpoints of both trainings, settings and ``config.json``,
journals of ``tune``, tables for a density. Most are whole files with the right digest and wrong contents
(:mod:`tests.fuzz.hostile`). An input ends well in a result that can be used, or in that reader's error,
which names the file and is fit for a terminal. Everything else is a failure: another exception, a process
that dies, one input that takes more than --seconds of the processor, or more memory than twice the file and
512 MiB.

Each input is a number: ``--again N`` reads that one once more, with its traceback. The exit code is 1 where
one failed. Results go to ``benchmarks/results/fuzz-files.json``.
"""

from __future__ import annotations

import argparse
import contextlib
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
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
if sys.path[0] == str(Path(__file__).parent):
    sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "benchmarks"))

from tests.fuzz import hostile  # noqa: E402
from tests.fuzz.reader import Failure  # noqa: E402

MOST_OVER_FILE = 512 << 20
"""Bytes that reading a file may take beside twice its size."""
ADDRESS_SPACE = 3 << 30
LIMIT_BYTES = 64 << 20
"""$LUNET_FAST_MAX_BYTES while fuzzing."""
SHARES = {"settings": 4, "table": 4, "flow": 4, "model": 4, "journal": 2, "checkpoint": 2}
"""Of the kinds among the inputs: those that take longest are fewer."""
MOST_WAITING = 20
"""Times --seconds by the clock that an input may take beside other programs, which have the processor."""
_SLOT = struct.Struct("<qdd")  # the input at hand, and when it began: by the clock, by the processor


class Kind(NamedTuple):
    """One kind of file: good ones by name, how they are changed and read, and what a refusal is."""

    seeds: dict[str, bytes]
    change: Callable[[str, bytes, random.Random], bytes]
    read: Callable[[Path], None]
    refusals: tuple[type[Exception], ...]


def _by_contents(change: Callable[[bytes, random.Random], bytes]) -> Callable[..., bytes]:
    return lambda name, data, rng: change(data, rng)


class Files:
    """The kinds, with seeds made in ``folder``, where inputs are written too."""

    def __init__(self, folder: Path) -> None:
        from lunet_fast.density.data_limits import DataError
        from lunet_fast.training.files import CheckpointError, RunFolderError
        from lunet_fast.training.loop import DivergenceError

        self.folder = folder / "input"
        seeds = _Seeds(folder)
        tensors = _by_contents(hostile.changed_safetensors)
        self.kinds = {
            "model": Kind(seeds.models(), tensors, _read_model, (CheckpointError,)),
            "flow": Kind(seeds.flows(), tensors, _read_flow, (CheckpointError,)),
            "checkpoint": Kind(
                seeds.checkpoints(),
                tensors,
                seeds.resume,
                (CheckpointError, DivergenceError),
            ),
            "settings": Kind(
                seeds.settings(),
                _by_contents(hostile.changed_settings),
                seeds.read_settings,
                (CheckpointError, RunFolderError, ValueError),
            ),
            "journal": Kind(
                seeds.journals(), _by_contents(hostile.changed_journal), seeds.go_on, (ValueError,)
            ),
            "table": Kind(
                hostile.table_seeds(),
                lambda name, data, rng: hostile.TABLE_CHANGES[name](data, rng),
                _read_table,
                (DataError,),
            ),
        }

    def ending(self, number: int, seed: int) -> tuple[str, str, int]:
        """(kind, how it ended, bytes of the file); Failure for an ending that none may have."""
        rng = random.Random(f"{seed}-{number}")
        kind_name = rng.choices(list(SHARES), list(SHARES.values()))[0]
        kind = self.kinds[kind_name]
        name = rng.choice(sorted(kind.seeds))
        data = kind.change(name, kind.seeds[name], rng)
        file = self.folder / name
        hostile.write(file, data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.read(file)
        except kind.refusals as error:
            message = str(error)
            if not isinstance(error, ArithmeticError) and str(file) not in message:
                raise Failure(f"{kind_name}: the message does not name {file}: {message!r}") from error
            if len(message) > 3000 or not message.isprintable():
                raise Failure(f"{kind_name}: not fit for a terminal: {message[:500]!r}") from error
            return kind_name, type(error).__name__, len(data)
        except Exception as error:
            raise Failure(f"{kind_name}: {type(error).__name__}: {str(error)[:500]}") from error
        return kind_name, "result", len(data)


def _read_model(file: Path) -> None:
    import torch

    from lunet_fast.recsys.model import model_files

    if file.name.startswith("sequence"):
        sequences = model_files.load_sequences(file)
        with torch.no_grad():
            sequences.model.score_users(torch.zeros(1, dtype=torch.int64))
        return
    trained = model_files.load_model(file)
    with torch.no_grad():
        trained.model(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def _read_flow(file: Path) -> None:
    import torch

    from lunet_fast.density.files import load_flow

    model = load_flow(file).model
    model.log_prob(torch.zeros(2, model.features))
    with torch.no_grad():
        model.sample(2)


def _read_table(file: Path) -> None:
    from lunet_fast.density import data

    rows = data.read(str(file), label_column="kind" if file.suffix in (".csv", ".parquet") else None)
    if not bool(rows.values.isfinite().all()) or rows.values.dim() != 2:
        raise Failure("rows that are not finite numbers [N, D]")
    if rows.labels is not None and not 0 <= int(rows.labels.min()) <= int(rows.labels.max()) < rows.classes:
        raise Failure("labels that are none")


class _Seeds:
    """Good files, made by short trainings, and how those that take more than one call are read."""

    def __init__(self, folder: Path) -> None:
        import torch

        from lunet_fast.density.config import DensityConfig
        from lunet_fast.density.data import Rows, split
        from lunet_fast.recsys.data.ratings import from_frame
        from lunet_fast.recsys.measures.protocols import Parts
        from tests.recsys.synthetic import latent_frame, quick_config

        self.folder = folder
        self.what = {"dataset": "made up", "ratings": 40, "gamma": 0.5}
        values = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        self.rows = Rows("made up", values, torch.arange(60) % 3, image=(2, 2), source="a generator")
        self.flow = DensityConfig(
            layers=2,
            bins=4,
            input_bins=4,
            components=2,
            steps=6,
            round_steps=3,
            conditional=True,
            signs="random",
        )
        self.parts = split(self.rows, 0)
        self.ratings = from_frame(latent_frame(9, 14, 40, text_ids=True), scale=(1, 5))
        self.config = quick_config(epochs=3, mlp=False, gamma=0.5, embedding_size=2, batch_size=16)
        self.rated = Parts.of(self.ratings, self.config.split, self.config.seed)

    def models(self) -> dict[str, bytes]:
        from lunet_fast.recsys.model.model_files import TrainedModel, save_model, save_sequences
        from lunet_fast.recsys.model.sequence_config import SequenceConfig
        from lunet_fast.recsys.model.sequence_training import train_sequence
        from lunet_fast.recsys.model.training import train
        from tests.recsys.synthetic import quick_config

        found = {}
        file = self.folder / "seed.safetensors"
        for name, changes in (("ordinal", {"loss": "ordinal"}), ("hybrid", {"gamma": 0.5})):
            config = quick_config(epochs=1, mlp=False, split="none", embedding_size=2, **changes)
            model = train(self.ratings, config).trained.model
            save_model(file, TrainedModel(model, self.ratings.users, self.ratings.items, (1.0, 5.0)))
            found[f"{name}.safetensors"] = file.read_bytes()
        small = SequenceConfig(epochs=1, embedding_size=2, batch_size=64, length=8)
        save_sequences(file, train_sequence(self.ratings, small).trained)
        found["sequence.safetensors"] = file.read_bytes()
        return found

    def flows(self) -> dict[str, bytes]:
        from lunet_fast.density.files import save_flow
        from lunet_fast.density.training import _untrained

        found = {}
        file = self.folder / "seed.safetensors"
        for name, changes in (
            ("conditional", {}),
            ("permuted", {"permutation": "random", "conditional": False, "components": 1}),
            ("leaky", {"activation": "leaky_softplus", "input_bins": 0}),
        ):
            config = self.flow.replace(**changes)
            save_flow(file, _untrained(self.parts.training, 3, config), config, self.rows)
            found[f"{name}.safetensors"] = file.read_bytes()
        return found

    def checkpoints(self) -> dict[str, bytes]:
        """Of both trainings, as they are in the middle of an epoch."""
        from lunet_fast.training.loop import Interrupted, Progress, Stop

        found = {}
        for name in ("flow.safetensors", "lu-net.safetensors"):
            file = self.folder / "run" / "checkpoints" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            stop = Stop()

            class AfterOne(Progress):
                def epoch(self, *_: object, stop: Stop = stop) -> None:
                    stop.ask()

            try:
                self._train(file, stop=stop, progress=AfterOne())
            except Interrupted:
                found[name] = file.read_bytes()
        return found

    def resume(self, file: Path) -> None:
        target = self.folder / "run" / "checkpoints" / file.name
        target.write_bytes(file.read_bytes())
        try:
            self._train(target)
        except ValueError as error:  # names the file where a training finds it
            raise type(error)(str(error).replace(str(target), str(file))) from error

    def _train(self, file: Path, **options: Any) -> None:
        """To the end from that checkpoint, without what a run writes beside it."""
        from lunet_fast.density.training import _untrained, fit_flow
        from lunet_fast.recsys.model.training import _Phases
        from lunet_fast.training.run import Run

        run = Run(out=file.parents[1], resume=True, **options)
        if file.name.startswith("flow"):
            fit_flow(_untrained(self.parts.training, 3, self.flow), self.parts, self.flow, run)
        else:
            _Phases(self.config, self.rated, run).lu_net()

    def settings(self) -> dict[str, bytes]:
        from lunet_fast.recsys.model.config import TrainConfig
        from lunet_fast.recsys.model.sequence_config import SequenceConfig

        return {
            "density.json": json.dumps(self.flow.to_dict()).encode(),
            "train.json": json.dumps({"recipe": "best", **TrainConfig().to_dict()}).encode(),
            "sequence.json": json.dumps(SequenceConfig().to_dict()).encode(),
            "tuned.json": b'{"gamma": 0.5, "members": 2, "embedding_size": 8, "epochs": 3, "dropout": 0.1}',
        }

    def read_settings(self, file: Path) -> None:
        import typer

        from lunet_fast.cli.options import Source
        from lunet_fast.cli.train import Further, Parts, Training, _settings
        from lunet_fast.density.config import DensityConfig
        from lunet_fast.training.files import RunFolder, read_json

        try:
            if file.name == "density.json":
                DensityConfig.from_dict(read_json(file))
            else:
                try:
                    settings = _settings({}, file, Parts(), "best")
                except typer.Exit as error:
                    raise ValueError(f"{file}: refused") from error
                Training("ml-100k", Parts(), Further(), Source(), settings, print).config(1000)
        except ValueError as error:
            # Told with the option's name, or that of the run whose settings they are.
            raise ValueError(f"{file}: {error}") from error
        folder = RunFolder(file.parent)
        folder.config = file
        folder.check(read_json(file))

    def journals(self) -> dict[str, bytes]:
        from lunet_fast.recsys.evaluation.tuning import opened_study, suggested
        from lunet_fast.recsys.model.config import recipe

        file = self.folder / "seed.study"
        study = opened_study(file, "maximize", 0, self.what)
        for value in (0.5, None, 0.25):
            trial = study.ask()
            suggested(trial, recipe("best", 0, gamma=0.5))
            study.tell(trial, value, state=None if value is not None else _failed())
        return {"found.study": file.read_bytes()}

    def go_on(self, file: Path) -> None:
        """As ``tune`` does, but for the training of the trial."""
        from lunet_fast.recsys.evaluation.tuning import opened_study, suggested
        from lunet_fast.recsys.model.config import recipe

        study = opened_study(file, "maximize", 0, self.what)
        trial = study.ask()
        suggested(trial, recipe("best", 0, gamma=0.5))
        study.tell(trial, 0.75)
        if study.best_value < 0.75:
            raise Failure("the best value is not the best")


def _failed() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL


# A process that reads; the one that watches it --------------------------------------------------------------


def work(arguments: argparse.Namespace) -> None:
    """Read inputs ``--first`` to ``--inputs`` and write a line of the log for each."""
    os.environ["LUNET_FAST_MAX_BYTES"] = str(LIMIT_BYTES)
    os.environ.pop("LUNET_FAST_DATA", None)
    folder = Path(arguments.work)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lunet-fast-fuzz-") as name:
        made = Files(Path(name))
        for number in range(60):  # so that what is imported on use is there before memory is looked at
            with contextlib.suppress(Failure):
                made.ending(number, arguments.seed + 1)
        cap = (_status("VmSize") << 10) + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
        with open(folder / "slot", "r+b") as stream, open(folder / "log", "a", buffering=1) as log:
            slot = mmap.mmap(stream.fileno(), 0)
            for number in range(arguments.first, arguments.inputs, arguments.processes):
                before = _peak_from_here()
                begin = time.process_time()
                slot[:] = _SLOT.pack(number, time.monotonic(), begin)
                try:
                    kind, ending, size = made.ending(number, arguments.seed)
                except Failure as failure:
                    kind, ending, size = str(failure).partition(":")[0], f"FAILED {failure}", 0
                over = max(0, _status("VmHWM") - before) * 1024
                if over > 2 * size + MOST_OVER_FILE and not ending.startswith("FAILED"):
                    ending = f"FAILED {kind}: took {over >> 20} MiB for a file of {size} bytes"
                log.write(json.dumps([number, kind, ending, time.process_time() - begin, over]) + "\n")
            slot[:] = _SLOT.pack(arguments.inputs, 0.0, 0.0)  # the end


def _peak_from_here() -> int:
    """Start measuring the most that is resident; what is so now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(field))


def watch(arguments: argparse.Namespace, first: int, folder: Path) -> list[tuple[int, str]]:
    """Have every input from ``first`` on that is a process's own read, in a new process after each that dies
    or hangs; these, and why."""
    folder.mkdir()
    (folder / "log").touch()
    stopped = []
    while first < arguments.inputs:
        (folder / "slot").write_bytes(_SLOT.pack(first, 0.0, 0.0))
        command = [sys.executable, __file__, "--work", str(folder), "--first", str(first)]
        command += ["--inputs", str(arguments.inputs), "--seed", str(arguments.seed)]
        command += ["--processes", str(arguments.processes)]
        with open(folder / "said", "w+b") as said, open(folder / "slot", "r+b") as stream:
            slot, why = mmap.mmap(stream.fileno(), 0), ""
            process = subprocess.Popen(command, stdout=said, stderr=said)
            while process.poll() is None:
                time.sleep(0.2)
                number, since, computed = _SLOT.unpack(slot[:])
                if since and _hangs(process.pid, since, computed, arguments.seconds):
                    why = f"hang: more than {arguments.seconds:g} s"
                    process.kill()
                    process.wait()
            number, since, _ = _SLOT.unpack(slot[:])
            said.seek(0)
            text = said.read().decode("utf-8", "replace")
        if process.returncode == 0 and not since:
            break
        if not since:
            raise SystemExit(f"the process that reads ended before its first input:\n{text[-3000:]}")
        stopped.append((number, why or f"died with exit code {process.returncode}: {text.strip()[-800:]}"))
        first = number + arguments.processes
    return stopped


def _hangs(process: int, since: float, computed: float, seconds: float) -> bool:
    """Whether a process has computed for so long since it had ``computed`` seconds, or waited for ever."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended
    spent = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent - computed > seconds or time.monotonic() - since > MOST_WAITING * seconds


def _summary(logs: list[Path], stopped: list[tuple[int, str]]) -> dict[str, Any]:
    endings: dict[str, Counter[str]] = {}
    failures = [{"input": number, "why": why} for number, why in stopped]
    worst, peak = 0.0, 0
    for line in (line for log in logs for line in log.read_text(encoding="utf-8").splitlines()):
        number, kind, ending, took, over = json.loads(line)
        if ending.startswith("FAILED"):
            failures.append({"input": number, "why": ending.removeprefix("FAILED ")})
            ending = "failed"
        endings.setdefault(kind, Counter())[ending] += 1
        worst, peak = max(worst, took), max(peak, over)
    return {
        "inputs": sum(sum(counts.values()) for counts in endings.values()) + len(stopped),
        "failed": len(failures),
        "deaths_of_the_process": sum(not why.startswith("hang") for _, why in stopped),
        "hangs": sum(why.startswith("hang") for _, why in stopped),
        "endings": {kind: dict(sorted(counts.items())) for kind, counts in sorted(endings.items())},
        "failures": failures[:50],
        "worst_seconds": round(worst, 3),
        "peak_megabytes_over_the_start": round(peak / 2**20, 1),
    }


def main() -> int:
    import machine

    parser = machine.parser(__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the processor, most for one input")
    parser.add_argument("--processes", type=int, default=2, help="that read side by side")
    parser.add_argument("--again", type=int, help="read the input of this number once more")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return 0
    if arguments.again is not None:
        os.environ["LUNET_FAST_MAX_BYTES"] = str(LIMIT_BYTES)
        with tempfile.TemporaryDirectory() as name:
            try:
                print(Files(Path(name)).ending(arguments.again, arguments.seed))
            except Failure:
                traceback.print_exc()
                return 1
        return 0
    results = machine.open_results(arguments, threads=1)
    with tempfile.TemporaryDirectory(prefix="lunet-fast-fuzz-") as name:
        folders = [Path(name) / str(place) for place in range(arguments.processes)]
        with ThreadPoolExecutor(arguments.processes) as pool:
            stopped = list(pool.map(partial(watch, arguments), range(arguments.processes), folders))
        found = _summary([folder / "log" for folder in folders], [each for part in stopped for each in part])
    print(json.dumps(found, indent=1))
    results.write("fuzz-files", {"seed": arguments.seed, "most_seconds": arguments.seconds, **found})
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
