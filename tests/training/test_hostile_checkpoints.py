"""Checkpoints with a digest that is right and contents that are not: refused before anything is put back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lunet_fast.density.config import DensityConfig
from lunet_fast.density.data import Rows
from lunet_fast.density.training import train_density
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.model.training import train
from lunet_fast.training import files
from lunet_fast.training.files import CheckpointError
from lunet_fast.training.loop import DivergenceError, Interrupted, Progress, Stop
from tests.recsys.synthetic import latent_frame, quick_config
from tests.training.changes import Change, added, lacking, tensor

FLOW = DensityConfig(layers=2, bins=4, input_bins=4, components=2, steps=6, round_steps=3, signs="random")
RECOMMENDER = quick_config(epochs=3, mlp=False, gamma=0.5, embedding_size=2, batch_size=64)
SAMPLED = recipe(
    "best", 1000, inference="gibbs", epochs=3, members=2, mlp=False, embedding_size=2, split="random"
)


class StopAfter(Progress):
    """Asks the training to stop once so many epochs are done."""

    def __init__(self, stop: Stop, epochs: int) -> None:
        self.stop, self.epochs = stop, epochs

    def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
        if epoch + 1 == self.epochs:
            self.stop.ask()


def rows() -> Rows:
    values = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    return Rows("made up", values, source="a generator")


def ratings() -> Ratings:
    return from_frame(latent_frame(9, 7, 40, text_ids=True), scale=(1, 5))


def go_on(kind: str, out: Path, **options: Any) -> Any:
    """The training of that kind in the folder, resumed."""
    if kind == "flow":
        return train_density(rows(), FLOW, out=out, resume=True, **options).trained.flow
    config = RECOMMENDER if kind == "recommender" else SAMPLED
    return train(ratings(), config, out=out, resume=True, **options).trained.model


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of each kind of training, stopped after its first epoch, and the folder it is in."""
    found = {}
    for kind in KINDS:
        name = "flow" if kind == "flow" else "lu-net"
        out, stop = tmp_path_factory.mktemp(kind), Stop()
        with pytest.raises(Interrupted):
            go_on(kind, out, stop=stop, progress=StopAfter(stop, 1))
        found[kind] = out / "checkpoints" / f"{name}.safetensors"
    return found


def states(**changes: Any) -> Change:
    return lambda tensors, state: state.update(changes)


