from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.cli.conftest import Trained
from tests.cli.invoke import FORMULA, run, save_model, squeezed
from tests.recsys.synthetic import latent_frame

COLUMNS = ["user", "rank", "item", "score", "title"]


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def test_train_then_recommend_as_real_commands(tmp_path: Path) -> None:
    latent_frame().to_csv(tmp_path / "ratings.csv", index=False)
    program = [sys.executable, "-m", "lunet_fast"]
    short = ["--no-mlp", "--epochs", "1", "--members", "1", "--embedding-size", "4"]
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path}
    done = subprocess.run([*program, "train", "-d", "ratings.csv", *short], **options)
    assert done.returncode == 0, done.stderr
    command = [*program, "recommend", "--run", "runs/ratings", "--user", "3", "-k", "2", "--format", "csv"]
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [(row["user"], row["rank"], row["title"]) for row in rows_of(done.stdout)] == [
        ("3", "1", ""),
        ("3", "2", ""),
    ]
    pipe = " ".join([*command, "--user", "4"]) + " | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", pipe], **options)
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr


class TestFormats:
    def test_csv_is_what_the_recommender_says(self, trained: Trained, tmp_path: Path) -> None:
        out = tmp_path / "new" / "r.csv"
        result = run("recommend", "--run", trained.folder, "-u", 42, "-u", 7, "-u", 42, "-k", 40, "-o", out)
        assert result.exit_code == 0, result.output
        assert (result.stdout, result.stderr) == ("", f"written to {out}\n")
        found = pd.read_csv(out)
        expected = trained.recommender.recommend([42, 7], 40)  # a user given twice is recommended to once
        assert list(found.columns) == COLUMNS
        pd.testing.assert_frame_equal(found[COLUMNS[:4]], expected, check_dtype=False, check_exact=False)
        titles = {0: f"'{FORMULA}", **{n: f"Film {n}, uncut" for n in range(1, 40)}}
        assert found["title"].tolist() == [titles[item] for item in expected["item"]]
        assert f"'{FORMULA}" in found["title"].tolist()

    def test_json_and_lines(self, trained: Trained, tmp_path: Path) -> None:
        command = ["recommend", "--run", trained.folder, "--user", 5, "-k", 3]
        found = json.loads(run(*command, "--format", "json").stdout)
        expected = trained.recommender.recommend(5, 3)
        assert [list(row) for row in found] == [COLUMNS] * 3
        assert [(row["user"], row["rank"], row["item"]) for row in found] == list(
            zip(expected["user"], expected["rank"], expected["item"], strict=True)
        )
        assert all(isinstance(row["item"], int) for row in found)
        assert run(*command, "--out", tmp_path / "r.JSONL").exit_code == 0
        assert [json.loads(line) for line in (tmp_path / "r.JSONL").read_text().splitlines()] == found

    def test_table(self, trained: Trained, texts: Trained, tmp_path: Path) -> None:
        table = run("recommend", "--run", trained.folder, "--user", 42, "-k", 2).stdout
        assert "title" in table
        for item in trained.recommender.recommend(42, 2)["item"]:
            assert f"Film {item}, uncut" in table or FORMULA in table
        user = "user 3 ü"
        table = run("recommend", "--run", texts.folder, "--user", user, "-k", 2).stdout
        assert "title" not in table
        assert table.count(user) == 2
        options = ["--user", user, "--format", "table", "--out", tmp_path / "table.txt"]
        assert run("recommend", "--run", texts.folder, *options).exit_code == 0
        assert user in (tmp_path / "table.txt").read_text(encoding="utf-8")

    def test_titles_that_are_not_there_are_null(self, texts: Trained) -> None:
        options = ["--user", "user 3 ü", "--format", "json"]
        found = json.loads(run("recommend", "--run", texts.folder, *options).stdout)
        assert {row["title"] for row in found} == {None}

    def test_include_seen(self, trained: Trained) -> None:
        command = ["recommend", "--run", trained.folder, "--user", 1, "-k", 40, "--format", "csv"]
        assert len(rows_of(run(*command, "--include-seen").stdout)) == 40
        rated = int((latent_frame()["user"] == 1).sum())
        assert len(rows_of(run(*command).stdout)) == 40 - rated


