"""Tables dealt to several processes: real ones, with gloo, beside the same computation in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lunet_fast.recsys.data.streaming import RatingStream
from lunet_fast.recsys.model.model_files import load_model
from lunet_fast.recsys.model.streamed_training import STREAM_SETTINGS, train_stream
from lunet_fast.training.distributed import Workers
from lunet_fast.training.files import read_tensors
from lunet_fast.training.schema import CHECKPOINT_FORMAT
from lunet_fast.training.sharding import BLOCK, Dealt, draw_own_rows_, pull
from tests.cli.invoke import run
from tests.recsys.synthetic import latent_frame, quick_config

pytest.importorskip("pyarrow")

TRAINING = ["--stream", "--epochs", "3", "--members", "2", "--batch-size", "16", "--checkpoint-minutes", "0"]


def in_processes(count: int, folder: Path, work: Callable[[Workers], None]) -> None:
    """Run ``work``, a function of this module, in ``count`` processes; their first error is raised."""
    mp.spawn(_begin, (count, str(folder / "meeting"), work), count)


def _begin(rank: int, count: int, meeting: str, work: Callable[[Workers], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    work(Workers(rank, count))
    dist.destroy_process_group()


@contextmanager
def small_blocks() -> Iterator[None]:
    from lunet_fast.training import sharding

    sharding.BLOCK = 64
    try:
        yield
    finally:
        sharding.BLOCK = BLOCK


def check_rows(workers: Workers) -> None:
    rank, count = workers.rank, workers.world_size
    # The last is drawn in several blocks as it is, the others in blocks of 64 numbers.
    for rows, width in ((101, 6), (37, 5), (5, 3), (17, 1), (2, 4), (BLOCK // 2 + 3, 3)):
        torch.manual_seed(0)
        whole, after = torch.empty(rows, width).normal_(std=0.1), torch.rand(3)
        torch.manual_seed(0)
        own = torch.full((len(range(rank, rows, count)), width), float("nan"))
        with small_blocks() if rows < 1000 else nullcontext():
            draw_own_rows_(own, rows, 0.1, workers)
            assert torch.equal(own, whole[rank::count]), (rows, width)
            assert torch.equal(torch.rand(3), after)
            blocks = list(Dealt(workers, own, rows).blocks())
            if rank == 0:
                assert torch.equal(torch.cat(blocks), whole), (rows, width)
            assert rows * width < 64 * count or len(blocks) > 1
            filled = torch.full_like(own, float("nan"))
            Dealt(workers, filled, rows).fill(whole if rank == 0 else None)
            assert torch.equal(filled, own), (rows, width)


def check_gradients(workers: Workers) -> None:
    rank, count = workers.rank, workers.world_size
    generator = torch.Generator().manual_seed(0)
    users, items = 31, 2  # the last process has no item where there are three
    tables = [
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((users, 6), (users, 2), (items, 6), (items, 2))
    ]
    # Processes with different numbers of pairs, one with none.
    sizes = (9, 0, 23)[:count]
    pairs = [
        tuple(torch.randint(high, (size,), generator=generator) for high in (users, items)) for size in sizes
    ]

    def loss(vectors: list[Tensor], u: Tensor, i: Tensor) -> Tensor:
        user, user_bias, item, item_bias = vectors
        return ((user[u] * item[i]).sum(1) + (user_bias[u] * item_bias[i]).sum(1)).tanh().sum()

    whole = [table.clone().requires_grad_() for table in tables]
    (sum(loss(whole, *part) for part in pairs) / count).backward()
    own = [table[rank::count].clone().requires_grad_() for table in tables]
    (known_users, u), (known_items, i) = (torch.unique(side, return_inverse=True) for side in pairs[rank])
    of_users, of_items = pull(workers, [known_users, known_items], [own[:2], own[2:]])
    for found, table in zip(of_users, tables[:2], strict=True):
        assert torch.equal(found, table[known_users])
    for found, table in zip(of_items, tables[2:], strict=True):
        assert torch.equal(found, table[known_items])
    loss([*of_users, *of_items], u, i).backward()
    for mine, of_all in zip(own, whole, strict=True):
        assert mine.grad is not None
        assert mine.grad.is_sparse
        torch.testing.assert_close(mine.grad.to_dense(), of_all.grad[rank::count], rtol=1e-13, atol=1e-15)


def check_all(workers: Workers) -> None:
    check_rows(workers)
    check_gradients(workers)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_and_gradients_are_those_of_whole_tables(count: int, tmp_path: Path) -> None:
    in_processes(count, tmp_path, check_all)


# Trainings --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 1291 training rows, so that the last batch of an epoch has 11; 61 users, 41 items."""
    path = tmp_path_factory.mktemp("data") / "latent.parquet"
    latent_frame(users=61, items=41, ratings=1615).to_parquet(path, row_group_size=128)
    return path


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process's training."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run("train", "-d", data, "-o", out, *TRAINING)
    assert done.exit_code == 0, done.output
    return out