LU = "flow.net.layers.0.lu"
FLOWS: dict[str, tuple[Change, str]] = {
    "a parameter missing": (lacking(f"module.{LU}"), "is missing"),
    "a parameter too many": (added("module.more", torch.ones(1)), "'more' is too many"),
    "a tensor of nothing": (added("other", torch.ones(1)), "'other' is too many"),
    "a parameter's shape": (tensor(f"module.{LU}", lambda t: t[:2]), "of shape"),
    "a parameter's dtype": (tensor(f"module.{LU}", Tensor.double), "of dtype"),
    "a moment's shape": (tensor(f"optimizer.{LU}.exp_avg", lambda t: t[:1, :1]), "must be torch.float32"),
    "a moment of nothing": (tensor(f"optimizer.{LU}.exp_avg_sq", lambda t: t[:0]), "must be torch.float32"),
    "a moment's dtype": (tensor(f"optimizer.{LU}.exp_avg_sq", Tensor.half), "must be torch.float32"),
    "a moment missing": (lacking(f"optimizer.{LU}.exp_avg"), "exp_avg' is missing"),
    "a second moment below 0": (tensor(f"optimizer.{LU}.exp_avg_sq", lambda t: t - 1), "is below 0"),
    "no count of steps": (lacking(f"optimizer.{LU}.step"), "step' is missing"),
    "steps of a table": (tensor(f"optimizer.{LU}.step", lambda t: t.expand(3)), "must be a number of steps"),
    "steps as integers": (tensor(f"optimizer.{LU}.step", Tensor.long), "must be a number of steps"),
    "steps in half precision": (tensor(f"optimizer.{LU}.step", Tensor.half), "must be a number of steps"),
    "steps below 1": (tensor(f"optimizer.{LU}.step", torch.zeros_like), "must be a number of steps"),
    "a third moment": (added(f"optimizer.{LU}.max_exp_avg_sq", torch.ones(3, 3)), "is too many"),
    "a moment of nobody": (added("optimizer.nobody.step", torch.ones(())), "is too many"),
    "no generator": (lacking("generator"), "generator"),
    "a generator cut short": (tensor("generator", lambda t: t[:100]), "RNG state"),
    "a generator of zeros": (tensor("generator", torch.zeros_like), "mt19937"),
    "a generator of floats": (tensor("generator", Tensor.float), "ByteTensor"),
    "an epoch's generator of zeros": (tensor("own.at_epoch", torch.zeros_like), "mt19937"),
    "no epoch's generator": (
        lacking("own.at_epoch"),
        "must be errors and at_epoch",
    ),
    "errors of more steps": (tensor("own.errors", lambda t: torch.ones(2)), "own.errors must be"),
    "errors as integers": (tensor("own.errors", Tensor.int), "own.errors must be"),
    "an own tensor too many": (added("own.more", torch.ones(1)), "must be errors and at_epoch"),
    "updates below 0": (tensor("module.updates", lambda t: t - 13), "must be a number of at least 0"),
    "counters as floats": (tensor("module.offered", Tensor.float), "of dtype"),
    "other signs": (tensor("module.flow.net.layers.0.sign", Tensor.neg), "another structure"),
    "no signs": (tensor("module.flow.net.layers.0.sign", torch.zeros_like), "another structure"),
    "no range of a spline": (
        tensor("module.flow.net.input.grid", torch.zeros_like),
        "grid must hold finite numbers",
    ),
    "no epoch": (lacking("epoch"), "lacks 'epoch'"),
    "an epoch too many": (states(epoch=3), "3 epochs, and this training 0 to 2"),
    "an epoch below 0": (states(epoch=-1), "epoch=-1 must be"),
    "an epoch in words": (states(epoch="1"), "epoch='1' must be a whole number"),
    "an epoch without its loss": (states(train_loss=[]), "0 train_loss, and this training 1"),
    "losses too many": (states(test_loss=[1.0, 2.0]), "2 test_loss, and this training 1"),
    "losses of words": (states(train_loss=["low"]), "train_loss"),
    "losses of nothing": (states(train_loss=[None]), "train_loss"),
    "no losses": (states(train_loss=None), "train_loss"),
    "time runs backwards": (states(elapsed=[-1.0]), "elapsed"),
    "a step too many": (states(step=4), "4 steps, and this training 0 to 3"),
    "a billion steps": (states(step=10**9), "1000000000 steps"),
    "a step beyond integers": (states(step=10**30), "step="),
    "another phase": (states(phase="MLP\x1b[31m"), r"the phase is 'MLP\x1b[31m', not 'flow'"),
    "a state of more": (states(more=1), "unknown setting 'more'"),
}
RECOMMENDERS: dict[str, tuple[Change, str]] = {
    "items out of range": (
        tensor("module.interactions.indices", lambda t: t + 10**6),
        "'interactions.indices' is that of other data",
    ),
    "rows out of range": (tensor("module.interactions.indptr", lambda t: t * 1000), "of other data"),
    "rows as floats": (tensor("module.interactions.indptr", Tensor.float), "of dtype"),
    "a moment's shape": (
        tensor("optimizer.user_embedding.weight.exp_avg", lambda t: t[:, :1]),
        "must be torch.float32",
    ),
    "fewer users": (tensor("module.user_embedding.weight", lambda t: t[:3]), "of shape"),
}
SAMPLINGS: dict[str, tuple[Change, str]] = {
    "no vectors": (lacking("own.user.vectors"), "'user.vectors' is missing"),
    "vectors of fewer users": (tensor("own.user.vectors", lambda t: t[:3]), "of shape"),
    "single precision": (tensor("own.item.mean", Tensor.float), "of dtype"),
    "precisions of 0": (tensor("own.item.precision", torch.zeros_like), "must be above 0"),
    "weights without a penalty": (tensor("own.user.weights_precision", Tensor.neg), "must be above 0"),
    "no noise": (tensor("own.noise", torch.zeros_like), "'noise' must be above 0"),
    "an own tensor too many": (added("own.more", torch.ones(1)), "'more' is too many"),
    "no sum over members": (lacking("own.summed"), "own.summed must be torch.float64"),
    "a sum of other rows": (tensor("own.summed", lambda t: t[1:]), "own.summed must be torch.float64"),
    "a generator": (added("generator", torch.ones(8, dtype=torch.uint8)), "'generator' is too many"),
    "an optimiser": (added("optimizer.weight.step", torch.ones(())), "is too many"),
    "a sweep too many": (states(epoch=4), "4 epochs, and this training 0 to 3"),
    "steps": (states(step=1), "1 steps, and this training 0"),
    "members missing": (lacking("module.user_bias"), "is missing"),
    "other data": (tensor("module.interactions.indices", lambda t: t + 1), "of other data"),
}
KINDS = {"flow": FLOWS, "recommender": RECOMMENDERS, "sampling": SAMPLINGS}
CASES = [(training, kind) for training, cases in KINDS.items() for kind in cases]


