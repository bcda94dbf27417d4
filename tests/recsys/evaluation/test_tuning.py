from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lunet_fast.recsys.evaluation.tuning import tune
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.config import recipe
from lunet_fast.recsys.model.training import TrainConfig
from tests.cli.invoke import run
from tests.recsys.synthetic import latent_frame, latent_ratings, quick_config

pytest.importorskip("optuna")


@pytest.mark.parametrize(
    ("gamma", "measure"), [(1.0, "test_mse"), (0.0, "ndcg@10"), (0.5, "ndcg@10 - test_mse")]
)
def test_finds_settings_and_goes_on_with_a_study(gamma: float, measure: str, tmp_path: Path) -> None:
    heard: list[float | None] = []
    arguments = {"trials": 2, "storage": tmp_path / "study", "gamma": gamma, "epochs": 1, "members": 1}
    first = tune(latent_ratings(), told=lambda n, value, best: heard.append(value), **arguments)
    assert (first.measure, first.trials, len(heard)) == (measure, 2, 2)
    assert "epochs" not in first.settings
    values = [value for value in heard if value is not None]
    assert first.value == (min(values) if gamma == 1 else max(values))
    TrainConfig.from_dict({**first.settings, "gamma": gamma})  # they are settings
    again = tune(latent_ratings(), **arguments)
    assert again.trials == 4
    assert (again.value <= first.value) if gamma == 1 else (again.value >= first.value)
    with pytest.raises(ValueError, match="holds a study with members=1, not 2"):
        tune(latent_ratings(), **{**arguments, "members": 2})


def test_settings_of_a_sampling(tmp_path: Path) -> None:
    """What it cannot have, such as dropout, is not among its trials."""
    arguments = {"storage": tmp_path / "study", "inference": "gibbs", "epochs": 8, "members": 4}
    tuned = tune(latent_ratings(), trials=3, **arguments)
    assert set(tuned.settings) == {"embedding_size", "history_power", "noise"}
    recipe("best", 1000, inference="gibbs", **tuned.settings)  # they are settings
    assert tune(latent_ratings(), trials=1, **arguments).trials == 4


def test_a_study_that_goes_on_tries_other_settings(tmp_path: Path) -> None:
    heard: list[float | None] = []
    for _ in range(3):
        tune(
            latent_ratings(),
            trials=2,
            storage=tmp_path / "study",
            told=lambda n, value, best: heard.append(value),
            epochs=1,
            members=1,
            seed=2**40,
        )
    assert len(set(heard)) == 6


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The journal of two trials."""
    file = tmp_path_factory.mktemp("study") / "study"
    tune(latent_ratings(), trials=2, storage=file, **SHORT)
    return file.read_bytes()


SHORT: dict[str, Any] = {"epochs": 1, "members": 1}


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_loses_that_line_alone(cut: int, study: bytes, tmp_path: Path) -> None:
    """As a kill leaves it; and the study can be gone on with as often as one likes."""
    file = tmp_path / "study"
    file.write_bytes(study[:-cut])
    again = tune(latent_ratings(), trials=1, storage=file, **SHORT)
    # The last line says how the second trial ended.
    assert again.trials == 2
    assert all(json.loads(line) for line in file.read_bytes().splitlines())
    assert tune(latent_ratings(), trials=1, storage=file, **SHORT).trials == 3


@pytest.mark.parametrize(
    "journal",
    [
        b"nothing\n" * 3,
        b"[1]\n",
        b"{}\n",
        b'{"op_code": 99}\n',
        b'{"op_code": 0, "worker_id": "x"}\n',
        b"[" * 100_000 + b"\n\n",
        b"\xff\xfe\n\n",
    ],
    ids=range(7),
)
def test_what_is_no_study_is_refused(journal: bytes, tmp_path: Path) -> None:
    file = tmp_path / "study"
    file.write_bytes(journal)
    with pytest.raises(ValueError, match=f"{file}: no study to go on with"):
        tune(latent_ratings(), trials=1, storage=file, **SHORT)
    assert file.read_bytes() == journal


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    for place in ("pipe", ""):
        with pytest.raises(ValueError, match="where a file is wanted"):
            tune(latent_ratings(), trials=1, storage=tmp_path / place, **SHORT)


def test_the_test_part_is_never_read() -> None:
    ratings = latent_ratings()
    config = quick_config(gamma=1.0)
    test = Parts.of(ratings, config.split, config.seed).test
    assert test is not None
    hidden = set((test.user * 40 + test.item).tolist())
    changed = ratings.rating.clone()
    for row, key in enumerate((ratings.user * 40 + ratings.item).tolist()):
        if key in hidden:
            changed[row] = 6 - changed[row]
    from dataclasses import replace

    found = [
        tune(r, trials=2, epochs=1, members=1).value for r in (ratings, replace(ratings, rating=changed))
    ]
    assert found[0] == found[1]


def test_from_the_command_line_to_a_training(tmp_path: Path) -> None:
    latent_frame().to_csv(tmp_path / "r.csv", index=False)
    found = run("tune", "-d", tmp_path / "r.csv", "--trials", 1, "--epochs", 1, "-o", tmp_path / "s.json")
    assert found.exit_code == 0, found.output
    assert "best of 1 trials" in found.output
    assert "members" not in json.loads((tmp_path / "s.json").read_text())  # fewer are for trials alone
    settings = ["--settings", tmp_path / "s.json", "--no-mlp", "-o", tmp_path / "run"]
    trained = run("train", "-d", tmp_path / "r.csv", *settings)
    assert trained.exit_code == 0, trained.output
