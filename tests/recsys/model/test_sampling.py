"""The loop of inference ``gibbs``: which sweeps become members, checkpoints, resuming, callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.model.config import TrainConfig, recipe
from lunet_fast.recsys.model.model_files import TrainedModel
from lunet_fast.recsys.model.sampling import _kept
from lunet_fast.recsys.model.training import train
from lunet_fast.training.loop import Interrupted, Progress, Stop
from lunet_fast.training.run import Result
from tests.recsys.synthetic import latent_ratings


def settings(**changes: Any) -> TrainConfig:
    few = {"members": 3, "epochs": 8, "embedding_size": 2, "mlp": False, "split": "random"}
    return recipe("best", 1000, inference="gibbs", transform="standard", **{**few, **changes})


class At(Progress):
    """Does something after a sweep (from 0)."""

    def __init__(self, sweep: int, do: Any) -> None:
        self.sweep, self.do, self.heard = sweep, do, dict[str, list[int]]()

    def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
        self.heard.setdefault(phase, []).append(epoch)
        if epoch == self.sweep:
            self.do()


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def ratings() -> Ratings:
    return latent_ratings()


@pytest.fixture(scope="module")
def whole(ratings: Ratings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result[TrainedModel]]:
    out = tmp_path_factory.mktemp("whole")
    return out, train(ratings, settings(), out=out)


@pytest.mark.parametrize(("sweeps", "members"), [(8, 3), (3, 3), (250, 48), (7, 1), (9, 8)])
def test_members_are_spread_evenly(sweeps: int, members: int) -> None:
    kept = [sweep for sweep, is_kept in enumerate(_kept(sweeps, members)) if is_kept]
    assert len(kept) == members
    assert kept[-1] == sweeps - 1
    gaps = np.diff(kept)
    assert members == 1 or gaps.max() - gaps.min() <= 1
    assert kept[0] >= sweeps // 4 or members > sweeps - sweeps // 4


@pytest.mark.parametrize("sweep", range(8))
def test_killed_after_any_sweep_it_ends_with_the_same_bytes(
    ratings: Ratings, whole: tuple[Path, Result[TrainedModel]], tmp_path: Path, sweep: int
) -> None:
    """Killed with the checkpoint of the sweep before, so that one sweep is repeated."""
    with pytest.raises(Killed):
        train(ratings, settings(), out=tmp_path, checkpoint_seconds=0.0, progress=At(sweep, kill))
    assert (tmp_path / "checkpoints" / "lu-net.safetensors").exists() == (sweep > 0)
    rest = At(-1, kill)
    found = train(ratings, settings(), out=tmp_path, resume=True, progress=rest)
    assert rest.heard == {"LU-Net": list(range(sweep, 8))}
    assert found.curve.train == whole[1].curve.train
    assert found.curve.test == whole[1].curve.test
    for name in ("model.safetensors", "loss.png", "config.json"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes(), name


def test_sampled_noise_goes_on_without_histories(tmp_path: Path, ratings: Ratings) -> None:
    """And without a test part: the other kinds of state."""
    config = settings(split="none", noise=0.0, user_history=False, item_history=False)
    expected = train(ratings, config).trained.model.state_dict()
    stop = Stop()
    with pytest.raises(Interrupted):
        train(ratings, config, out=tmp_path, stop=stop, progress=At(4, stop.ask))
    found = train(ratings, config, out=tmp_path, resume=True).trained.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_asked_to_stop_it_says_what_it_saved(tmp_path: Path, ratings: Ratings) -> None:
    stop = Stop()
    with pytest.raises(Interrupted, match=r"lu-net.safetensors holds the sampling up to sweep 3 of 8"):
        train(ratings, settings(), out=tmp_path, stop=stop, progress=At(2, stop.ask))
    stop = Stop()
    with pytest.raises(Interrupted, match="nothing was saved: there is no out="):
        train(ratings, settings(), stop=stop, progress=At(2, stop.ask))
    # In the last sweep there is nothing left to stop.
    stop = Stop()
    train(ratings, settings(), stop=stop, progress=At(7, stop.ask))
    assert stop.asked


def test_a_kill_in_what_follows_repeats_no_sweep(tmp_path: Path, ratings: Ratings) -> None:
    """The control of table 2 is trained after the sampling, with a checkpoint of its own."""
    config = settings(mlp=True, mlp_epochs=2, mlp_embedding_size=4, mlp_hidden=(8, 6))

    class AtControl(Progress):
        def start(self, phase: str, epochs: int, steps: int, done: int) -> None:
            if phase == "MLP":
                raise Killed

    with pytest.raises(Killed):
        train(ratings, config, out=tmp_path, progress=AtControl())
    heard = At(-1, kill)
    train(ratings, config, out=tmp_path, resume=True, progress=heard)
    assert heard.heard == {"MLP": [0, 1], "decoder": [0, 1]}


def test_a_callback_ends_it_and_does_so_again_when_resumed(tmp_path: Path, ratings: Ratings) -> None:
    told: list[int] = []

    def enough(epoch: int, figures: dict[str, float]) -> bool:
        told.append(epoch)
        return epoch == 5

    result = train(ratings, settings(), out=tmp_path, callbacks=[enough])
    assert told == [1, 2, 3, 4, 5]
    assert result.metrics["epochs"] == 5
    bias = result.trained.model.user_bias
    assert bias is not None
    assert bool(bias.ne(0).any(0).all())  # all members are written
    model = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "metrics.json").unlink()  # as killed while the result was written
    told.clear()
    train(ratings, settings(), out=tmp_path, resume=True, callbacks=[enough])
    assert told == [1, 2, 3, 4, 5]
    assert (tmp_path / "model.safetensors").read_bytes() == model
