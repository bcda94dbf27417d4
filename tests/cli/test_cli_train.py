from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lunet_fast
from lunet_fast import __main__ as entry
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.cli.invoke import run, squeezed
from tests.recsys.synthetic import latent_frame

SHORT = ["--epochs", "1", "--members", "1", "--embedding-size", "4"]
DATA_COMMANDS = ("fetch", "verify", "describe")
RUN_FILES = {".lock", "checkpoints", "config.json", "loss.png", "metrics.json", "model.safetensors"}


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "films.csv"
    latent_frame(text_ids=True).to_csv(path, index=False)
    return path


def metrics(folder: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((folder / "metrics.json").read_text())
    return values


def test_the_real_command_on_a_file_of_ones_own(csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lunet_fast", "train", "--dataset", str(csv), "--out", str(out), *SHORT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == RUN_FILES
    assert "LU-Net  epoch 1/1  train " in done.stdout
    assert "\x1b" not in done.stdout  # no bars and colours where there is no terminal
    values = metrics(out)
    figures = ("test_mse", "test_rmse", "biases_test_mse", "full_ndcg@10", "popularity_full_ndcg@10")
    for text in ("this model", "biases of users", "popularity", *(f"{values[key]:.4g}" for key in figures)):
        assert text in done.stdout
    assert "classic MLP" not in done.stdout
    assert "recipe auto: biases of users and items with L2" in done.stderr
    assert (values["dataset"], values["recipe"], values["seed"]) == ("films.csv", "auto", 0)
    frame = latent_frame(text_ids=True)
    assert LUNetRecommender.load(out).predict(frame["user"], frame["item"]).shape == (1200,)


class TestAuto:
    def test_a_plan_trains_nothing(self, csv: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        result = run("train", "-d", csv, "-o", out, "--dry-run")
        assert result.exit_code == 0, result.output
        for text in ("1,200 ratings by 60 users of 40 items", "recipe auto", "MiB", "one core"):
            assert text in result.stdout
        assert not out.exists()
        result = run("train", "-d", csv, "-o", out, "--recipe", "best", "--dry-run", "--json", *SHORT)
        values = json.loads(result.stdout)
        trained = run("train", "-d", csv, "-o", out, "--recipe", "best", "--no-mlp", *SHORT)
        assert trained.exit_code == 0, trained.output
        assert values["parameters"] == metrics(out)["parameters"]
        assert values["settings"]["epochs"] == 1

    def test_a_final_fit_is_what_recommends(self, csv: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        for _ in range(2):  # the second time nothing is left to do
            result = run("train", "-d", csv, "-o", out, "--final", "--resume", *SHORT)
            assert result.exit_code == 0, result.output
        assert "nothing to do" in result.output
        assert json.loads((out / "final" / "config.json").read_text())["split"] == "none"
        whole = LUNetRecommender.load(out / "final")
        assert whole.user_counts().sum() == 1200
        found = run("recommend", "--run", out, "--user", "user 3 ü", "-k", 3, "--format", "json")
        expected = whole.recommend("user 3 ü", 3)
        assert [row["item"] for row in json.loads(found.stdout)] == expected["item"].tolist()
        evaluated = run("evaluate", "--run", out, "--json")
        assert json.loads(evaluated.stdout)["test_mse"] == metrics(out)["test_mse"]
        assert run("train", "-d", csv, "-o", out, "--overwrite", *SHORT).exit_code == 0
        assert not (out / "final").exists()

    def test_what_ranks_worse_than_popularity_is_told(self, tmp_path: Path) -> None:
        """Ratings that say nothing, of items that are chosen by popularity alone."""
        rng = np.random.default_rng(0)
        pairs = {
            (int(u), int(i))
            for u, i in zip(rng.integers(0, 80, 2500), rng.geometric(0.05, 2500), strict=True)
        }
        frame = pd.DataFrame(sorted(pairs), columns=["user", "item"])
        frame["rating"] = rng.integers(1, 6, len(frame))
        frame.to_csv(tmp_path / "r.csv", index=False)
        result = run("train", "-d", tmp_path / "r.csv", "-o", tmp_path / "run", *SHORT)
        assert "--gamma 0.1" in result.stdout
        found = run("recommend", "--run", tmp_path / "run", "--user", 3)
        assert "popularity" in found.stderr
        assert "--gamma 0.1" in found.stderr
        ranking = run("train", "-d", tmp_path / "r.csv", "-o", tmp_path / "ids", "--gamma", 0, *SHORT)
        assert ranking.exit_code == 0, ranking.output
        assert "MSE" not in ranking.stdout
        found = run("recommend", "--run", tmp_path / "ids", "--user", 3)
        values = metrics(tmp_path / "ids")
        worse = float(str(values["full_ndcg@10"])) < float(str(values["popularity_full_ndcg@10"]))
        for told in (ranking.stdout, found.stderr):
            assert ("worse than popularity: try more --epochs" in told) == worse
            assert "--gamma" not in told

    def test_transform(self, csv: Path, tmp_path: Path) -> None:
        result = run("train", "-d", csv, "-o", tmp_path / "run", "--transform", "rank", *SHORT)
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "run" / "config.json").read_text())["transform"] == "rank"
        evaluated = run("evaluate", "--run", tmp_path / "run", "--json")
        assert json.loads(evaluated.stdout)["test_mse"] == metrics(tmp_path / "run")["test_mse"]


class TestTrain:
    def test_options_reach_the_training(self, csv: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        options = ["--recipe", "paper", "--seed", 3, "--split", "per-user", "--no-mlp", "--dropout", 0.3]
        options += ["--lr", 0.01, "--net-learning-rate", 0.002, "--layers", 3, "--alpha", 0.2]
        options += ["--batch-size", 64, "--scale", 0, 6, *SHORT]
        result = run("train", "-d", csv, "-o", out, *options)
        assert result.exit_code == 0, result.output
        config = json.loads((out / "config.json").read_text())
        expected = {"recipe": "paper", "seed": 3, "split": "per-user", "mlp": False, "dropout": 0.3}
        expected |= {"learning_rate": 0.01, "net_learning_rate": 0.002, "layers": 3, "alpha": 0.2}
        expected |= {"batch_size": 64, "scale": [0.0, 6.0], "epochs": 1, "members": 1, "embedding_size": 4}
        expected |= {"source": str(csv)}
        assert {name: config[name] for name in expected} == expected
        assert "mlp_test_mse" not in metrics(out)
        assert "ours: classic MLP" not in result.output

    def test_column_names(self, tmp_path: Path) -> None:
        frame = latent_frame().rename(columns={"user": "who", "item": "what", "rating": "stars"})
        frame.to_csv(tmp_path / "r.txt", index=False, sep=";")
        columns = ["--user-column", "who", "--item-col", "what", "--rating-column", "stars", "--sep", ";"]
        result = run("train", "-d", tmp_path / "r.txt", "-o", tmp_path / "run", "--no-mlp", *columns, *SHORT)
        assert result.exit_code == 0, result.output

    def test_default_folder_is_named_after_the_data(
        self, csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert run("train", "-d", csv, "--no-mlp", *SHORT).exit_code == 0
        assert {path.name for path in (tmp_path / "runs" / "films").iterdir()} == RUN_FILES

    def test_train_and_test_files(self, tmp_path: Path) -> None:
        frame = latent_frame()
        frame["timestamp"] = 1
        for name, part in (("a.base", frame[:900]), ("a.test", frame[900:])):
            part.astype({"rating": int}).to_csv(tmp_path / name, sep="\t", header=False, index=False)
        files = ["--train-file", tmp_path / "a.base", "--test-file", tmp_path / "a.test"]
        result = run("train", "-d", "ml-100k", "-o", tmp_path / "run", "--no-mlp", *files, *SHORT)
        assert result.exit_code == 0, result.output
        values = metrics(tmp_path / "run")
        assert (values["split"], values["train_ratings"], values["test_ratings"]) == ("files", 900, 300)

    def test_resume_and_overwrite(self, csv: Path, tmp_path: Path) -> None:
        command = ["train", "-d", csv, "-o", tmp_path / "run", "--no-mlp", *SHORT]
        first = run(*command)
        before = metrics(tmp_path / "run")
        refused = run(*command)
        assert refused.exit_code == 2
        assert "holds a finished training: add --resume" in refused.output
        csv.rename(tmp_path / "elsewhere.csv")  # a finished training is shown without its data
        resumed = run(*command, "--resume")
        assert resumed.exit_code == 0
        assert "nothing to do" in resumed.output
        assert metrics(tmp_path / "run") == before
        assert first.output.splitlines()[-1] == resumed.output.splitlines()[-1]
        other = run(*command, "--resume", "--seed", 1)
        assert other.exit_code == 2
        assert "was trained with --seed 0, not 1" in other.output
        other = run("train", "-d", "ml-100k", "-o", tmp_path / "run", "--no-mlp", *SHORT, "--resume")
        assert other.exit_code == 2
        assert "was trained with --dataset films.csv, not 'ml-100k'" in other.output
        (tmp_path / "elsewhere.csv").rename(csv)
        assert run(*command, "--overwrite", "--seed", 1).exit_code == 0
        assert metrics(tmp_path / "run")["seed"] == 1

    def test_interrupted(self, csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("lunet_fast.recsys.model.training.train", interrupt)
        result = run("train", "-d", csv, "-o", tmp_path / "run")
        assert result.exit_code == 130
        assert "There is no checkpoint yet: the same command begins anew" in result.output
        checkpoint = tmp_path / "run" / "checkpoints" / "lu-net.safetensors"
        checkpoint.touch()
        result = run("train", "-d", csv, "-o", tmp_path / "run", "--resume", "--recipe", "best")
        assert f"--resume goes on from {checkpoint.parent}." in result.output


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--recipe", "good"], "--recipe good is unknown: choose one of paper, best"),
            (["--split", "weekly"], "--split weekly is unknown"),
            (["--epochs", "0"], "--epochs 0 must be a whole number from 1 to 1000000"),
            (["--dropout", "1.5"], "--dropout 1.5"),
            (["--seed", "-1"], "--seed -1"),
            (["--epochs", "many"], "--epochs"),
            (["--train-file", "a"], "go together"),
            (["--train-file", "a", "--test-file", "b", "--split", "random"], "--split does not go with"),
            (["--user-column", "who"], "there is no column 'who' for the user"),
            (["--device", "cuda:99x"], "--device"),
            (["--unknown"], "No such option"),
        ],
    )
    def test_names_the_option(self, csv: Path, tmp_path: Path, options: list[str], message: str) -> None:
        result = run("train", "-d", csv, "-o", tmp_path / "run", *options)
        assert result.exit_code == 2
        assert squeezed(message) in squeezed(result.output)
        assert "Traceback" not in result.output
        assert not (tmp_path / "run" / "metrics.json").exists()

    def test_a_data_set_that_is_not_there(self, tmp_path: Path) -> None:
        result = run("train", "-d", "ml-10m", "-o", tmp_path / "run")
        assert result.exit_code == 2
        assert "neither a known data set (ml-100k, ml-1m) nor an existing file" in result.output

    def test_a_broken_file_names_line_and_value(self, csv: Path, tmp_path: Path) -> None:
        frame = pd.read_csv(csv).astype({"rating": str})
        frame.loc[6, "rating"] = "good"
        frame.to_csv(csv, index=False)
        result = run("train", "-d", csv, "-o", tmp_path / "run")
        assert result.exit_code == 2
        for text in (str(csv), "line 8", "good"):
            assert text in result.output

    def test_divergence(self, csv: Path, tmp_path: Path) -> None:
        result = run("train", "-d", csv, "-o", tmp_path / "run", "--lr", "1e6", "--epochs", "3")
        assert result.exit_code == 1
        assert "--learning-rate 1e+06 is most likely too high" in result.output


class TestEntry:
    def test_the_library_works_without_the_extra(self) -> None:
        extra = ("typer", "rich", "matplotlib", "safetensors", "pooch")
        program = f"""
import sys
sys.modules.update(dict.fromkeys({extra!r}))  # None: as if not installed
import pandas as pd
import lunet_fast
frame = pd.DataFrame({{"user": [1, 1, 2, 2], "item": [5, 6, 5, 7], "rating": [1, 2, 3, 5]}})
print(lunet_fast.LUNetRecommender(epochs=1).fit(frame).predict([1, 9], [7, 5]).shape)
import runpy
runpy.run_module("lunet_fast", run_name="__main__")
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.stdout == "(2,)\n", done.stderr
        assert done.returncode == 1
        assert done.stderr.endswith("not installed: run  pip install 'lunet-fast[train]'\n")

    @pytest.mark.parametrize("more", [(), ("pandas",)], ids=" ".join)
    def test_doctor_works_without_the_extra(self, more: tuple[str, ...]) -> None:
        program = f"""
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "safetensors", "pooch", "pyarrow", *{more!r})))
sys.argv = ["lunet-fast", "doctor"]
from lunet_fast import __main__
__main__.main()
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"without {', '.join((*more, 'matplotlib', 'pooch', 'safetensors'))}" in " ".join(
            done.stdout.split()
        )
        assert "pip install 'lunet-fast[train]'" in done.stdout

    def test_help_needs_neither_pandas_nor_matplotlib(self) -> None:
        program = """
import sys
from lunet_fast.cli import app
try:
    app(["train", "--help"])
except SystemExit:
    print("loaded", sorted({"pandas", "matplotlib", "pooch"} & sys.modules.keys()))
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.stdout.endswith("loaded []\n"), done.stdout + done.stderr

    def test_help_teaches(self) -> None:
        result = run("train", "--help")
        assert result.exit_code == 0
        for text in ("--dataset", "--recipe", "--resume", "ml-100k", "metrics.json", "runs/DATASET"):
            assert squeezed(text) in squeezed(result.output), text
        assert "train" in run("--help").output

    @pytest.mark.parametrize(
        "command",
        ["train", "recommend", "predict", "export", "bench", "doctor", *(f"data {n}" for n in DATA_COMMANDS)],
    )
    def test_every_command_has_examples(self, command: str) -> None:
        result = run(*command.split(), "--help")
        assert result.exit_code == 0
        assert f"lunet-fast {command}" in result.output

    def test_version(self) -> None:
        result = run("--version")
        assert (result.exit_code, result.output) == (0, f"lunet-fast {lunet_fast.__version__}\n")

    def test_without_the_extra_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        absent = ("typer", "rich")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
        with pytest.raises(SystemExit, match=r"typer, rich not installed.*pip install 'lunet-fast\[train\]'"):
            entry.main()
