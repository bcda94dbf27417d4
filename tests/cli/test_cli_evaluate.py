from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.invoke import run as invoke
from tests.recsys.synthetic import latent_frame

QUICK = ["--epochs", "2", "--members", "2", "--embedding-size", "4", "--no-mlp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file, and runs of three kinds of split trained on it."""
    folder = tmp_path_factory.mktemp("evaluate")
    latent_frame().to_csv(folder / "ratings.csv", index=False)
    for name, more in (("random", []), ("joint", ["--gamma", "0.5"]), ("one-out", ["--gamma", "0"])):
        # Wider than the file's: the predictions are clipped to it.
        more = [*more, *(["--scale", "0", "7"] if name == "random" else [])]
        arguments = ["train", "-d", str(folder / "ratings.csv"), "-o", str(folder / name), *QUICK, *more]
        assert invoke(*arguments).exit_code == 0
    return folder


@pytest.mark.parametrize("run", ["random", "joint", "one-out"])
def test_the_figures_are_those_of_the_training(folder: Path, run: str, tmp_path: Path) -> None:
    result = invoke("evaluate", "--run", str(folder / run), "--out", str(tmp_path / "m.json"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "m.json").read_text())
    groups = found.pop("by_activity")
    trained = json.loads((folder / run / "metrics.json").read_text())
    assert len(found) > 15
    assert {name: trained[name] for name in found} == found
    assert sum(group["users"] for group in groups) == found["full_users"]


def test_other_data_are_refused(folder: Path, tmp_path: Path) -> None:
    latent_frame(seed=5).to_csv(tmp_path / "other.csv", index=False)
    result = invoke("evaluate", "--run", str(folder / "random"), "-d", str(tmp_path / "other.csv"))
    assert result.exit_code == 2
    assert "are not the ratings that" in result.output.replace("\n", " ")


def test_a_file_of_ones_own(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "later.csv"
    file.write_text("user,item,rating\n3,5,4\nnobody,5,3\n3,nothing,2\n")
    result = invoke(
        "evaluate", "--run", str(folder / "random"), "--test-file", str(file), "-o", str(tmp_path / "m.json")
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "m.json").read_text())
    assert (found["test_ratings"], found["test_ratings_of_known_pairs"]) == (3, 1)
    assert 0 < found["test_mse"] < 16


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("who;what;stars", ["--user-column", "who", "--item-column", "what", "--rating-column", "stars"]),
        (None, ["--no-header", "--sep", "semicolon", "--duplicates", "mean"]),
        ("userId;movieId;Score", []),
    ],
)
def test_a_run_remembers_how_its_file_was_read(
    tmp_path: Path, header: str | None, options: list[str]
) -> None:
    frame = latent_frame().astype({"rating": float})
    frame["rating"] += 0.5
    text = frame.to_csv(sep=";", decimal=",", header=False, index=False)
    file = tmp_path / "r.csv"
    file.write_text(f"{header}\n{text}" if header else text)
    run = tmp_path / "run"
    made = invoke("train", "-d", str(file), "-o", str(run), *QUICK, *options)
    assert made.exit_code == 0, made.output
    assert "decimal commas" in made.stderr
    assert ("read as columns" in made.stderr) == (header != "who;what;stars")
    result = invoke("evaluate", "--run", str(run), "--json")
    assert result.exit_code == 0, result.output
    trained = json.loads((run / "metrics.json").read_text())
    assert json.loads(result.stdout)["test_mse"] == trained["test_mse"]
    result = invoke("evaluate", "--run", str(run), "--test-file", str(file), "--json")
    assert json.loads(result.stdout)["test_ratings"] == 1200
    bare = ["--no-header"] if header is None else []
    result = invoke("predict", "--run", str(run), "--pairs", str(file), *bare)
    assert len(result.stdout.splitlines()) == 1201, result.output
