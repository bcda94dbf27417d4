"""Texts of items, ties between users and weights of choices, from files."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast.recsys.data.errors import RatingFileError
from lunet_fast.recsys.data.ratings import Ratings, from_frame, read_ratings
from lunet_fast.recsys.data.splits import join, leave_one_out
from lunet_fast.recsys.data.texts import text_table, with_items, with_text
from lunet_fast.recsys.data.ties import with_friends

FRAME = pd.DataFrame(
    {
        "user": ["a", "b", "b", "c"],
        "item": ["x", "y", "x", "z"],
        "rating": [1, 2, 3, 4],
        "plays": [1, 5, 2.5, 9],
    }
)


def ratings() -> Ratings:
    return from_frame(FRAME, scale=(1, 5), name="few")


class TestTexts:
    TEXTS = ("red fish", "red fish swims", "blue bird", "blue bird sings", "", "nothing shared")

    def test_texts_that_share_words_are_near(self) -> None:
        pytest.importorskip("sklearn")
        table = text_table(self.TEXTS)
        near = table @ table.T
        assert near[0, 1] > 0.5
        assert near[2, 3] > 0.5
        assert abs(near[0, 2]) < 1e-6
        assert not table[4:].any()
        torch.testing.assert_close(table[:4].norm(dim=1), torch.ones(4))
        assert torch.equal(text_table(self.TEXTS), table)

    def test_many_words_become_few_numbers(self) -> None:
        pytest.importorskip("sklearn")
        rng = np.random.default_rng(0)
        texts = [" ".join(f"w{k}" for k in rng.integers(300, size=30)) for _ in range(200)]
        table = text_table(texts, 16)
        assert table.shape == (200, 16)
        assert table.dtype == torch.float32
        torch.testing.assert_close(table.norm(dim=1), torch.ones(200))

    def test_a_file(self, tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        file = tmp_path / "films.csv"
        file.write_text("film,about\ny,blue bird\nx,red fish\nnew,red fish\nx,again\n")
        told = with_text(ratings(), file, item="film", text="about")
        assert told.items.ids.tolist() == ["new", "x", "y", "z"], "an item without ratings, too"
        assert told.items.ids[told.item].tolist() == FRAME["item"].tolist()
        assert told.item_text is not None
        new, x, y, z = told.item_text
        assert torch.dot(new, x) > 0.9
        assert not z.any()
        assert torch.equal(told.select([0, 2]).item_text, told.item_text)

    def test_vectors(self, tmp_path: Path) -> None:
        file = tmp_path / "vectors.npz"
        vectors = np.arange(6.0).reshape(3, 2)
        np.savez(file, item=np.array(["z", "y", "new"]), vectors=vectors)
        told = with_text(ratings(), file)
        assert told.item_text is not None
        assert told.item_text.tolist() == [[4, 5], [0, 0], [2, 3], [0, 1]]

    def test_titles(self) -> None:
        pytest.importorskip("sklearn")
        info = pd.DataFrame({"title": ["Red Fish (1999)", "Red Fish II (1999)", None]})
        told = with_text(replace(ratings(), item_info=info), "titles")
        assert told.item_text is not None
        assert torch.dot(told.item_text[0], told.item_text[1]) > 0.9
        with pytest.raises(ValueError, match="text='titles': few has no titles"):
            with_text(ratings(), "titles")

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"item": np.array(["x"])}, "vectors"),
            ({"item": np.array(["x"]), "vectors": np.zeros((2, 3))}, r"\[1\] and float64 \[2, 3\]"),
            ({"item": np.array(["x", "x"]), "vectors": np.zeros((2, 3))}, "there twice"),
            ({"item": np.array(["x"]), "vectors": np.full((1, 3), np.nan)}, "not finite"),
            ({"item": np.array([{}]), "vectors": np.zeros((1, 3))}, "no file of the arrays"),
            ({"item": np.array(["x"]), "vectors": np.array([["1"]])}, "<U1"),
        ],
    )
    def test_vectors_that_are_none(self, tmp_path: Path, arrays: dict, message: str) -> None:
        np.savez(tmp_path / "v.npz", **arrays)
        with pytest.raises(RatingFileError, match=message):
            with_text(ratings(), tmp_path / "v.npz")

    def test_other_files(self, tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        (tmp_path / "v.npz").write_bytes(b"no zip")
        with pytest.raises(RatingFileError, match="no file of the arrays"):
            with_text(ratings(), tmp_path / "v.npz")
        (tmp_path / "t.csv").write_text("item,text\n,red\n")
        with pytest.raises(RatingFileError, match="item id is empty"):
            with_text(ratings(), tmp_path / "t.csv")
        (tmp_path / "t.csv").write_text("item,words\nx,red\n")
        with pytest.raises(RatingFileError, match="no column 'text' .* text=..."):
            with_text(ratings(), tmp_path / "t.csv")
        (tmp_path / "t.csv").write_text("item,text\nx,red\ny,blue\n")
        with pytest.raises(ValueError, match="no word is in two"):
            with_text(ratings(), tmp_path / "t.csv")

    def test_without_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
        with pytest.raises(ImportError, match=r"lunet-fast\[text\]"):
            text_table(["a", "b"])

    def test_items_are_added_where_they_belong(self) -> None:
        info = pd.DataFrame({"title": ["X", "Y", "Z"]}, index=[7, 8, 9])
        more = with_items(replace(ratings(), item_info=info), ["y", "a", "zz"])
        assert more.items.ids.tolist() == ["a", "x", "y", "z", "zz"]
        assert more.item_info is not None
        assert more.item_info["title"].fillna("").tolist() == ["", "X", "Y", "Z", ""]
        assert more.items.ids[more.item].tolist() == FRAME["item"].tolist()
        same = ratings()
        assert with_items(same, ["x", "z"]) is same


class TestTies:
    def test_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "ties.csv"
        file.write_text("user,friend,trust\na,b,2\nb,c,.5\nc,c,1\na,stranger,1\n")
        ties = with_friends(ratings(), file, weight="trust").friends
        assert ties is not None
        assert (ties.user.tolist(), ties.friend.tolist()) == ([0, 1], [1, 2])
        assert ties.weight.tolist() == [2.0, 0.5]
        alike = with_friends(ratings(), file).friends
        assert alike is not None
        assert alike.weight.tolist() == [1.0, 1.0]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("user,friend\nq,r\n", "'q' and its friend are not both users of few"),
            ("user,friend\na,\n", "friend id is empty"),
            ("user,knows\na,b\n", "no column 'friend'"),
        ],
    )
    def test_files_that_say_nothing(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "ties.csv").write_text(text)
        with pytest.raises(RatingFileError, match=message):
            with_friends(ratings(), tmp_path / "ties.csv")

    def test_weights_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "ties.csv").write_text("user,friend,w\na,b,0\n")
        with pytest.raises(RatingFileError, match="weight .*'0' is not above 0"):
            with_friends(ratings(), tmp_path / "ties.csv", weight="w")


class TestWeights:
    def test_a_column(self, tmp_path: Path) -> None:
        FRAME.to_csv(tmp_path / "plays.csv", index=False)
        found = read_ratings(tmp_path / "plays.csv", weight="plays")
        assert found.weight is not None
        assert found.weight.tolist() == [1.0, 5.0, 2.5, 9.0]
        assert found.select([1, 3]).weight.tolist() == [5.0, 9.0]
        split = leave_one_out(found, 0)
        assert len(found.select(split.train).weight) == len(split.train)
        assert read_ratings(tmp_path / "plays.csv").weight is None

    def test_interactions_keep_that_of_the_row_that_counts(self) -> None:
        frame = pd.DataFrame({"user": [1, 1], "item": [2, 2], "timestamp": [9, 5], "plays": [3, 4]})
        found = from_frame(frame, rating=None, weight="plays")
        assert found.weight is not None
        assert found.weight.tolist() == [3.0]

    @pytest.mark.parametrize("value", ["0", "-1", "nan", "many", ""])
    def test_values_that_are_none(self, tmp_path: Path, value: str) -> None:
        (tmp_path / "w.csv").write_text(f"user,item,rating,w\n1,2,3,1\n1,3,3,{value}\n")
        with pytest.raises(RatingFileError, match="line 3: weight"):
            read_ratings(tmp_path / "w.csv", weight="w")
        with pytest.raises(RatingFileError, match="no column 'plays' .*weight=..."):
            read_ratings(tmp_path / "w.csv", weight="plays")


def test_joined_parts_have_neither_texts_nor_ties() -> None:
    """Their indices are others."""
    first = replace(ratings().select([0, 1]), item_text=torch.zeros(3, 2))
    second = from_frame(FRAME.assign(item=["q", "r", "s", "t"]), scale=(1, 5))
    for part in join(first, second):
        assert part.item_text is None
        assert part.friends is None
