"""Embedding tables divided by rows: what a step costs by each way there is, and memory by processes.

    python benchmarks/sharding.py --steps      a minute: into results/sharding.json, whose memory stays
    python benchmarks/sharding.py --memory     five minutes: the same the other way round
    python benchmarks/scale.py --render        the page that shows it

Steps: two processes on one machine with gloo, each with half of a batch, look rows of one table up, take a
loss, its gradient and a step of Adam. Bytes are what the loopback interface sends meanwhile: run it by
``unshare -n sh -c 'ip link set lo up; exec python ...'`` and nobody else sends there.

Memory: training on a stream in one process and with ``shard_tables`` in two and four, one epoch on a file of
``lunet-fast data synth``; the peak is the operating system's, from the moment when the file is opened.

TorchRec takes part where ``fbgemm_gpu`` loads: of fbgemm-gpu-cpu 1.7.0 to 1.9.0, 1.8.0 alone fits torch 2.13.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lunet_fast.training import sharding
from lunet_fast.training.distributed import Workers
from lunet_fast.training.machine import process_memory, reset_peak
from machine import open_results, parser

ROWS, SIZE, BATCH, STEPS, RATE = 1_000_000, 64, 8192, 60, 1e-3
USERS, ITEMS, RATINGS, PROCESSES = 4_000_000, 90_000, 6_000_000, (1, 2, 4)

Step = Callable[[Tensor, Tensor], Tensor]
"""(this process's ids [b], targets [b, SIZE]) -> its part of the loss, once the table has moved."""


def ids_of(step: int, rank: int) -> Tensor:
    """A share of a batch, a fifth of whose ids are in a hundredth of the rows, as popular ones are."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    drawn = torch.rand(BATCH // 2, generator=generator)
    return (drawn.pow(3) * ROWS).long()


def whole_table() -> Tensor:
    return torch.empty(ROWS, SIZE).normal_(std=0.1, generator=torch.Generator().manual_seed(0))


def loss_of(rows: Tensor, targets: Tensor) -> Tensor:
    return (rows - targets).square().sum() / BATCH


def loopback_bytes() -> int:
    """Bytes that the loopback interface of this network namespace has sent."""
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise RuntimeError("there is no interface lo in /proc/self/net/dev")


def step_of(module: nn.Module, optimizer: torch.optim.Optimizer, *, times: int = 1) -> Step:
    """Look up, loss, ``times`` its gradient, and the optimiser's step."""

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(module(ids), targets)
        (times * loss).backward()
        optimizer.step()
        return loss.detach()

    return step


# The contenders ---------------------------------------------------------------------------------------------


def alone(workers: Workers) -> tuple[Step, int]:
    """Every process has the whole table; DistributedDataParallel gathers sparse gradients."""
    table = nn.Embedding(ROWS, SIZE, sparse=True, _weight=whole_table())
    module = nn.parallel.DistributedDataParallel(table)
    optimizer = torch.optim.SparseAdam(list(module.parameters()), lr=RATE)

    # Of the processes' gradients DistributedDataParallel takes the mean.
    return step_of(module, optimizer, times=2), 3 * ROWS * SIZE * 4


def ours(workers: Workers) -> tuple[Step, int]:
    """``lunet_fast.training.sharding.pull``, SparseAdam."""
    own = nn.Parameter(whole_table()[workers.rank :: 2].clone())
    optimizer = torch.optim.SparseAdam([own], lr=RATE)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        wanted, places = torch.unique(ids, return_inverse=True)
        ((rows,),) = sharding.pull(workers, [wanted], [[own]])
        loss = loss_of(rows[places], targets)
        (2 * loss).backward()
        optimizer.step()
        return loss.detach()

    return step, 3 * own.numel() * 4


def dtensor(workers: Workers) -> tuple[Step, int]:
    """``RowwiseParallel``: gradients are dense, so Adam moves every row at every step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    table = nn.Embedding(ROWS, SIZE, _weight=whole_table())
    module = parallelize_module(table, mesh, RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)))
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)

    return step_of(module, optimizer), 4 * ROWS * SIZE * 4 // 2  # and the gradient


def sharded_tensor(workers: Workers) -> tuple[Step, int]:
    """``torch.distributed._shard.sharded_tensor`` by a ChunkShardingSpec, dense Adam."""
    from torch.distributed._shard import shard_parameter
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    table = nn.Embedding(ROWS, SIZE, _weight=whole_table())
    shard_parameter(table, "weight", ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"]))
    local = table.weight.local_tensor()
    optimizer = torch.optim.Adam([local], lr=RATE)

    return step_of(table, optimizer), 4 * ROWS * SIZE * 4 // 2


def torchrec(workers: Workers) -> tuple[Step, int]:
    """``EmbeddingBagCollection``, row-wise, of bags of one id, with PyTorch's Adam.

    On CPUs TorchRec has its dense kernel alone, which needs an optimiser: FBGEMM's fused Adam is refused
    there, and fused parameters are ignored. ``EmbeddingCollection``, which would send the rows alone, ends in
    an error on CPUs: it looks a row up for every id of the batch, not only for those that are its own (1.8.0
    and 1.9.2).
    """
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed import DistributedModelParallel, ShardingEnv
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingPlan

    tables = [EmbeddingBagConfig(name="t", embedding_dim=SIZE, num_embeddings=ROWS, feature_names=["f"])]
    sharder = EmbeddingBagCollectionSharder()
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    environment = ShardingEnv.from_process_group(dist.group.WORLD)
    plan = construct_module_sharding_plan(collection, {"t": row_wise()}, sharder, 2, 2, device_type="cpu")
    module = DistributedModelParallel(
        collection,
        env=environment,
        device=torch.device("cpu"),
        plan=ShardingPlan({"": plan}),
        sharders=[sharder],
    )
    for parameter in module.parameters():
        half = parameter.local_shards()[0] if hasattr(parameter, "local_shards") else parameter
        tensor = half.tensor if hasattr(half, "tensor") else half
        start = workers.rank * (ROWS // 2)
        with torch.no_grad():
            tensor.copy_(whole_table()[start : start + ROWS // 2])
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        lengths = torch.ones(len(ids), dtype=torch.int32)
        features = KeyedJaggedTensor(keys=["f"], values=ids, lengths=lengths)
        optimizer.zero_grad()
        loss = loss_of(module(features)["f"], targets)
        (2 * loss).backward()  # of which TorchRec takes the mean too
        optimizer.step()
        return loss.detach()

    return step, 4 * ROWS * SIZE * 4 // 2


CONTENDERS: dict[str, Callable[[Workers], tuple[Step, int]]] = {
    "whole tables, DistributedDataParallel": alone,
    "lunet_fast.training.sharding": ours,
    "DTensor, RowwiseParallel": dtensor,
    "ShardedTensor, ChunkShardingSpec": sharded_tensor,
    "TorchRec, row-wise": torchrec,
}

OPTIMIZERS = {
    "whole tables, DistributedDataParallel": "SparseAdam",
    "lunet_fast.training.sharding": "SparseAdam",
    "DTensor, RowwiseParallel": "Adam",
    "ShardedTensor, ChunkShardingSpec": "Adam",
    "TorchRec, row-wise": "Adam",
}


def compete(rank: int, name: str, meeting: str, out: str) -> None:
    """One contender's process; process 0 writes what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    workers = Workers(rank, 2)
    step, held = CONTENDERS[name](workers)
    generator = torch.Generator().manual_seed(rank)
    targets = torch.randn(BATCH // 2, SIZE, generator=generator)
    seconds, sent, losses = [], [], []
    for number in range(STEPS):
        ids = ids_of(number % 5, rank)
        dist.barrier()
        before, began = loopback_bytes(), time.perf_counter()
        loss = step(ids, targets)
        dist.barrier()
        seconds.append(time.perf_counter() - began)
        sent.append(loopback_bytes() - before)
        losses.append(float(workers.sum(loss)))
    if rank == 0:
        warm = STEPS // 6
        values = {
            "seconds": statistics.median(seconds[warm:]),
            "bytes": statistics.median(sent[warm:]),
            "held_bytes": held,
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }
        Path(out).write_text(json.dumps(values), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def steps() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in CONTENDERS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            try:
                mp.spawn(compete, (name, str(Path(folder) / "meeting"), str(out)), 2)
                found[name] = json.loads(out.read_text(encoding="utf-8"))
            except Exception as error:
                found[name] = {"error": str(error).strip().splitlines()[-1]}
        print(name, found[name], flush=True)
    return found


# Memory -----------------------------------------------------------------------------------------------------


def measure(path: Path, out: Path) -> None:
    """One epoch by this process, or its part of it under torchrun; its memory goes beside ``out``."""
    from lunet_fast.recsys.data.streaming import RatingStream
    from lunet_fast.recsys.model.config import recipe
    from lunet_fast.recsys.model.streamed_training import STREAM_SETTINGS, train_stream
    from lunet_fast.training.distributed import workers_of_torchrun

    stream = RatingStream.open(path, seed=0)
    opened = reset_peak()
    settings = {"members": 1, "embedding_size": SIZE, "epochs": 1, "batch_size": BATCH, "l2_latent": 0.01}
    config = recipe("best", stream.n_rows, **{**STREAM_SETTINGS, **settings})
    with workers_of_torchrun("cpu") as workers:
        result = train_stream(stream, config, out=out, workers=workers, shard_tables=True, overwrite=True)
        held = process_memory()
        values = {
            "opened_bytes": opened,
            "peak_bytes": held["VmHWM"],
            "mapped_bytes": held["RssFile"],
            "train_seconds": result.curve.seconds,
            "users": stream.n_users,
            "items": stream.n_items,
            "train_rows": stream.n_rows,
            "test_mse": result.metrics.get("test_mse"),
        }
        out.with_name(f"{out.name}-{workers.rank}.json").write_text(json.dumps(values), encoding="utf-8")
        workers.of_first(0)  # nobody leaves before all are done


def memory() -> list[dict[str, Any]]:
    found = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "ratings.parquet"
        sizes = {"users": USERS, "items": ITEMS, "ratings": RATINGS}
        options = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
        made = [sys.executable, "-m", "lunet_fast", "data", "synth", *options, "-o", str(path)]
        subprocess.run(made, check=True, capture_output=True)
        for count in PROCESSES:
            out = folder / f"run{count}"
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            command = [sys.executable, *(torchrun if count > 1 else []), __file__, "--measure"]
            subprocess.run([*command, str(path), str(out)], check=True, env=environment)
            rows = [json.loads((folder / f"run{count}-{rank}.json").read_text()) for rank in range(count)]
            found.append({"processes": count, **rows[0], "peak_bytes": [row["peak_bytes"] for row in rows]})
            print(found[-1], flush=True)
            shutil.rmtree(out)
    return found


# The page ---------------------------------------------------------------------------------------------------


def section(result: dict[str, Any]) -> list[str]:
    """What scale.md says of it."""
    rows = result["memory"]
    first = rows[0]
    table = (first["users"] + first["items"]) * SIZE * 4
    lines = [
        "## Tables divided over processes",
        "",
        "`--shard-tables` gives each of N processes every N-th row. Measured by `benchmarks/sharding.py` "
        f"on {result['machine']['processor']}, {result['machine']['date']}, with two shared cores, so that "
        "times compare roughly.",
        "",
        f"One table of {ROWS:,} rows of {SIZE} numbers, two processes with gloo, {BATCH:,} ids a step, half "
        "of them each; memory is that of table, moments and gradient for each process, by arithmetic:",
        "",
        f"| table by | optimiser | median step | sent a step | memory | loss, first step | step {STEPS} |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, values in result["steps"].items():
        if "error" in values:
            lines.append(f"| {name} | | {values['error']} | | | | |")
            continue
        lines.append(
            f"| {name} | {OPTIMIZERS[name]} | {values['seconds'] * 1e3:.0f} ms "
            f"| {values['bytes'] / 1e6:.1f} MB | {values['held_bytes'] / 1e6:.0f} MB "
            f"| {values['first_loss']:.4f} | {values['last_loss']:.4f} |"
        )
    lines += [
        "",
        "Chosen: an exchange of our own by `all_to_all_single`, in `lunet_fast/training/sharding.py`. It "
        "sends the different rows that a process asks another one for, and their gradients back; what it "
        "serves itself does not travel. It takes PyTorch's SparseAdam as it is, so the numbers are those "
        "of whole tables, and it goes beside DistributedDataParallel, which leaves these parameters alone. "
        "DTensor and ShardedTensor send a row of zeros for every row that somebody else has, and have "
        "dense gradients only, so that every row is moved at every step. TorchRec is made for many tables "
        "on many GPUs, and was tried here on CPUs alone: its compiled part fits one release of PyTorch "
        "each; its lookup of single rows (`EmbeddingCollection`) ended in an error; its pooled one, in the "
        "table above, has on CPUs a dense kernel alone, for FBGEMM refuses Adam there, so that it sends and "
        "holds what DTensor does, and its loss is the same to the last digit.",
        "",
        f"Training on a stream, one epoch of {first['train_rows']:,} ratings by {first['users']:,} users of "
        f"{first['items']:,} items, k = {SIZE}: tables of {table / 2**30:.2f} GiB, with Adam's "
        f"moments {3 * table / 2**30:.2f} GiB. The file once opened, which every process does, takes "
        f"{max(row['opened_bytes'] for row in rows) / 2**30:.2f} GiB of it.",
        "",
        "| processes | peak memory, process 0 | others | train | test MSE |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        own, *others = (f"{peak / 2**30:.2f} GiB" for peak in row["peak_bytes"])
        lines.append(
            f"| {row['processes']} | {own} | {', '.join(others) or '-'} | {row['train_seconds']:.0f} s "
            f"| {row['test_mse']:.6f} |"
        )
    mapped = max(row["mapped_bytes"] for row in rows[1:]) - first["mapped_bytes"]
    lines += [
        "",
        f"At its end process 0 has {mapped / 2**30:.2f} GiB more of files mapped than one process alone: the "
        "model just written, digested and then ranked with. The system takes such pages back where memory is "
        "short. The times are those of two cores, whatever the number of processes.",
        "",
        "Covered are the tables and biases of users and items in `train --stream`, and their moments. Each "
        "process still has a few numbers for each user and item (ids, counts, means); without `--stream` the "
        "option is refused. Checkpoints and the model are the usual files of whole tables: process 0 writes "
        "and reads them a block at a time, since the others need not share its disk, and any number of "
        "processes, or one with whole tables, can go on from them; `torch.distributed.checkpoint` would "
        "leave a folder of parts that nothing else here reads, on a disk that all must see.",
    ]
    return lines


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", action="store_true")
    options.add_argument("--memory", action="store_true")
    options.add_argument("--measure", nargs=2, metavar=("FILE", "FOLDER"), help="one training, here")
    chosen = options.parse_args()
    if chosen.measure:
        measure(*map(Path, chosen.measure))
        return
    results = open_results(chosen, threads=1)
    path = results.path("sharding.json")
    parts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part, work in (("steps", steps), ("memory", memory)):
        if getattr(chosen, part):
            parts[part] = work()
            results.write("sharding", {name: parts[name] for name in ("steps", "memory") if name in parts})


if __name__ == "__main__":
    main()
