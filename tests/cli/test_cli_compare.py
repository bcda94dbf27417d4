from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lunet_fast.cli import app
from lunet_fast.recsys.evaluation import compare as comparing
from lunet_fast.recsys.evaluation.compare import METHODS, measure
from tests.cli.invoke import run, squeezed
from tests.recsys.synthetic import latent_frame


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "films.csv"
    latent_frame(text_ids=True).to_csv(path, index=False)
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Measured in this process, instead of one each: what and with which seed."""
    calls: list[tuple[str, int]] = []

    def in_this_process(data: Path, key: str, seed: int, split: str, device: str) -> dict[str, Any]:
        calls.append((key, seed))
        return measure(pickle.loads(data.read_bytes()), key, seed, split, device)

    monkeypatch.setattr(comparing, "_in_a_process", in_this_process)
    return calls


def test_the_real_command(csv: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lunet_fast", "compare", "--dataset", csv.name, "--out", "results"]
    command += ["--methods", "biases", "--seeds", "0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["1/2", "2/2"]
    assert "User and item biases, seed 1: MSE " in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {f"compare-films.{end}" for end in ("json", "md", "csv", "png")}
    content = json.loads((tmp_path / "results" / "compare-films.json").read_text())
    assert content["command"] == (
        "lunet-fast compare --dataset films.csv --methods biases --seeds 0 1 --out results"
    )
    assert f"{content['rows'][0]['test_mse']:.4f}" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--seeds", 0, 3, "--methods", "popularity", "biases"],
        ["--methods", "popularity", "--seeds", 0, "--methods", "biases", "--seeds", 3],
        ["--seeds=0", "--methods=biases", "--methods", "popularity", "--seeds", 3],
    ],
)
def test_lists(csv: Path, tmp_path: Path, measured: list[tuple[str, int]], words: list[object]) -> None:
    result = run("compare", *words, "-d", csv, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert measured == [("biases", 0), ("biases", 3), ("popularity", 0), ("popularity", 3)]


def test_by_one_time(tmp_path: Path, measured: list[tuple[str, int]]) -> None:
    frame = latent_frame()
    frame["timestamp"] = range(1, len(frame) + 1)
    frame.to_csv(tmp_path / "films.csv", index=False)
    words = ["--split", "time", "--methods", "popularity", "ease", "-d", tmp_path / "films.csv"]
    result = run("compare", *words, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "By the time since the user's last training rating" in result.output
    content = json.loads((tmp_path / "out" / "compare-films-time.json").read_text())
    assert content["split"] == "time"
    assert "--split time" in content["command"]
    refused = run("compare", "--split", "time", "--methods", "biases", *words[5:], "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "--splittimeisforthosethatrank" in squeezed(refused.output)


def test_all_methods_by_default(csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def outcome(data: Path, key: str, seed: int, split: str, device: str) -> dict[str, Any]:
        asked.append(key)
        return {"missing": "pip install it"} if key == "mf" else {"error": "why"}

    monkeypatch.setattr(comparing, "_in_a_process", outcome)
    result = run("compare", "-d", csv, "-o", tmp_path / "out")
    # Of users and items these ratings know nothing.
    described = ["bayesian-fm-side", "bayesian-svd++-side", "bayesian-svd++-side-mean"]
    assert asked == [key for key in METHODS if key not in described]
    assert result.exit_code == 1  # nothing was measured
    assert "- pip install it" in result.output
    assert "EASE failed, seed 0: why" in result.output


def test_column_names(tmp_path: Path, measured: list[tuple[str, int]]) -> None:
    frame = latent_frame().rename(columns={"user": "who", "item": "what", "rating": "stars"})
    frame.to_csv(tmp_path / "r.txt", index=False, sep=";")
    columns = ["--user-column", "who", "--item-column", "what", "--rating-column", "stars", "--sep", ";"]
    options = ["--methods", "biases", "--scale", "0", "6", "--out", tmp_path / "out"]
    result = run("compare", "-d", tmp_path / "r.txt", *columns, *options)
    assert result.exit_code == 0, result.output
    assert measured == [("biases", 0)]


class TestInteractions:
    @pytest.fixture
    def clicks(self, tmp_path: Path) -> Path:
        path = tmp_path / "clicks.csv"
        latent_frame().drop(columns="rating").to_csv(path, index=False)
        return path

    def test_are_ranked(self, clicks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def outcome(data: Path, key: str, seed: int, split: str, device: str) -> dict[str, Any]:
            asked.append(key)
            if METHODS[key].is_lu_net:
                return {"error": "not now"}
            return measure(pickle.loads(data.read_bytes()), "popularity", seed)

        monkeypatch.setattr(comparing, "_in_a_process", outcome)
        result = run("compare", "-d", clicks, "-o", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert asked == [key for key, method in METHODS.items() if method.kind == "ranking"]
        assert "no column 'rating'" in result.output

    def test_another_column_was_named(self, clicks: Path, tmp_path: Path) -> None:
        result = run("compare", "-d", clicks, "--rating-column", "stars", "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert "there is no column 'stars'" in result.output

    def test_rating_methods_are_refused(
        self, clicks: Path, tmp_path: Path, measured: list[tuple[str, int]]
    ) -> None:
        result = run("compare", "-d", clicks, "--methods", "mf", "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert "choose from popularity, bpr" in result.output
        assert measured == []


class TestRefused:
    """Before any work, with exit code 2."""

    def refused(self, *words: object) -> str:
        result = run("compare", *words)
        assert result.exit_code == 2, result.output
        return result.output

    def test_unknown_method(self, csv: Path, tmp_path: Path) -> None:
        output = self.refused("-d", csv, "-o", tmp_path / "out", "--methods", "biases", "svd")
        assert "--methodssvd:choosefrombiases,knn," in squeezed(output)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("seeds", [["0", "0"], ["-1"], ["0", "x"]])
    def test_seeds(
        self, csv: Path, tmp_path: Path, measured: list[tuple[str, int]], seeds: list[str]
    ) -> None:
        output = self.refused("-d", csv, "-o", tmp_path / "out", "--methods", "biases", "--seeds", *seeds)
        assert "seeds" in output
        assert measured == []

    def test_no_data(self, tmp_path: Path) -> None:
        output = self.refused("-d", tmp_path / "no.csv", "-o", tmp_path / "out")
        assert "neither a known data set" in output

    def test_out_is_a_file(self, csv: Path) -> None:
        assert "--out" in self.refused("-d", csv, "-o", csv)

    def test_other_content(self, csv: Path, tmp_path: Path, measured: list[tuple[str, int]]) -> None:
        (tmp_path / "compare-films.json").write_text("{}")
        assert "is no result of lunet-fast compare" in self.refused("-d", csv, "-o", tmp_path)
        assert measured == []


def test_interrupted(csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(data: Path, key: str, seed: int, split: str, device: str) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "_in_a_process", interrupt)
    result = run("compare", "-d", csv, "-o", tmp_path, "--methods", "biases")
    assert result.exit_code == 130
    assert "goes on from what" in result.output


def test_help_names_every_method() -> None:
    (command,) = [each for each in app.registered_commands if each.name == "compare"]
    assert command.callback is not None
    text = squeezed(run("compare", "--help").output)
    assert [key for key in METHODS if key not in text] == []