class TestUsers:
    def test_unseen_users_get_a_note(self, trained: Trained) -> None:
        options = ["--user", 3, "--user", "nobody\x1b", "-k", 1, "--format", "csv"]
        result = run("recommend", "--run", trained.folder, *options)
        assert result.exit_code == 0
        assert [row["user"] for row in rows_of(result.stdout)] == ["3", "nobody\x1b"]
        assert "Note: 1 of 2 users have no rating in the training data (nobody\\x1b)" in result.stderr

    def test_a_model_of_interactions(self, tmp_path: Path) -> None:
        recommender = save_model(tmp_path, gamma=0.5)
        options = ["--user", 3, "--user", 99, "-k", 2, "--format", "csv"]
        result = run("recommend", "--run", tmp_path, *options)
        assert "they get the items most chosen" in result.stderr
        scores = [float(row["score"]) for row in rows_of(result.stdout)]
        assert scores == pytest.approx(recommender.recommend([3, 99], 2)["score"].tolist(), rel=1e-5)

    def test_file_of_users(self, texts: Trained, tmp_path: Path) -> None:
        listed = tmp_path / "users.txt"
        listed.write_bytes("\ufeffuser 3 ü\r\n\r\n  user 1 ü \r\nuser 3 ü".encode())
        options = ["--users-file", listed, "--user", "user 9 ü", "-k", 1, "--format", "csv"]
        result = run("recommend", "--run", texts.folder, *options)
        assert result.exit_code == 0, result.output
        assert [row["user"] for row in rows_of(result.stdout)] == ["user 9 ü", "user 3 ü", "user 1 ü"]

    def test_an_id_may_hold_what_ends_lines_elsewhere(self, trained: Trained, tmp_path: Path) -> None:
        listed, ids = tmp_path / "users.txt", ["a\u2028b", "c\x85d", "e\x0cf", "g"]
        listed.write_text("\n".join(ids), encoding="utf-8")
        options = ["--users-file", listed, "-k", 1, "--format", "json"]
        found = json.loads(run("recommend", "--run", trained.folder, *options).stdout)
        assert [row["user"] for row in found] == ids

    def test_a_file_of_users_is_bounded(
        self, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "users.txt").write_text("1\n" * 50)
        monkeypatch.setenv("LUNET_FAST_MAX_BYTES", "99")
        result = run("recommend", "--run", trained.folder, "--users-file", tmp_path / "users.txt")
        assert result.exit_code == 2
        assert "users.txt: has 100 bytes, more than the 99" in result.stderr

    def test_everyone_in_batches(
        self, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lunet_fast.cli.recommend.BATCH", 16)
        sizes = []
        recommend = type(trained.recommender).recommend

        def counting(self: object, users: list[int], *rest: object, **options: object) -> pd.DataFrame:
            sizes.append(len(users))
            return recommend(self, users, *rest, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(type(trained.recommender), "recommend", counting)
        out = tmp_path / "all.csv"
        result = run("recommend", "--run", trained.folder, "--all-users", "-k", 3, "--out", out)
        assert result.exit_code == 0, result.output
        assert sizes == [16, 16, 16, 12]
        assert "16/60 users\n32/60 users\n48/60 users\n60/60 users\n" in result.stderr
        expected = recommend(trained.recommender, list(range(60)), 3)
        assert pd.read_csv(out)["item"].tolist() == expected["item"].tolist()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "no users: give --user ID, --users-file FILE or --all-users"),
            (["--all-users", "--user", "3"], "--all-users does not go with --user"),
            (["--all-users"], "--all-users makes no table: give --format csv"),
            (["--user", "3", "-k", "0"], "-k 0: give a whole number of at least 1"),
            (["--user", "3", "--format", "xml"], "--format xml: choose table, csv, json, jsonl"),
            (["--user", "3", "--out", "r.xml"], "--out r.xml: name it .csv, .json, .jsonl"),
            (["--user", "3", "--device", "gpu"], "--device gpu: no such device"),
            (
                ["--user", "3", "--out", "/dev/null", "--format", "csv"],
                "--out /dev/null: is not a plain file",
            ),
            (["--users-file", "nowhere.txt"], "--users-file nowhere.txt: no such file"),
        ],
    )
    def test_names_the_option(self, trained: Trained, options: list[str], message: str) -> None:
        result = run("recommend", "--run", trained.folder, *options)
        assert result.exit_code == 2
        assert squeezed(message) in squeezed(result.output)
        assert "Traceback" not in result.output

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_device_that_is_not_there(self, trained: Trained) -> None:
        result = run("recommend", "--run", trained.folder, "--user", 3, "--device", "cuda")
        assert (result.exit_code, result.stderr.split(";")[0]) == (
            2,
            "Error: --device cuda: PyTorch sees 0 CUDA devices",
        )

    def test_files_of_users_that_cannot_be_read(self, trained: Trained, tmp_path: Path) -> None:
        for content, message in ((b" \n\n", "holds no id"), (b"a\n\xff", "not UTF-8")):
            (tmp_path / "users.txt").write_bytes(content)
            options = ["--users-file", tmp_path / "users.txt"]
            result = run("recommend", "--run", trained.folder, *options)
            assert result.exit_code == 2
            assert message in result.stderr

    def test_no_model(self, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        result = run("recommend", "--user", 3)
        assert result.exit_code == 2
        assert "--run runs/ml-100k: there is no trained model: train one with" in result.stderr
        assert "trained already" not in result.stderr
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "films").symlink_to(trained.folder)
        assert "trained already: runs/films" in run("recommend", "--user", 3).stderr
        unfinished = tmp_path / "runs" / "half" / "checkpoints"
        unfinished.mkdir(parents=True)
        (unfinished / "LU-Net.safetensors").write_bytes(b"")
        assert "the training there is not finished" in run("export", "--run", "runs/half", "-o", "v").stderr

    def test_a_damaged_model(self, trained: Trained, tmp_path: Path) -> None:
        whole = (trained.folder / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:-10])
        result = run("recommend", "--run", tmp_path, "--user", 3)
        assert result.exit_code == 2
        assert "not a whole safetensors file" in result.stderr


