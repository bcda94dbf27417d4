from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.report import reproduce as reproducing
from tests.cli.invoke import run, squeezed
from tests.recsys.report.test_report import document
from tests.recsys.report.test_reproduce import films

SKIP = ["--skip", "ml-100k/best", "ml-100k/ranking", "ml-100k/hybrid"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asks for, instead of doing it."""
    found: dict[str, Any] = {}

    def note(out: Path, machine: dict[str, Any], **arguments: Any) -> Any:
        found.update(arguments, out=out, machine=machine)
        return document()

    monkeypatch.setattr(reproducing, "reproduce", note)
    return found


def test_lists_are_written_as_in_the_help(asked: dict[str, Any], tmp_path: Path) -> None:
    options = ["--datasets", "ml-1m", "ml-100k", "--seeds", 4, 5, "--skip", "ml-1m/paper", "--out", tmp_path]
    assert run("reproduce", *options).exit_code == 0
    assert (asked["datasets"], asked["seeds"], asked["skip"]) == (
        ["ml-1m", "ml-100k"],
        [4, 5],
        ["ml-1m/paper"],
    )
    assert asked["out"] == tmp_path
    repeated = ["--seeds", 4, "--seeds", 5]
    assert run("reproduce", *repeated).exit_code == 0
    assert asked["seeds"] == [4, 5]


def test_defaults(asked: dict[str, Any]) -> None:
    assert run("reproduce").exit_code == 0
    assert (tuple(asked["datasets"]), tuple(asked["seeds"]), tuple(asked["skip"])) == (
        ("ml-100k", "ml-1m"),
        (0, 1, 2),
        (),
    )
    assert asked["results"].name == "results"
    assert asked["epochs"] is None


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens, "load", films)
    command = [
        "reproduce",
        "--datasets",
        "ml-100k",
        "--seeds",
        0,
        *SKIP,
        "--epochs",
        1,
        "--out",
        tmp_path / "out",
    ]
    command += ["--results", tmp_path]
    first = run(*command)
    assert first.exit_code == 0, first.output
    assert "1/1  ml-100k/paper, seed 0\n" in first.output
    assert f"written to {tmp_path / 'out' / 'report.html'}" in first.output
    again = run(*command)
    assert "1/1  ml-100k/paper, seed 0  finished already" in again.output
    assert "epoch 1/1" not in again.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--datasets", "ml-10m"], "--datasets ml-10m is unknown: choose from ml-100k, ml-1m"),
        (["--skip", "paper"], "--skip paper is unknown"),
        (["--seeds", "many"], "--seeds"),
        (["--seeds", -1], "--seed -1"),
        (["--epochs", 0], "--epochs 0 must be"),
        (["--results", "nowhere"], "--results nowhere: no such folder"),
        (["--device", "cuda:99x"], "cuda:99x"),
    ],
)
def test_refusals(
    options: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movielens, "load", films)
    result = run("reproduce", "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert squeezed(message) in squeezed(result.output)
    assert "Traceback" not in result.output


def test_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproducing, "reproduce", interrupt)
    result = run("reproduce", "--out", tmp_path)
    assert result.exit_code == 130
    assert "The same command goes on" in result.output


def test_help_teaches() -> None:
    result = run("reproduce", "--help")
    for text in ("lunet-fast reproduce", "--datasets", "ml-1m/paper", "report.html", "runs/reproduce"):
        assert squeezed(text) in squeezed(result.output)
