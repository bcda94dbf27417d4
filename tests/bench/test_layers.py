"""Benchmarks of layers and flows: who takes part computes the right thing, and a wrong one stops the run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lunet_fast.bench import cached, claims, contenders, layers, stacks
from lunet_fast.bench.contest import CheckFailed, Contest, Spec, compete, time_in_turn
from lunet_fast.bench.machine import Rates, measure_rates, peak_bytes
from lunet_fast.ops.cpu.matrix import least_rows_for_inverse

CPU = torch.device("cpu")
RATES = Rates(flops=1e11, bytes=1e10)
PLAIN = [kind for kind in contenders.CONTENDERS if kind is not contenders.Compiled]


@pytest.mark.parametrize("what", layers.OPERATIONS)
@pytest.mark.parametrize(("features", "rows"), [(5, 3), (33, 70), (130, 7)])
def test_every_contender_is_right(what: str, features: int, rows: int) -> None:
    contest = layers.build(Spec("layers", what, features, rows), CPU, kinds=PLAIN)
    contest.check()
    assert not contest.missing
    assert set(contest.errors) == set(contest.runs)
    assert contest.ours in contest.runs
    assert len(contest.runs) >= 2


@pytest.mark.slow
def test_compiled_contender_is_right() -> None:
    kinds = (contenders.Ours, contenders.Compiled)
    layers.build(Spec("layers", "forward + backward", 33, 70), CPU, kinds=kinds).check()


@pytest.mark.parametrize("what", layers.OPERATIONS)
def test_a_wrong_contender_is_found(what: str) -> None:
    """Off by one part in a thousand, in whatever it offers."""

    class Wrong(contenders.Original):
        def __init__(self, problem: contenders.Problem) -> None:
            super().__init__(dataclasses.replace(problem, log_diagonal=problem.log_diagonal))
            scale = 1.001
            forward, inverse, active = self.forward, self.inverse, self.active_inverse
            logabsdet = self.logabsdet
            for each in (forward, inverse, active, logabsdet):
                assert each is not None
            self.forward = lambda x: forward(x) * scale
            self.inverse = lambda y: inverse(y) * scale
            self.active_inverse = lambda y: active(y) * scale
            self.logabsdet = lambda: logabsdet() + 0.001 * problem.features

    contest = layers.build(Spec("layers", what, 20, 9), CPU, kinds=(contenders.Ours, Wrong))
    with pytest.raises(CheckFailed, match="original LU-Net's way has relative error"):
        contest.check()


def test_nothing_is_timed_after_a_failed_check() -> None:
    called = []
    spec = Spec("layers", "forward", 4, 4)
    contest = Contest(spec, {"LUDense": lambda: called.append(1)}, {"LUDense": float("nan")}, tolerance=1e-5)
    with pytest.raises(CheckFailed):
        compete(contest, 0.01, RATES, CPU)
    unchecked = dataclasses.replace(contest, errors={})
    with pytest.raises(CheckFailed):
        compete(unchecked, 0.01, RATES, CPU)
    assert not called


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    kinds = (contenders.Ours, contenders.Nflows, contenders.Zuko)
    contest = layers.build(Spec("layers", "forward", 4, 4), CPU, kinds=kinds)
    assert set(contest.missing) == {"nflows LULinear", "zuko LULinearTransform"}
    assert "pip install 'lunet-fast[bench]'" in contest.missing["nflows LULinear"]


def test_turns_alternate_and_rows_hold_what_was_measured() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timed = time_in_turn(runs, 0.0, CPU)
    assert {len(times) for times, _ in timed.values()} == {3}
    contest = Contest(
        Spec("layers", "x", 4, 8),
        runs,
        {"a": 0.0, "b": 0.0},
        tolerance=1.0,
        flops=1e6,
        bytes_moved=10.0,
        ours="a",
    )
    rows = compete(contest, 0.0, RATES, CPU, memory=False)
    assert [row.contender for row in rows] == ["a", "b"]
    assert [row.ours for row in rows] == [True, False]
    assert all(row.quartiles[0] <= row.median <= row.quartiles[1] for row in rows)
    assert rows[0].ratio == 1.0
    assert rows[0].floor == pytest.approx(1e6 / RATES.flops)


def test_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    assert RATES.floor(2e11, 1e9) == pytest.approx(2.0)
    assert RATES.floor(1e9, 5e10) == pytest.approx(5.0)


@pytest.mark.slow
def test_measured_rates_are_those_of_a_computer() -> None:
    rates = measure_rates()
    assert 1e8 < rates.flops < 1e15
    assert 1e8 < rates.bytes < 1e13


def test_peak_memory_is_counted() -> None:
    def run() -> None:
        first = torch.empty(1000, 1000)
        del first
        torch.empty(500, 1000)

    assert peak_bytes(run, CPU) == pytest.approx(4_000_000, rel=0.01)


# --- claims ---------------------------------------------------------------------------------------------


def test_counted_operations_are_those_of_substitution() -> None:
    for D in (1, 2, 7, 40):
        assert claims.counted_inverse(D) == D + 2 * D * (D - 1) + D
        assert claims.counted_logabsdet(D) == 7 * D


def test_executed_operations_contain_those_needed() -> None:
    for D in (16, 100, 300):
        executed, setup = claims.executed_inverse(D, active=False, rows=2048)
        assert claims.counted_inverse(D) <= executed <= 2.5 * claims.counted_inverse(D)
        assert (setup > 0) == (least_rows_for_inverse(D) <= 2048)  # A⁻¹, or no matrix is formed
    # With an activation there is O(D) more of it for each row.
    more = claims.executed_inverse(100, active=True, rows=2048)[0]
    assert 500 < more - claims.executed_inverse(100, active=False, rows=2048)[0] < 10_000


def test_slopes_of_known_powers() -> None:
    sizes = [256, 512, 1024, 2048]
    assert claims.fit(sizes, [3.0 * D**2 for D in sizes]).exponent == pytest.approx(2.0)
    assert claims.fit(sizes, [3.0 * D**2 for D in sizes]).band == pytest.approx(0.0, abs=1e-9)
    noisy = claims.fit(sizes, [D**1.5 * noise for D, noise in zip(sizes, (1.1, 0.9, 1.1, 0.9), strict=True)])
    assert abs(noisy.exponent - 1.5) < noisy.band < 1.0
    with pytest.raises(ValueError, match="at least 3"):
        claims.fit([1, 2], [1, 2])


def test_band_is_that_of_a_textbook() -> None:
    """Against the closed form with t = 4.303 for two degrees of freedom, in logarithms of base e."""
    torch.manual_seed(0)
    xs = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    ys = 2 * xs + torch.tensor([0.1, -0.2, 0.15, -0.05], dtype=torch.float64)
    design = torch.stack([torch.ones(4, dtype=torch.float64), xs], 1)
    solution = torch.linalg.lstsq(design, ys).solution
    variance = (ys - design @ solution).square().sum() / 2 * torch.linalg.inv(design.T @ design)[1, 1]
    found = claims.fit(xs.exp().tolist(), ys.exp().tolist())
    assert found.exponent == pytest.approx(float(solution[1]))
    assert found.band == pytest.approx(4.303 * float(variance.sqrt()))


# --- parameters that stay as they are ------------------------------------------------------------------


@pytest.mark.parametrize("what", cached.OPERATIONS)
def test_every_layer_with_kept_matrices_is_right(what: str) -> None:
    contest = cached.build(Spec("cached", what, 12, 40), CPU)
    contest.check()
    assert not contest.missing
    assert set(contest.runs) == set(cached.CONTENDERS)


# --- flows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", stacks.OPERATIONS)
def test_every_flow_is_right(what: str) -> None:
    contest = stacks.build(Spec("stacks", what, 12, 40, "M = 3"), CPU)
    contest.check()
    assert not contest.missing
    for run in contest.runs.values():
        run()
    ours = contest.parameters["LUFlow"]
    assert ours == 3 * (12 * 12 + 12)
    for name in ("zuko RealNVP", "zuko MAF"):
        assert abs(contest.parameters[name] - ours) < 0.15 * ours
