"""Runs of suites: kept, read again, shown, drawn, and by the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lunet_fast.bench import cached, claims, layers, plots, results, stacks
from lunet_fast.bench.contest import Contest, Spec
from lunet_fast.cli import app

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites of a few tiny sizes."""

    def of_layers(scale: str) -> list[Spec]:
        return [Spec("layers", what, 8, 4) for what in layers.OPERATIONS]

    def of_claims(scale: str) -> list[Spec]:
        return [Spec("claims", "inverse, linear part", D, 1) for D in (256, 272, 288)]

    def of_stacks(scale: str) -> list[Spec]:
        return [Spec("stacks", what, 6, 5, "M = 2") for what in stacks.OPERATIONS]

    def of_cached(scale: str) -> list[Spec]:
        return [Spec("cached", what, 8, 4) for what in cached.OPERATIONS]

    suites = ((layers, of_layers), (cached, of_cached), (claims, of_claims), (stacks, of_stacks))
    for module, specs in suites:
        monkeypatch.setattr(module, "specs", specs)
    monkeypatch.setattr(results, "measure_rates", lambda *a: results.Rates(1e11, 1e10))


def run(suite: str) -> results.Result:
    return results.run_suite(suite, "quick", CPU, torch.float32, seconds=0.0)


@pytest.mark.parametrize("suite", ["layers", "cached", "claims", "stacks"])
def test_a_run_survives_being_saved(suite: str, tmp_path: Path) -> None:
    result = run(suite)
    path = result.save(tmp_path / "result.json")
    assert results.Result.load(path) == result
    assert json.loads(path.read_text())["machine"]["torch"] == torch.__version__
    text = results.markdown(result)
    for row in result.rows:
        assert f"| {row.contender} | {results.seconds_text(row.median)} |" in text
    plots.draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_claims_come_with_counts_and_verdicts() -> None:
    result = run("claims")
    assert [count.features for count in result.counts] == [256, 272, 288]
    text = "\n".join(claims.verdicts(result.rows, result.counts))
    assert "operations of the inverse a sample ∝ D^2.00" in text
    assert "log-determinant ∝ D^1.00" in text


@pytest.mark.parametrize(
    ("slope", "promised", "word"),
    [((2.0, 0.1), 2.0, "holds"), ((2.3, 0.1), 2.0, "does not hold"), ((2.0, 0.9), 2.0, "neither shown")],
)
def test_verdict(slope: tuple[float, float], promised: float, word: str) -> None:
    assert word in claims._verdict(claims.Slope(*slope), promised)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rates": 1}', '{"suite": "layers", "rows": [{}]}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a result of `lunet-fast bench`"):
        results.Result.load(tmp_path / "x.json")


def test_texts() -> None:
    assert results.seconds_text(0.00123) == "1.23 ms"
    assert results.seconds_text(2e-8) == "20 ns"
    assert results.bytes_text(None) == ""
    assert results.bytes_text(2_500_000) == "2.5 MB"


# --- lunet-fast bench -----------------------------------------------------------------------------------


def bench(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["bench", *arguments])
    return found.exit_code, found.output


def test_command(tmp_path: Path) -> None:
    code, output = bench("layers", "stacks", "--seconds", "0", "--out", str(tmp_path))
    assert code == 0, output
    for word in ("nn.Linear + softplus", "torch.linalg.slogdet", "zuko RealNVP", "times the floor"):
        assert word in output
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == [
        f"{suite}-cpu.{kind}" for suite in ("layers", "stacks") for kind in ("json", "md", "png")
    ]
    code, output = bench("layers", "--seconds", "0", "--baseline", str(tmp_path))
    assert code == 0, output
    assert "ratio before" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed",), "'speed' is no suite"),
        (("--scale", "huge"), "--scale huge"),
        (("--dtype", "float16"), "--dtype float16"),
        (("--device", "nowhere"), "nowhere"),
        (("--baseline", "/nonexistent"), "layers-cpu.json"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], message: str) -> None:
    code, output = bench(*arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output


def test_nothing_is_kept_of_a_run_whose_check_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.contests

    def wrong(*arguments: object) -> Iterator[Contest]:
        *first, last = right(*arguments)  # type: ignore[arg-type]
        yield from first
        yield Contest(last.spec, last.runs, dict.fromkeys(last.runs, 1.0), last.tolerance)

    monkeypatch.setattr(layers, "contests", wrong)
    code, output = bench("layers", "--seconds", "0", "--out", str(tmp_path))
    assert code == 1
    assert "nothing is timed" in output
    assert "times ours" not in output
    assert not list(tmp_path.iterdir())