class TestItems:
    def test_some_items_alone_and_some_never(self, trained: Trained, tmp_path: Path) -> None:
        (tmp_path / "some.txt").write_text("0\n1\n2\n3\n39\nnew\n")
        (tmp_path / "old.txt").write_text("2\nunknown\n")
        files = ["--items-file", tmp_path / "some.txt", "--exclude-items-file", tmp_path / "old.txt"]
        result = run("recommend", "--run", trained.folder, "-u", "nobody", *files, "--format", "json")
        assert result.exit_code == 0, result.output
        rows = {str(row["item"]): row["title"] for row in json.loads(result.stdout)}
        titles = {str(n): f"Film {n}, uncut" for n in (1, 3, 39)}
        assert rows == {"0": FORMULA, **titles, "new": None}

    def test_a_file_that_is_not_there(self, trained: Trained, tmp_path: Path) -> None:
        for option in ("--items-file", "--exclude-items-file"):
            result = run("recommend", "--run", trained.folder, "-u", 3, option, tmp_path / "no.txt")
            assert result.exit_code == 2
            assert squeezed(f"{option} {tmp_path / 'no.txt'}: no such file") in squeezed(result.output)


def test_a_stream_keeps_no_pairs_to_leave_out_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    latent_frame().to_parquet(tmp_path / "r.parquet")
    short = ["--stream", "--epochs", 1, "--members", 1, "--embedding-size", 4]
    made = run("train", "-d", tmp_path / "r.parquet", "-o", tmp_path / "run", *short)
    assert made.exit_code == 0, made.output
    assert "is not left out" in run("recommend", "--run", tmp_path / "run", "-u", 3).stderr
    with_seen = run("recommend", "--run", tmp_path / "run", "-u", 3, "--include-seen")
    assert "is not left out" not in with_seen.stderr
