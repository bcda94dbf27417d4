"""Training, evaluation and files of densities: known answers, resuming to the same bits, broken files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lunet_fast.density import data
from lunet_fast.density.config import DensityConfig
from lunet_fast.density.evaluation import auroc, divergence, integral, sliced_distance
from lunet_fast.density.files import load_flow
from lunet_fast.density.model import DensityModel, build_flow, whiten
from lunet_fast.density.preprocessing import Preprocessing
from lunet_fast.density.training import _recorded, train_density
from lunet_fast.layers.splines import MonotoneSpline
from lunet_fast.training.files import CheckpointError, RunFolderError
from lunet_fast.training.loop import Interrupted, Progress, Stop
from lunet_fast.training.run import Result

SHORT = DensityConfig(layers=3, components=4, steps=60, round_steps=20, batch_size=32, weight_decay=0.0)


def moons(count: int = 300) -> data.Rows:
    rows = data.read("moons")
    return rows.where(torch.arange(count))


def gaussian(count: int = 4000) -> data.Rows:
    generator = torch.Generator().manual_seed(0)
    mix = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-1.0, 0.3, 0.1]])
    x = torch.randn(count, 3, generator=generator) @ mix.T + torch.tensor([1.0, -2.0, 30.0])
    return data.Rows("gaussian", x)


def weights(result: Result[DensityModel]) -> list[torch.Tensor]:
    return list(result.trained.flow.state_dict().values())


def test_a_linear_flow_learns_a_gaussian() -> None:
    """The entropy of N(., M Mᵀ) is 3/2 log(2 pi e) + log|det M|."""
    rows = gaussian()
    result = train_density(rows, SHORT.replace(layers=1, components=1, steps=600, batch_size=256))
    entropy = 1.5 * math.log(2 * math.pi * math.e) + math.log(2.0 * 0.5 * 0.1)
    error = result.metrics["test_loss_error"]
    assert abs(result.metrics["test_loss"] - entropy) < 4 * error
    assert result.metrics["unit"] == "nats"


def test_whitening_alone_is_that_gaussian() -> None:
    rows = gaussian()
    preprocessing = Preprocessing.of(rows.values, None)
    flow = build_flow(SHORT.replace(layers=1, components=1), 3)
    whiten(flow, preprocessing.forward(rows.values)[0])
    loss = DensityModel(flow, preprocessing, 3).loss(rows.values).double()
    entropy = 1.5 * math.log(2 * math.pi * math.e) + math.log(2.0 * 0.5 * 0.1)
    assert abs(float(loss.mean()) - entropy) < 4 * float(loss.std()) / math.sqrt(len(loss))


def test_a_mixture_learns_the_ring() -> None:
    rows = data.read("ring").where(torch.arange(2000))
    config = DensityConfig(
        layers=1, components=16, steps=800, batch_size=256, weight_decay=0.0, learning_rate=0.02
    )
    result = train_density(rows, config)
    assert result.metrics["kl"] < 0.2
    assert result.metrics["integral"] == pytest.approx(1.0, abs=1e-3)
    # Samples are near the data, as near as other data within a factor.
    assert result.metrics["sample_distance"] < 4 * result.metrics["data_distance"]


def test_conditional_flow_knows_the_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    x = torch.randn(600, 2, generator=generator) * 0.3 + 3.0 * labels.unsqueeze(-1)
    rows = data.Rows("three", x, labels)
    result = train_density(rows, SHORT.replace(conditional=True, components=1, steps=400))
    assert result.metrics["test_accuracy"] > 0.98
    model = result.trained
    # p(x) is the sum over the classes.
    y = model.preprocessing.forward(x)[0]
    total = model.class_log_prob(y).logsumexp(-1) + model.preprocessing.forward(x)[1]
    torch.testing.assert_close(model.log_prob(x), total)
    torch.manual_seed(0)
    drawn = model.sample(200, torch.full((200,), 2))
    assert float((drawn - 6.0).abs().median()) < 1.0
    with pytest.raises(ValueError, match="conditional=True needs labels"):
        train_density(moons(), SHORT.replace(conditional=True))


def test_same_seed_same_weights_and_another_seed_others() -> None:
    first, again, other = (train_density(moons(), SHORT.replace(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))
    assert not torch.equal(weights(first)[0], weights(other)[0])


def test_first_weights_do_not_depend_on_the_global_generator() -> None:
    """Permutations and signs are drawn too."""
    config = SHORT.replace(permutation="random", signs="random", steps=1, round_steps=1)
    torch.manual_seed(1)
    first = train_density(moons(), config)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = train_density(moons(), config)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))


class _StopsAt(Progress):
    def __init__(self, stop: Stop, at: int) -> None:
        self.stop, self.at = stop, at

    def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
        if epoch == self.at:
            self.stop.ask()


@pytest.mark.parametrize("name", ["moons", "digits"])
def test_interrupted_and_resumed_ends_in_the_same_bits(tmp_path: Path, name: str) -> None:
    if name == "digits":
        pytest.importorskip("sklearn")
    rows = moons() if name == "moons" else data.read("digits").where(torch.arange(200))
    whole = train_density(rows, SHORT)
    stop = Stop()
    with pytest.raises(Interrupted):
        train_density(rows, SHORT, out=tmp_path / "run", stop=stop, progress=_StopsAt(stop, 0))
    assert not (tmp_path / "run/metrics.json").exists()
    with pytest.raises(RunFolderError, match="resume=True"):
        train_density(rows, SHORT, out=tmp_path / "run")
    with pytest.raises(RunFolderError, match="layers=3, not 2"):
        train_density(rows, SHORT.replace(layers=2), out=tmp_path / "run", resume=True)
    resumed = train_density(rows, SHORT, out=tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    for name, value in whole.metrics.items():
        if name != "train_seconds":
            assert resumed.metrics[name] == value, name
    # A finished one is read.
    read = train_density(rows, SHORT, out=tmp_path / "run", resume=True)
    assert read.metrics["test_loss"] == whole.metrics["test_loss"]
    assert (tmp_path / "run/loss.png").stat().st_size > 0


def test_patience_ends_a_training_that_gets_no_better() -> None:
    rows = moons(40)
    config = SHORT.replace(steps=4000, patience=3, learning_rate=0.05, average=0.0)
    result = train_density(rows, config)
    rounds, best = result.metrics["rounds"], result.metrics["best_round"]
    assert rounds == best + 3 < 200
    assert min(result.curve.test) == result.curve.test[best - 1]


def test_the_best_rounds_weights_are_the_result() -> None:
    rows = moons(60)
    result = train_density(rows, SHORT.replace(steps=400, learning_rate=0.05, average=0.0, patience=20))
    best = min(result.curve.test)
    parts = data.split(rows, 0)
    assert float(result.trained.loss(parts.validation.values).mean()) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("conditional", [False, True])
def test_file_there_and_back(tmp_path: Path, conditional: bool) -> None:
    rows = replace(moons(), labels=torch.arange(300) % 2)
    result = train_density(rows, SHORT.replace(conditional=conditional, steps=20), out=tmp_path)
    trained = load_flow(tmp_path / "model.safetensors")
    x = rows.values[:20]
    assert torch.equal(trained.model.log_prob(x), result.trained.log_prob(x))
    assert (trained.dataset, trained.config.conditional, trained.image) == ("moons", conditional, None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"features": 3}, "must be floating-point numbers .3., got torch.float64 .2."),
        ({"features": 0}, "features=0 must be a whole number from 1 to"),
        ({"config": {"layers": 400}}, "layers"),
        ({"config": {"colour": 1}}, "unknown setting 'colour'"),
        ({"classes": 2}, "shares must be there with a number for each of 2 classes"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"version": 1}, "version=1 must be 2"),
    ],
)
def test_files_from_outside(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    from lunet_fast.density.files import FLOW_FORMAT
    from lunet_fast.training.files import read_tensors, write_tensors

    train_density(moons(), SHORT.replace(steps=20), out=tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, header = read_tensors(path, FLOW_FORMAT)
    config = {**header["config"], **change.get("config", {})}
    state = {k: v for k, v in header.items() if k not in ("format", "version")}
    write_tensors(path, tensors, FLOW_FORMAT, {**state, **change, "config": config})
    with pytest.raises(CheckpointError, match=told):
        load_flow(path)


def test_a_recommender_is_no_flow(tmp_path: Path) -> None:
    from lunet_fast.training.files import write_tensors

    write_tensors(tmp_path / "x", {"a": torch.zeros(1)}, "lunet-fast checkpoint", {"state": {}})
    with pytest.raises(CheckpointError, match="not a lunet-fast flow file"):
        load_flow(tmp_path / "x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("layers", 1.5),
        ("layers", True),
        ("alpha", 1.0),
        ("slopes", "row"),
        ("permutation", "none"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -1),
        ("average", 1.0),
        ("whiten", 1),
        ("seed", -1),
    ],
)
def test_settings_that_cannot_work(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field}={value!r} (must be|is unknown)"):
        DensityConfig(**{field: value})


def test_settings_and_runs_from_before_splines() -> None:
    old = {"layers": 3, "alpha": 0.3, "weight_decay": 0.2}
    config = DensityConfig.from_dict(old)
    assert (config.activation, config.input_bins) == ("leaky_softplus", 0)
    recorded = _recorded(moons(), None, config)
    assert not {"activation", "bins", "input_bins", "tails"} & recorded.keys()
    with pytest.raises(ValueError, match="input_bins=1 must be 0"):
        DensityConfig(input_bins=1)


@pytest.mark.parametrize(
    "change", [{"activation": "leaky_softplus", "input_bins": 0}, {"tails": "identity"}, {"input_bins": 0}]
)
def test_every_kind_there_and_back(tmp_path: Path, change: dict[str, Any]) -> None:
    result = train_density(moons(), SHORT.replace(steps=20, **change), out=tmp_path)
    trained = load_flow(tmp_path / "model.safetensors")
    x = moons().values[:20]
    assert torch.equal(trained.model.log_prob(x), result.trained.log_prob(x))
    splines = [m for m in trained.model.flow.modules() if isinstance(m, MonotoneSpline)]
    wanted = 0 if "activation" in change else 2 + trained.config.input_bins // 16
    assert len(splines) == wanted


def test_settings_by_way_of_json() -> None:
    config = SHORT.replace(permutation="random", alpha=0.3)
    assert DensityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_auroc_by_counting_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = torch.randint(8, (30,), generator=generator).double() + 1
    outside = torch.randint(8, (20,), generator=generator).double()
    pairs = inside.unsqueeze(-1) - outside
    exact = float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())
    assert auroc(inside, outside) == pytest.approx(exact, abs=1e-12)


def test_sliced_distance_in_one_dimension_is_wassersteins() -> None:
    from scipy.stats import wasserstein_distance

    a, b = torch.randn(200, 1).double(), 1.5 * torch.randn(200, 1).double() + 0.3
    exact = wasserstein_distance(a.flatten().numpy(), b.flatten().numpy()) / float(b.std())
    assert sliced_distance(a, b) == pytest.approx(exact, rel=1e-9)
    assert sliced_distance(a, a) == 0.0


def test_divergence_and_integral_of_the_truth_itself() -> None:
    """A mixture base set to the ring's own centres, on identity layers: KL 0, integral 1."""
    rows = data.read("ring")
    assert rows.target is not None
    config = SHORT.replace(layers=1, components=8, whiten=False)
    flow = build_flow(config, 2)
    with torch.no_grad():
        flow.net.layers[0].lu.zero_()
        flow.base.mean.copy_(rows.target.centres)  # type: ignore[attr-defined]
        flow.base.log_scale.fill_(math.log(0.2))
    model = DensityModel(flow, Preprocessing(), 2)
    kl, error = divergence(model, rows.target, rows=2000)
    assert abs(kl) < 1e-4
    assert error < 1e-5
    assert integral(model, rows.target) == pytest.approx(1.0, abs=1e-4)


def test_a_flow_from_before_splines_says_what_it_said() -> None:
    """``fixtures/flow``: 3 layers on 200 rows of moons, when LeakySoftplus was the only activation."""
    folder = Path(__file__).parents[1] / "fixtures" / "flow"
    expected = json.loads((folder / "expected.json").read_text())
    trained = load_flow(folder / "moons.safetensors")
    found = trained.model.log_prob(torch.tensor(expected["x"]))
    torch.testing.assert_close(found, torch.tensor(expected["log_prob"]), rtol=1e-5, atol=1e-5)
    recorded = json.loads((folder / "config.json").read_text())
    wanted = _recorded(moons(200), None, trained.config)
    del wanted["rows_sha256"]  # which was not recorded then
    assert {**recorded, "source": ""} == {**json.loads(json.dumps(wanted)), "source": ""}