def changed(file: Path, change: Change, target: Path) -> None:
    """The checkpoint with a change, and with the digest that then belongs to it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lunet_fast"])
    tensors = load_file(file)
    change(tensors, header["state"])
    del header["sha256"]
    header["sha256"] = files.digest(tensors, header)
    save_file(tensors, target, metadata={"lunet_fast": json.dumps(header)})


@pytest.mark.parametrize(("training", "kind"), CASES)
def test_is_refused(training: str, kind: str, interrupted: dict[str, Path], tmp_path: Path) -> None:
    file = interrupted[training]
    change, reason = KINDS[training][kind]
    checkpoint = tmp_path / "checkpoints" / file.name
    checkpoint.parent.mkdir()
    (tmp_path / "config.json").write_bytes((file.parents[1] / "config.json").read_bytes())
    changed(file, change, checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        go_on(training, tmp_path)
    assert reason in str(caught.value)
    assert str(checkpoint) in str(caught.value)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("training", KINDS)
def test_unchanged_it_is_taken_up(training: str, interrupted: dict[str, Path], tmp_path: Path) -> None:
    """So that it is the changes that are refused; and the end is that of a training left alone."""
    file = interrupted[training]
    checkpoint = tmp_path / "checkpoints" / file.name
    checkpoint.parent.mkdir()
    (tmp_path / "config.json").write_bytes((file.parents[1] / "config.json").read_bytes())
    changed(file, lambda tensors, state: None, checkpoint)
    found = go_on(training, tmp_path).state_dict()
    whole = go_on(training, tmp_path / "whole").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.items())


def test_weights_that_say_nothing_finite_end_as_a_divergence(
    interrupted: dict[str, Path], tmp_path: Path
) -> None:
    """What the held-out rows are worth is not finite, though the training rows' loss may be."""
    file = interrupted["flow"]
    checkpoint = tmp_path / "checkpoints" / file.name
    checkpoint.parent.mkdir()
    (tmp_path / "config.json").write_bytes((file.parents[1] / "config.json").read_bytes())
    change = tensor("module.average.net.layers.0.bias", lambda t: torch.full_like(t, 3e38))
    changed(file, change, checkpoint)
    with pytest.raises(DivergenceError, match="held-out data is"):
        go_on("flow", tmp_path)


def test_nothing_is_put_back_of_what_is_refused(interrupted: dict[str, Path], tmp_path: Path) -> None:
    from lunet_fast.training.checkpoints import load_training, save_training

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.Generator]:
        module = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam(module.parameters(), fused=True)
        module(torch.ones(3)).sum().backward()
        optimizer.step()
        return module, optimizer, torch.Generator().manual_seed(3)

    file, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    state: dict[str, Any] = {"phase": "x", "epoch": 0, "train_loss": [], "test_loss": [], "elapsed": []}
    save_training(file, *made(), state, {})
    changed(file, tensor("optimizer.bias.exp_avg", lambda t: t[:1]), bad)
    module, optimizer, generator = made()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    moments = optimizer.state[module.weight]["exp_avg"].clone()
    drawn = generator.get_state()
    with pytest.raises(CheckpointError, match="exp_avg"):
        load_training(bad, module, optimizer, generator, lambda state, own: None)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(optimizer.state[module.weight]["exp_avg"], moments)
    assert torch.equal(generator.get_state(), drawn)
    load_training(file, module, optimizer, generator, lambda state, own: None)
    assert not torch.equal(module.weight, before["weight"])
