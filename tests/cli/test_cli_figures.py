"""``--json``, ``--quiet`` and ``--device`` of the commands that compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer

from lunet_fast.cli import app
from tests.cli.conftest import Trained
from tests.cli.invoke import run
from tests.recsys.synthetic import latent_frame

SHORT = ("--epochs", 1, "--members", 1, "--embedding-size", 4, "--no-mlp")
COMPUTING = ("train", "evaluate", "recommend", "predict", "tune", "reproduce", "bench")
DENSITY = ("train", "evaluate", "sample")


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "films.csv"
    latent_frame().to_csv(path, index=False)
    return path


def found(*arguments: object) -> dict[str, Any]:
    """What ``--json`` prints: one object, and nothing on stderr."""
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def test_train_and_evaluate(csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    metrics = found("train", "-d", csv, "-o", out, *SHORT)
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert found("train", "-d", csv, "-o", out, *SHORT, "--resume") == metrics
    evaluated = found("evaluate", "--run", out, "--out", tmp_path / "again.json")
    assert evaluated == json.loads((tmp_path / "again.json").read_text())
    assert evaluated["test_mse"] == pytest.approx(metrics["test_mse"])


def test_quiet_training_shows_the_result_alone(csv: Path, tmp_path: Path) -> None:
    result = run("train", "-d", csv, "-o", tmp_path / "run", *SHORT, "--quiet")
    assert result.exit_code == 0, result.output
    assert "epoch 1/1" not in result.output
    assert "Test part: 240 ratings" in result.output


def test_compare(csv: Path, tmp_path: Path) -> None:
    values = found("compare", "-d", csv, "-o", tmp_path, "--methods", "biases")
    assert [row["key"] for row in values["rows"]] == ["biases"]


def test_tune(csv: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    out = tmp_path / "s.json"
    values = found("tune", "-d", csv, "--trials", 1, "--epochs", 1, "--members", 1, "--out", out)
    assert (values["trials"], values["measure"]) == (1, "test_mse")
    assert values["settings"] == json.loads(out.read_text())
    assert (values["settings"]["gamma"], values["settings"]["members"]) == (1.0, 1)


def test_density(tmp_path: Path) -> None:
    out = tmp_path / "moons"
    short = ("--steps", 100, "--layers", 2, "--components", 2, "--dataset", "moons")
    metrics = found("density", "train", *short, "--out", out)
    assert metrics == json.loads((out / "metrics.json").read_text())
    again = found("density", "evaluate", "--run", out, "--device", "cpu")
    assert again["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-6)
    quiet = run("density", "sample", "--run", out, "-n", 2, "--out", tmp_path / "x.csv", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_predict(trained: Trained, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pd.DataFrame({"user": [42, 3], "item": [7, 999]}).to_csv(pairs, index=False)
    result = run("predict", "--run", trained.folder, "--pairs", pairs, "--json", "--device", "cpu")
    assert result.stderr == ""  # the note on the unknown item is not for programs
    rows = json.loads(result.stdout)
    assert [(row["user"], row["item"]) for row in rows] == [("42", "7"), ("3", "999")]
    expected = trained.recommender.predict([42, 3], [7, 999])
    assert np.array_equal(np.array([row["prediction"] for row in rows], np.float32), expected)


def test_quiet_recommendations_have_no_notes(trained: Trained) -> None:
    result = run("recommend", "--run", trained.folder, "--user", "nobody", "-k", 1, "-q", "--format", "json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(json.loads(result.stdout)) == 1


def test_quiet_doctor_names_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from lunet_fast import doctor

    findings = [doctor.Finding("check", "one", "ok", "good"), doctor.Finding("check", "two", "broken", "bad")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    result = run("doctor", "--quiet")
    assert result.exit_code == 1
    assert ("good" in result.output, "bad" in result.output) == (False, True)


class TestDevice:
    def test_every_command_that_computes_has_it(self) -> None:
        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        chosen = {name: commands[name] for name in COMPUTING}
        chosen |= {f"density {name}": commands["density"].commands[name] for name in DENSITY}
        for name, command in chosen.items():
            options = [option for param in command.params for option in param.opts]
            assert {"--device", "--quiet"} <= set(options), name

    @pytest.mark.parametrize(
        "words",
        [
            ("predict", "--user", "1", "--item", "1"),
            ("density", "evaluate"),
            ("density", "sample"),
            ("bench",),
        ],
    )
    def test_one_that_is_not_there_is_named(self, words: tuple[str, ...]) -> None:
        result = run(*words, "--device", "nowhere")
        assert result.exit_code == 2
        assert "--device nowhere: no such device; use cpu, cuda or cuda:1" in " ".join(result.output.split())
