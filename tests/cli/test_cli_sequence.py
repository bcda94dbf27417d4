"""Recipe sequence on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.cli.invoke import run, squeezed
from tests.recsys.synthetic import cyclic_ratings

RATINGS = cyclic_ratings()
SHORT = ["--epochs", 12, "--embedding-size", 8, "--length", 6, "--batch-size", 200, "--lr", 0.02]
SHORT += ["--dropout", 0, "--decays", 2]


def frame() -> pd.DataFrame:
    columns = {name: getattr(RATINGS, name) for name in ("user", "item", "rating", "timestamp")}
    return pd.DataFrame(columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sequence")
    frame().to_csv(place / "steps.csv", index=False)
    result = run("train", "-d", place / "steps.csv", "-o", place / "run", "--recipe", "sequence", *SHORT)
    assert result.exit_code == 0, result.output
    assert "Ranking: each user's latest, 40 users" in result.output
    return place


def test_what_is_written(folder: Path) -> None:
    values = json.loads((folder / "run" / "metrics.json").read_text())
    assert {"hr@10", "ndcg@10", "full_ndcg@10", "reconstruction_error_relative"} <= values.keys()
    assert (values["recipe"], values["split"], values["held_out_ratings"]) == (
        "sequence",
        "leave-one-out",
        40,
    )
    config = json.loads((folder / "run" / "config.json").read_text())
    assert (config["length"], config["decays"], config["network"]) == (6, 2, "lu-net")


def test_a_finished_training_is_not_repeated(folder: Path) -> None:
    command = ["train", "-d", folder / "steps.csv", "-o", folder / "run", "--recipe", "sequence", *SHORT]
    assert "nothing to do" in run(*command, "--resume").output
    other = run(*command, "--network", "identity", "--resume")
    assert other.exit_code == 2
    assert "network" in other.output


def test_commands_on_the_run(folder: Path) -> None:
    recommended = run("recommend", "--run", folder / "run", "--user", 3, "-k", 2, "--format", "csv")
    assert recommended.exit_code == 0, recommended.output
    assert len(recommended.stdout.strip().splitlines()) == 3
    evaluated = run("evaluate", "--run", folder / "run", "--json")
    assert evaluated.exit_code == 0, evaluated.output
    values = json.loads((folder / "run" / "metrics.json").read_text())
    found = json.loads(evaluated.stdout)
    assert found["full_ndcg@10"] == values["full_ndcg@10"]
    assert found["by_gap"] == values["by_gap"]
    assert found["by_gap"].keys() == {"up to a minute"}
    assert "up to a minute" in run("evaluate", "--run", folder / "run").output
    for command in (["predict", "--user", 1, "--item", 2], ["export", "--out", folder / "vectors"]):
        refused = run(*command, "--run", folder / "run")
        assert refused.exit_code != 0
        assert "recipe'sequence'ranks" in squeezed(refused.output)


def test_a_file_without_ratings(folder: Path, tmp_path: Path) -> None:
    frame().drop(columns="rating").to_csv(tmp_path / "clicks.csv", index=False)
    result = run("train", "-d", tmp_path / "clicks.csv", "-o", tmp_path / "run", "-r", "sequence", *SHORT)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gamma", 0.5], "gamma"),
        (["--gamma", 0.5, "--members", 2], "gamma"),
        (["--no-order", "--length", 500, "--batch-size", 100], "--length 500"),
        (["--train-file", "a", "--test-file", "b"], "--recipe sequence"),
        (["--stream"], "--recipe sequence"),
        (["--split", "random"], "split"),
    ],
)
def test_options_of_other_recipes(folder: Path, tmp_path: Path, options: list, message: str) -> None:
    result = run("train", "-d", folder / "steps.csv", "-o", tmp_path / "x", "-r", "sequence", *options)
    assert result.exit_code == 2
    assert squeezed(message) in squeezed(result.output)
    assert not (tmp_path / "x").exists()


def test_options_of_this_recipe_elsewhere(folder: Path, tmp_path: Path) -> None:
    result = run("train", "-d", folder / "steps.csv", "-o", tmp_path / "x", "--length", 6)
    assert result.exit_code == 2
    assert "length" in result.output


@pytest.mark.parametrize("option", ["--text", "--social"])
def test_further_sources_are_of_this_recipe(folder: Path, tmp_path: Path, option: str) -> None:
    result = run("train", "-d", folder / "steps.csv", "-o", tmp_path / "x", option, "whatever")
    assert result.exit_code == 2
    assert squeezed(f"{option} is for --recipe sequence") in squeezed(result.output)
    assert not (tmp_path / "x").exists()


def test_every_source(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    films = pd.DataFrame({"item": range(32), "about": [f"place {i // 4} of many" for i in range(32)]})
    films.to_csv(tmp_path / "films.csv", index=False)
    ties = pd.DataFrame({"user": range(40), "friend": [(u + 2) % 40 for u in range(40)]})
    ties.to_csv(tmp_path / "ties.csv", index=False)
    frame().assign(plays=3).to_csv(tmp_path / "plays.csv", index=False)
    command = ["train", "-d", tmp_path / "plays.csv", "-o", tmp_path / "run", "-r", "sequence", *SHORT]
    command += ["--text", tmp_path / "films.csv", "--text-column", "about", "--social", tmp_path / "ties.csv"]
    command += ["--weight-column", "plays", "--members", 2, "--elapsed"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["text"], config["social"], config["elapsed"]) == (True, True, True)
    assert (config["confidence"], config["members"], config["items"]) == (1.0, 2, 32)
    evaluated = run("evaluate", "--run", tmp_path / "run", "--json")
    assert evaluated.exit_code == 0, evaluated.output
    values = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads(evaluated.stdout)["full_ndcg@10"] == values["full_ndcg@10"]
    late = run("recommend", "--run", tmp_path / "run", "--user", 3, "--at", 2_000_000, "--format", "csv")
    soon = run("recommend", "--run", tmp_path / "run", "--user", 3, "--format", "csv")
    assert late.exit_code == soon.exit_code == 0
    assert late.stdout != soon.stdout
    too_early = run("recommend", "--run", tmp_path / "run", "--user", 3, "--at", 5)
    assert too_early.exit_code == 2
    assert "--at 5 is before" in too_early.output
    assert "nothing to do" in run(*command, "--resume").output
