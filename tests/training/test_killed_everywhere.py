"""Trainings that are killed at each of their file operations, and resumed to the files of one left alone.

A child process counts what it does to files of the run folder, by Python's audit events, and kills itself
before the n-th; for each n until one gets through.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunet_fast.density.config import DensityConfig
from lunet_fast.density.data import Rows
from lunet_fast.density.training import train_density
from lunet_fast.recsys.data.ratings import from_frame
from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.model.training import train
from tests.recsys.synthetic import latent_frame, quick_config

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

OPERATIONS = frozenset(
    {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.listdir"}
    | {"os.scandir", "os.link", "os.symlink", "fcntl.flock", "glob.glob", "tempfile.mkstemp"}
)


def density(out: Path, data: Path) -> None:
    values = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    config = DensityConfig(layers=2, bins=4, input_bins=4, components=2, steps=6, round_steps=2)
    train_density(Rows("made up", values, source="x"), config, out=out, resume=True, checkpoint_seconds=0.0)


def recommender(out: Path, data: Path) -> None:
    ratings = from_frame(latent_frame(9, 14, 40), scale=(1, 5))
    config = quick_config(epochs=2, mlp=False, gamma=0.5, split="joint", embedding_size=2, batch_size=16)
    train(ratings, config, out=out, resume=True, checkpoint_seconds=0.0)


def sampling(out: Path, data: Path) -> None:
    ratings = from_frame(latent_frame(9, 14, 40), scale=(1, 5))
    sampled = {"inference": "gibbs", "epochs": 4, "members": 2, "embedding_size": 2, "split": "random"}
    config = recipe("best", 40, mlp=False, threads=1, **sampled)
    train(ratings, config, out=out, resume=True, checkpoint_seconds=0.0)


def stream(out: Path, data: Path) -> None:
    from lunet_fast.recsys.data.streaming import RatingStream
    from lunet_fast.recsys.model.streamed_training import STREAM_SETTINGS, train_stream

    config = quick_config(epochs=2, embedding_size=2, batch_size=16, **STREAM_SETTINGS)
    train_stream(
        RatingStream.open(data / "ratings.parquet"), config, out=out, resume=True, checkpoint_seconds=0.0
    )


def in_a_child(training: Callable[[Path, Path], None], out: Path, data: Path, kill_at: int | None) -> bool:
    """Run the training in a process of its own, which kills itself before that operation; whether it did."""
    child = os.fork()
    if child == 0:
        done = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event not in OPERATIONS or not arguments:
                return
            if event != "fcntl.flock" and not str(arguments[0]).startswith(str(out)):
                return
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

        if kill_at is not None:
            sys.addaudithook(count)
        try:
            training(out, data)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"operation {kill_at}: the training failed"
    return False


def contents(out: Path) -> dict[str, bytes]:
    """Every file of the folder but those with times in them."""
    names = sorted(p for p in out.rglob("*") if p.is_file())
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in names
        if p.name != "metrics.json" and p.parent.name != "checkpoints"
    }


def check(training: Callable[[Path, Path], None], tmp_path: Path, every: int) -> int:
    """Kill at each ``every``-th operation, resume, compare; the number of kills."""
    data = tmp_path / "data"
    data.mkdir()
    if training is stream:
        pytest.importorskip("pyarrow")
        latent_frame(20, 12, 160).to_parquet(data / "ratings.parquet", index=False)
    training(tmp_path / "whole", data)  # here, so that children find all imported
    whole = contents(tmp_path / "whole")
    kills = 0
    for number in range(0, 10_000, every):
        out = tmp_path / f"killed-{number}"
        if not in_a_child(training, out, data, number):
            break
        kills += 1
        assert not in_a_child(training, out, data, None)
        assert contents(out) == whole, f"killed before operation {number}"
        assert (out / "metrics.json").is_file()
        assert not list(out.rglob(".lunet-fast-*")), f"left behind after operation {number}"
    return kills


@pytest.mark.parametrize("training", [density, recommender, sampling], ids=lambda f: f.__name__)
def test_at_some_operations(training: Callable[[Path, Path], None], tmp_path: Path) -> None:
    assert check(training, tmp_path, every=41) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("training", [density, recommender, sampling, stream], ids=lambda f: f.__name__)
def test_at_every_operation(training: Callable[[Path, Path], None], tmp_path: Path) -> None:
    assert check(training, tmp_path, every=1) >= 50
