from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.cli.conftest import Trained
from tests.cli.invoke import QUICK, run, squeezed
from tests.recsys.synthetic import latent_frame


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


@pytest.fixture(scope="module")
def formulas(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    frame = latent_frame()
    frame["user"] = [f"={u}+1" for u in frame["user"]]
    frame["item"] = [f"'@{i}" for i in frame["item"]]
    folder = tmp_path_factory.mktemp("formulas")
    recommender = LUNetRecommender(**QUICK).fit(frame, scale=(1, 5))
    recommender.save(folder)
    return Trained(folder, recommender)


class TestOwnFiles:
    """Ids that a spreadsheet would run as formulas, in files that the commands wrote."""

    def test_ids_come_back(self, formulas: Trained, tmp_path: Path) -> None:
        best, first, second = (tmp_path / f"{name}.csv" for name in ("best", "first", "second"))
        assert run("recommend", "--run", formulas.folder, "--all-users", "-k", 3, "-o", best).exit_code == 0
        assert best.read_text().splitlines()[1].startswith("'=0+1,1,''@")
        result = run("predict", "--run", formulas.folder, "--pairs", best, "-o", first)
        assert result.exit_code == 0, result.output
        assert "Note" not in result.stderr
        expected = formulas.recommender.recommend([f"={u}+1" for u in sorted(map(str, range(60)))], 3)
        found = pd.read_csv(first)
        values = formulas.recommender.predict(expected["user"], expected["item"])
        assert found["user"].tolist() == [f"'{user}" for user in expected["user"]]
        np.testing.assert_array_equal(found["prediction"].to_numpy(np.float32), values)
        assert run("predict", "--run", formulas.folder, "--pairs", first, "-o", second).exit_code == 0
        assert second.read_bytes() == first.read_bytes()

    def test_ids_as_in_the_training_data_stay(self, formulas: Trained, tmp_path: Path) -> None:
        pairs, unknown = tmp_path / "pairs.csv", tmp_path / "unknown.csv"
        pairs.write_text("user,item\n=3+1,'@4\n")
        result = run("predict", "--run", formulas.folder, "--pairs", pairs)
        assert result.stderr == ""
        assert np.float32(result.stdout.split(",")[-1]) == formulas.recommender.predict("=3+1", "'@4")[0]
        unknown.write_text("user,item\n'=x,'@4\n=x,'@4\n")
        result = run("predict", "--run", formulas.folder, "--pairs", unknown)
        assert [line.split(",")[0] for line in result.stdout.splitlines()[1:]] == ["'=x", "'=x"]

    def test_an_id_that_may_be_either_is_refused(self, tmp_path: Path) -> None:
        frame = latent_frame()
        frame["user"] = frame["user"].map({0: "=x", 1: "'=x"}).fillna("u" + frame["user"].astype(str))
        recommender = LUNetRecommender(**QUICK).fit(frame, scale=(1, 5))
        recommender.save(tmp_path)
        pairs = tmp_path / "pairs.csv"
        pairs.write_text("user,item\nu2,3\n'=x,3\n")
        result = run("predict", "--run", tmp_path, "--pairs", pairs)
        assert result.exit_code == 2
        assert 'line 3: user "\'=x" is a known user, and is one without its first apostrophe' in result.stderr
        pd.DataFrame({"user": ["'=x"], "item": [3]}).to_parquet(tmp_path / "pairs.parquet")
        result = run("predict", "--run", tmp_path, "--pairs", tmp_path / "pairs.parquet")
        assert np.float32(result.stdout.split(",")[-1]) == recommender.predict("'=x", 3)[0]


class TestUnseen:
    def test_the_fall_back_is_the_mean_and_what_is_known(self, trained: Trained, tmp_path: Path) -> None:
        frame = latent_frame()
        mean, of_item = frame["rating"].mean(), frame[frame["item"] == 4]["rating"]
        deviation = (of_item - mean).sum() / (len(of_item) + 10)
        (tmp_path / "pairs.csv").write_text("user,item\nnobody,nothing\nnobody,4\n-9223372036854775808,4\n")
        result = run("predict", "--run", trained.folder, "--pairs", tmp_path / "pairs.csv")
        assert result.exit_code == 0
        assert "Note: 3 of 3 pairs have a user or an item without a rating" in result.stderr
        found = [float(line.split(",")[-1]) for line in result.stdout.splitlines()[1:]]
        assert found == pytest.approx([mean, mean + deviation, mean + deviation], rel=1e-5)


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
