from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.cli.conftest import Trained
from tests.cli.invoke import run, squeezed


def test_one_pair_is_one_number(trained: Trained, texts: Trained) -> None:
    result = run("predict", "--run", trained.folder, "--user", 42, "--item", 7)
    assert (result.exit_code, result.stderr) == (0, "")
    assert np.float32(result.stdout) == trained.recommender.predict(42, 7)[0]
    pair = ("user 3 ü", "item-5, vol. 2")
    result = run("predict", "--run", texts.folder, "--user", pair[0], "--item", pair[1])
    assert np.float32(result.stdout) == texts.recommender.predict(*pair)[0]


class TestPairs:
    def test_csv_keeps_the_order_and_the_ids(self, trained: Trained, tmp_path: Path) -> None:
        pairs, out = tmp_path / "pairs.csv", tmp_path / "new" / "out.csv"
        pairs.write_text("note,item,user\nx,7,42\n\ny,0,42\nz,7,42\n,=A1,-8\n")
        result = run("predict", "--run", trained.folder, "--pairs", pairs, "--out", out)
        assert result.exit_code == 0, result.output
        assert result.stdout == ""
        assert "Note: 1 of 4 pairs have a user or an item without a rating" in result.stderr
        assert f"4 predictions written to {out}" in result.stderr
        found = pd.read_csv(out, dtype={"user": str, "item": str})
        assert list(found.columns) == ["user", "item", "prediction"]
        assert found["user"].tolist() == ["42", "42", "42", "-8"]
        assert found["item"].tolist() == ["7", "0", "7", "'=A1"]
        expected = trained.recommender.predict([42, 42, 42, -8], [7, 0, 7, "=A1"])
        np.testing.assert_array_equal(found["prediction"].to_numpy(np.float32), expected)

    def test_columns_and_separators(self, texts: Trained, tmp_path: Path) -> None:
        frame = pd.DataFrame({"who": ["user 1 ü", "user 2 ü"], "what": ["item-1, vol. 2"] * 2})
        columns = ["--user-column", "who", "--item-col", "what"]
        frame.to_csv(tmp_path / "a.txt", sep=";", index=False)
        frame.to_csv(tmp_path / "b.tsv.gz", sep="\t", index=False)
        frame.to_parquet(tmp_path / "c.parquet")
        expected = texts.recommender.predict(frame["who"], frame["what"])
        for file, options in (("a.txt", ["--sep", ";"]), ("b.tsv.gz", []), ("c.parquet", [])):
            command = ["predict", "--run", texts.folder, "--pairs", tmp_path / file, *columns, *options]
            result = run(*command)
            assert result.exit_code == 0, result.output
            lines = result.stdout.splitlines()
            assert lines[1].startswith('user 1 ü,"item-1, vol. 2",')
            assert [np.float32(line.rsplit(",", 1)[1]) for line in lines[1:]] == expected.tolist()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "give --pairs FILE, or --user ID and --item ID"),
            (["--user", "3"], "--user and --item go together"),
            (["--user", "3", "--pairs", "p.csv"], "give --pairs FILE, or"),
            (["--user", "3", "--item", "3", "--out", "o.csv"], "--out goes with --pairs"),
            (["--pairs", "nowhere.csv"], "--pairs nowhere.csv: no such file"),
        ],
    )
    def test_names_the_option(self, trained: Trained, options: list[str], message: str) -> None:
        result = run("predict", "--run", trained.folder, *options)
        assert result.exit_code == 2
        assert squeezed(message) in squeezed(result.output)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("who,item\n1,2\n", "line 1: there is no column 'user' for the user"),
            ("user,item\n1,2\n,3\n", "line 3: user id is empty"),
            ("user,item\n1,2\n1,2,3\n", "line 3: the number of fields is 3"),
            ("user,item\n", "no row after it"),
            ("", "the file is empty"),
        ],
    )
    def test_a_broken_file_names_the_line(
        self, trained: Trained, tmp_path: Path, content: str, message: str
    ) -> None:
        (tmp_path / "pairs.csv").write_text(content)
        out = tmp_path / "out.csv"
        result = run("predict", "--run", trained.folder, "--pairs", tmp_path / "pairs.csv", "--out", out)
        assert result.exit_code == 2
        assert message in result.stderr
        assert not out.exists()