def command(data: Path, out: Path, processes: int, *more: str) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(processes), "--monitor-interval", "0.1"]
    return [*start, "-m", "lunet_fast", "train", "-d", str(data), "-o", str(out), *TRAINING, *more]


def started(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr


def compare(out: Path, whole: Path, processes: int) -> None:
    one, many = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, out))
    assert many.pop("world_size") == processes
    assert many["test_mse"] == pytest.approx(one["test_mse"], rel=1e-5)
    assert many["full_ndcg@10"] == pytest.approx(one["full_ndcg@10"], rel=1e-4)
    assert many["parameters"] == one["parameters"]
    first, second = (load_model(folder / "model.safetensors") for folder in (whole, out))
    assert first.users == second.users
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((1,), (2, "--shard-tables")),
        ((2, "--shard-tables"), (1,)),
        ((2, "--shard-tables"), (3, "--shard-tables")),
        ((3, "--shard-tables"), (2,)),
    ],
)
def test_another_number_resumes(
    data: Path, whole: Path, tmp_path: Path, first: tuple[Any, ...], then: tuple[Any, ...]
) -> None:
    process = started(command(data, tmp_path, *first))
    file = tmp_path / "checkpoints" / "lu-net.safetensors"
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not (tmp_path / "metrics.json").exists()
    finish(started(command(data, tmp_path, *then, "--resume")))
    compare(tmp_path, whole, then[0])


def test_one_process_alone_has_every_row(data: Path, tmp_path: Path) -> None:
    stream, settings = RatingStream.open(data), {**STREAM_SETTINGS, "epochs": 1}
    plain, sharded = (
        train_stream(stream, quick_config(**settings), out=tmp_path / str(shard), shard_tables=shard)
        for shard in (False, True)
    )
    assert plain.metrics["test_mse"] == sharded.metrics["test_mse"]
    files = [(tmp_path / str(shard) / "model.safetensors").read_bytes() for shard in (False, True)]
    assert files[0] == files[1]


def test_what_is_not_covered_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard_tables=True needs out="):
        train_stream(RatingStream.open(data), quick_config(**STREAM_SETTINGS), shard_tables=True)
    refused = run("train", "-d", data, "--shard-tables", "-o", tmp_path)
    assert (refused.exit_code, "add --stream" in refused.output) == (2, True)


def test_two_processes_with_half_of_the_tables_are_one_training(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    finish(started(command(data, tmp_path, 2, "--shard-tables")))
    compare(tmp_path, whole, 2)
    # What is saved is what one process with whole tables saves, moments too: it could go on from there.
    first, second = (
        read_tensors(folder / "checkpoints" / "lu-net.safetensors", CHECKPOINT_FORMAT)[0]
        for folder in (whole, tmp_path)
    )
    assert {name: t.shape for name, t in first.items()} == {name: t.shape for name, t in second.items()}
    for name in ("optimizer.user_embedding.weight.exp_avg", "optimizer.item_bias.exp_avg_sq"):
        assert first[name].abs().sum() > 0
        torch.testing.assert_close(second[name], first[name], rtol=1e-2, atol=1e-6)
