"""``lunet-fast density``: train, evaluate, sample as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.invoke import run as invoke

TRAIN = ("density", "train", "--steps", "100", "--layers", "2", "--components", "2", "--threads", "1")


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("density") / "moons"
    result = invoke(*TRAIN, "--dataset", "moons", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "KL from the truth" in result.output
    return out


def test_train_writes_its_files(moons: Path) -> None:
    metrics = json.loads((moons / "metrics.json").read_text())
    assert metrics["dataset"] == "moons"
    assert metrics["integral"] == pytest.approx(1.0, abs=0.01)
    for name in ("config.json", "model.safetensors", "loss.png", "density.png"):
        assert (moons / name).stat().st_size > 0


def test_evaluate_gives_the_trainings_figures(moons: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.json"
    result = invoke("density", "evaluate", "--run", str(moons), "--against", "ring", "--out", str(out))
    assert result.exit_code == 0, result.output
    metrics, again = (json.loads(path.read_text()) for path in (moons / "metrics.json", out))
    for name in ("train_loss", "test_loss", "kl", "integral", "sample_distance"):
        assert again[name] == pytest.approx(metrics[name], rel=1e-6)
    assert again["auroc"] > 0.6
    assert "AUROC" in result.output


def test_sample(moons: Path, tmp_path: Path) -> None:
    result = invoke("density", "sample", "--run", str(moons), "-n", "5", "--seed", "3")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "x0,x1,log_prob"
    assert len(lines) == 6
    again = invoke("density", "sample", "--run", str(moons), "-n", "5", "--seed", "3")
    assert again.stdout == result.stdout
    out = tmp_path / "points.npy"
    assert invoke("density", "sample", "--run", str(moons), "-n", "7", "--out", str(out)).exit_code == 0
    assert np.load(out).shape == (7, 2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("train", "--dataset", "nothing"), "neither a known data set"),
        (("train", "--dataset", "moons", "--alpha", "1.5"), "alpha=1.5 must be a number between 0 and 1"),
        (("train", "--dataset", "moons", "--conditional"), "the data has none"),
        (("evaluate", "--run", "nowhere"), "there is no trained flow"),
        (("sample", "--out", "x.txt"), "must end in .csv, .npy or .png"),
    ],
)
def test_mistakes_end_with_one_message(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    extra = ("--out", str(tmp_path / "run")) if arguments[0] == "train" else ()
    result = invoke("density", *arguments, *extra)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_mistakes_with_a_run(moons: Path, tmp_path: Path) -> None:
    for arguments, told in (
        (("sample", "--out", str(tmp_path / "x.png")), "are no pictures"),
        (("sample", "--label", "1"), "was trained without labels"),
        (("evaluate", "--dataset", "diabetes"), "has 10 features"),
    ):
        result = invoke("density", *arguments[:1], "--run", str(moons), *arguments[1:])
        assert result.exit_code == 2
        assert told in " ".join(result.output.split())


def test_images_by_class(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "digits"
    result = invoke(*TRAIN, "--dataset", "digits", "--conditional", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "share of labels found" in result.output
    for name in ("samples.png", "interpolation.png"):
        assert (out / name).stat().st_size > 0
    picture = tmp_path / "seven.png"
    result = invoke("density", "sample", "--run", str(out), "--label", "7", "--out", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_resume_a_finished_run(moons: Path) -> None:
    result = invoke(*TRAIN, "--dataset", "moons", "--out", str(moons), "--resume")
    assert result.exit_code == 0, result.output
    result = invoke(*TRAIN, "--dataset", "moons", "--out", str(moons))
    assert result.exit_code == 2
    assert "--overwrite" in result.output


def test_integers_of_a_file_and_a_test_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 12)):
        np.savetxt(
            tmp_path / f"{name}.csv", rng.integers(0, 9, (count, 2)), "%d", ",", header="a,b", comments=""
        )
    data, test, run = (str(tmp_path / name) for name in ("train.csv", "test.csv", "run"))
    files = ("--dataset", data, "--test-file", test)
    result = invoke(*TRAIN, *files, "--out", run)
    assert result.exit_code == 0, result.output
    assert "integers from 0 to 8, dequantised" in " ".join(result.output.split())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["unit"], metrics["test_rows"], metrics["train_rows"]) == ("bits/dim", 12, 54)
    again = str(tmp_path / "again.json")
    result = invoke("density", "evaluate", "--run", run, *files, "--out", again)
    assert result.exit_code == 0, result.output
    assert json.loads(Path(again).read_text())["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-6)
    result = invoke("density", "evaluate", "--run", run, "--dataset", data)
    assert result.exit_code == 2
    assert "the run was trained on" in " ".join(result.output.split())
