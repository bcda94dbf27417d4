"""Which ratings are choices, and how much each counts, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.invoke import run, squeezed
from tests.recsys.synthetic import latent_frame

SHORT = ["--epochs", "1", "--members", "1", "--embedding-size", "4", "--gamma", "0"]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "films.csv"
    latent_frame().assign(plays=lambda f: f["rating"] ** 2).to_csv(path, index=False)
    return path


def test_a_run_remembers_which_ratings_are_choices(csv: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--positive-from", 4, "--below", "ignore", "--weight-column", "plays", "--confidence", 2]
    result = run("train", "-d", csv, "-o", folder, *options, *SHORT)
    assert result.exit_code == 0, result.output
    recorded = json.loads((folder / "config.json").read_text())
    assert [recorded[name] for name in ("positive_from", "below", "confidence")] == [4.0, "ignore", 2.0]
    written = json.loads((folder / "metrics.json").read_text())
    # Of each user's latest rating, those from 4 on are to be found.
    assert 0 < written["full_users"] < written["held_out_ratings"]
    evaluated = json.loads(run("evaluate", "--run", folder, "--json").stdout)
    for name in ("hr@10", "full_ndcg@10"):
        assert evaluated[name] == written[name]
    again = run("train", "-d", csv, "-o", folder, *SHORT, "--positive-from", 3, "--resume")
    assert "was trained with --positive-from 4.0, not 3.0" in again.stderr


def test_counts_of_choices_without_ratings(csv: Path, tmp_path: Path) -> None:
    result = run("train", "-d", csv, "-o", tmp_path / "run", "--weight-column", "rating", *SHORT)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["confidence"] == 1.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--weight-column", "plays"], "learnt:add--gamma0,or--recipesequence"),
        (["--positive-from", "4"], "leavesout:lower"),
        (["--positive-from", "six"], "'--positive-from'"),
    ],
)
def test_what_ratings_alone_cannot_use_is_told(csv: Path, tmp_path: Path, options: list, told: str) -> None:
    result = run("train", "-d", csv, "-o", tmp_path / "run", *options)
    assert result.exit_code == 2
    assert told in squeezed(result.stderr)


def test_a_resumed_search_is_not_repeated(csv: Path, tmp_path: Path) -> None:
    command = ["train", "-d", csv, "-o", tmp_path / "run", *SHORT[2:6], "--epochs", 2, "--patience", 1]
    first = run(*command)
    assert first.exit_code == 0, first.output
    assert "recipe auto: biases" in first.stderr
    assert "of at most 2 epochs (chosen on a validation part)" in first.stderr
    before = (tmp_path / "run" / "config.json").read_bytes()
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    # As if it had been killed before its end.
    for name in ("metrics.json", "model.safetensors", "checkpoints/lu-net.safetensors"):
        (tmp_path / "run" / name).unlink()
    again = run(*command, "--resume")
    assert again.exit_code == 0, again.output
    assert "recipe auto: biases" not in again.stderr
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model
    assert "nothing to do" in run(*command, "--resume").output
