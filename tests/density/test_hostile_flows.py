"""Flow files from elsewhere: refused with the reason, before anything large is made; nothing in them runs."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lunet_fast.density.config import DensityConfig
from lunet_fast.density.data import Rows
from lunet_fast.density.files import load_flow
from lunet_fast.density.training import train_density
from lunet_fast.training import files
from lunet_fast.training.files import CheckpointError
from tests.training.changes import Change, config, head, lacking, tensor

CONFIG = DensityConfig(
    layers=2,
    bins=4,
    input_bins=4,
    components=2,
    steps=2,
    round_steps=1,
    conditional=True,
    permutation="random",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flow")
    values = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    rows = Rows("made up", values, torch.arange(60) % 3, image=(2, 2), source="a generator")
    train_density(rows, CONFIG, out=out)
    return out / "model.safetensors"


LAYER = "flow.net.net.layers.0"
WRONG: dict[str, tuple[Change, str]] = {
    "a billion layers": (config(layers=10**9), "layers=1000000000 must be a whole number from 1 to 1000"),
    "a thousand layers": (config(layers=1000), "the layers are not layers=1000 ones of 4 features"),
    "many components": (config(components=4 * 10**8), "components=400000000 must be"),
    "more components": (config(components=10**5), "do not fit the model's settings"),
    "more bins": (config(bins=1000), "do not fit the model's settings"),
    "threads": (config(threads=10**9), "threads=1000000000 must be"),
    "a billion features": (head(features=10**9, image=[]), "must be floating-point numbers [1000000000]"),
    "features beyond integers": (head(features=10**30), "features="),
    "a billion classes": (head(classes=10**9), "shares must be there with a number for each of 1000000000"),
    "no classes": (head(classes=0), "shares must be there"),
    "levels beyond floats": (head(levels=10**400), "levels=a number of 1329 bits"),
    "levels": (head(levels=10**12), "levels=1000000000000 must be"),
    "a picture of another size": (head(image=[2, 3]), "is no picture of 4 features"),
    "a picture of one side": (head(image=[4]), "is no picture of 4 features"),
    "a picture of terabytes": (head(image=[10**12, 1]), "image"),
    "unconditional": (config(conditional=False), "classes is 3 with conditional=False"),
    "unknown setting": (config(depth=3), "depth"),
    "unknown key": (head(more=1), "unknown key 'more'"),
    "no data set": (lacking("dataset"), "lacks 'dataset'"),
    "a permutation missing": (lacking(f"{LAYER}.permutation"), "is missing"),
    "a permutation of floats": (tensor(f"{LAYER}.permutation", Tensor.float), "is of dtype"),
    "no permutation": (tensor(f"{LAYER}.permutation", torch.zeros_like), "permutation"),
    "out of range": (tensor(f"{LAYER}.permutation", lambda t: t + 10**9), "permutation"),
    "no signs": (tensor(f"{LAYER}.sign", torch.zeros_like), "signs, 1 and -1"),
    "a layer of doubles": (tensor(f"{LAYER}.lu", Tensor.double), "is of dtype"),
    "a layer cut short": (tensor(f"{LAYER}.lu", lambda t: t[:3]), "the layers are not"),
    "a spline's grid": (tensor("flow.net.net.input.grid", torch.zeros_like), "grid must hold finite numbers"),
    "a tensor too many": (lambda tensors, header: tensors.update(more=torch.ones(1)), "'more' is not of"),
    "shares of a table": (tensor("shares", lambda t: t[None]), "shares must be there"),
    "shares below 0": (tensor("shares", lambda t: torch.tensor([2.0, -1.0, 0.0])), "sum 1"),
    "shares of integers": (tensor("shares", lambda t: torch.tensor([1, 0, 0])), "shares must be floating"),
    "shares of nothing": (tensor("shares", torch.zeros_like), "sum 1"),
    "a scale of 0": (tensor("preprocessing.scale", torch.zeros_like), "scale must be above 0"),
    "a scale of one": (tensor("preprocessing.scale", lambda t: t[:1]), "preprocessing.scale must be"),
    "no shift": (lacking("preprocessing.shift"), "belong together"),
}


def changed(file: Path, change: Change, target: Path) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lunet_fast"])
    tensors = load_file(file)
    change(tensors, header)
    del header["sha256"]
    header["sha256"] = files.digest(tensors, header)
    save_file(tensors, target, metadata={"lunet_fast": json.dumps(header)})


@pytest.mark.parametrize("kind", WRONG)
def test_is_refused(kind: str, written: Path, tmp_path: Path) -> None:
    change, reason = WRONG[kind]
    file = tmp_path / "model.safetensors"
    changed(written, lambda tensors, header: None, file)
    load_flow(file)
    changed(written, change, file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        load_flow(file)
    assert reason in str(caught.value)
    assert str(file) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB more than were needed"
