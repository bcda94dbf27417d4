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
        (("train", "--dataset", "moons", "--alpha", "1.5"), "--alpha 1.5 must be a number between 0 and 1"),
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


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = [f"{a},{b},{('cat', 'red dog')[n % 2]}" for n, (a, b) in enumerate(rng.integers(0, 9, (120, 2)))]
    path = tmp_path / "pets.csv"
    path.write_text("\n".join(["a,b,kind", *lines]))
    return path


def test_one_class(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = ("--dataset", str(pets), "--label-column", "kind")
    result = invoke(*TRAIN, *files, "--class", "red dog")
    assert result.exit_code == 0, result.output
    run = tmp_path / "runs" / "density" / "pets-red-dog"
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["dataset"], metrics["train_rows"], metrics["test_rows"]) == (
        "pets, class red dog",
        42,
        12,
    )
    out = str(tmp_path / "again.json")
    result = invoke("density", "evaluate", "--run", str(run), *files, "--out", out)
    assert result.exit_code == 0, result.output
    assert json.loads(Path(out).read_text())["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-6)
    result = invoke(*TRAIN, *files, "--class", "eel")
    assert result.exit_code == 2
    assert "has no class eel; --class must be one of cat, red dog" in " ".join(result.output.split())


def test_published_data(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(200, 43))
    (tmp_path / "miniboone").mkdir()
    np.save(tmp_path / "miniboone" / "data.npy", values)
    data, run = ("--dataset", "miniboone", "--data-dir", str(tmp_path)), str(tmp_path / "run")
    result = invoke(*TRAIN, *data, "--out", run)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "the published figures are of 29,556 + 3,284 + 3,648 rows of 43: not the same data" in shown
    assert "RQ-NSF, coupling" in shown
    assert "-9.67" in shown
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    parts = (metrics["train_rows"], metrics["validation_rows"], metrics["test_rows"])
    assert (metrics["unit"], parts) == ("nats", (162, 18, 20))
    result = invoke("density", "evaluate", "--run", run, "--data-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "RQ-NSF, coupling" in result.output
    result = invoke("density", "evaluate", "--run", run)
    assert result.exit_code == 2
    assert "name their folder with --data-dir DIR" in " ".join(result.output.split())
    result = invoke(*TRAIN, *data, "--test-file", str(tmp_path / "miniboone" / "data.npy"), "--out", run)
    assert result.exit_code == 2
    assert "--test-file must not be given" in " ".join(result.output.split())


def test_integers_below_zero_are_told(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(-7, 9, (60, 2)))
    result = invoke(*TRAIN, "--dataset", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "add 7, so that they start at 0" in " ".join(result.output.split())


@pytest.mark.parametrize("rows", [100, 150, 155, 160])
def test_pictures_of_any_number_of_rows_by_class(tmp_path: Path, rows: int) -> None:
    """Of the first label, the test part has an even or an odd number of rows."""
    rng = np.random.default_rng(rows)
    for kind, content in (
        ("images-idx3", rng.integers(0, 256, (rows, 2, 2))),
        ("labels-idx1", rng.integers(0, 5, rows)),
    ):
        head = bytes((0, 0, 8, content.ndim)) + b"".join(n.to_bytes(4, "big") for n in content.shape)
        (tmp_path / f"train-{kind}-ubyte").write_bytes(head + content.astype(np.uint8).tobytes())
    data = str(tmp_path / "train-images-idx3-ubyte")
    result = invoke(*TRAIN, "--dataset", data, "--conditional", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "interpolation.png").stat().st_size > 0
