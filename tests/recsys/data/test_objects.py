from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from lunet_fast.recsys.data.ids import IdMap
from lunet_fast.recsys.data.objects import items_frame, ratings_frame
from lunet_fast.recsys.data.ratings import from_frame

NAMES = ("user", "item", "rating", "timestamp")


class Polars:
    """What is read of a data frame of polars, which has no index and no ``iloc``."""

    class Column:
        def __init__(self, name: str, values: list[Any]) -> None:
            self.name, self._values = name, values

        def to_list(self) -> list[Any]:
            return self._values

    def __init__(self, frame: pd.DataFrame) -> None:
        self._of = {name: self.Column(str(name), frame[name].tolist()) for name in frame}

    @property
    def columns(self) -> list[str]:
        return list(self._of)

    def get_columns(self) -> list[Column]:
        return list(self._of.values())

    def __getitem__(self, name: str) -> Column:
        return self._of[name]


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.tuples(st.integers(0, 6), st.integers(0, 5)), st.integers(-3, 5).map(float), min_size=1
    )
)
def test_every_kind_of_object_is_the_same_ratings(known: dict[tuple[int, int], float]) -> None:
    """Values of 0 are ratings too, which a sparse matrix may store."""
    frame = pd.DataFrame([(*pair, rating) for pair, rating in known.items()], columns=NAMES[:3])
    user, item, rating = (frame[name].to_numpy() for name in NAMES[:3])
    nested: dict[int, dict[int, float]] = {}
    for (u, i), r in known.items():
        nested.setdefault(u, {})[i] = r
    rows = list(zip(user.tolist(), item.tolist(), rating.tolist(), strict=True))
    kinds: list[Any] = [
        frame,
        Polars(frame),
        sparse.coo_array((rating, (user, item)), shape=(7, 6)),
        sparse.csr_matrix((rating, (user, item)), shape=(7, 6)),
        rows,
        [list(row) for row in rows],
        iter(rows),
        np.array(rows),
        torch.tensor(rows),
        np.array(rows, dtype=[("user", int), ("item", int), ("rating", float)]),
        [{"user": u, "item": i, "rating": r} for u, i, r in rows],
        known,
        nested,
        frame.set_index(["user", "item"])["rating"],
    ]
    for given_ in kinds:
        found = from_frame(ratings_frame(given_, NAMES))
        ids = zip(
            found.users.ids[found.user.numpy()].tolist(),
            found.items.ids[found.item.numpy()].tolist(),
            strict=True,
        )
        assert dict(zip(ids, found.rating.tolist(), strict=True)) == known, type(given_)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (np.zeros((5, 9)), r"array of \[5, 9\].*scipy\.sparse\.coo_array"),
        (np.zeros(5), "ndarray"),
        ([1, 2, 3], "list"),
        ([(1, 2, 3.0), (1, 2)], "rows of 2 and 3 cells"),
        ([(1, 2, 3.0), 7], "rows of 0 and 3 cells"),
        ([(1, 2, 3.0, 4, 5)], "rows of 5 cells"),
        (pd.Series([4.0, 3.0]), r"pandas\.Series"),
        ({"ann": 3.0}, r"ratings\['ann'\] is a float"),
        (object(), "a object: give a file's path"),
        (7, r"a int \(7\)"),
        (None, "NoneType"),
    ],
)
def test_what_are_no_ratings_is_named(given_: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ratings_frame(given_, NAMES)


class Lazy(Polars):
    """What is asked of a lazy frame of polars, which computes where it is asked for its columns."""

    columns = property(lambda self: pytest.fail("was computed"))  # type: ignore[assignment]
    get_columns = property(lambda self: (_ for _ in ()).throw(AttributeError()))  # type: ignore[assignment]

    def collect(self) -> None:
        pytest.fail("was computed")


def test_a_lazy_frame_is_named_and_not_computed() -> None:
    with pytest.raises(TypeError, match="Lazy: give a data frame of pandas or polars, collected"):
        ratings_frame(Lazy(pd.DataFrame({"user": [1]})), NAMES)


def test_columns_without_names_are_named_by_numbers() -> None:
    frame = pd.DataFrame([(5, 3.0, 8), (5, 4.0, 9)])
    with pytest.raises(ValueError, match=r"ratings: there is no column 'user' .* '0', '1', '2'"):
        from_frame(frame)
    found = from_frame(frame, user=0, item=2, rating=1)  # type: ignore[arg-type]
    assert (found.users.ids.tolist(), found.items.ids.tolist()) == ([5], [8, 9])
    assert found.rating.tolist() == [3.0, 4.0]


GIVEN = {"b": 4.0, "a": 2.5}


@pytest.mark.parametrize(
    "given_",
    [
        GIVEN,
        pd.Series([4.0, 2.5], index=["b", "a"]),
        [("b", 4.0), ("a", 2.5)],
        [["b", 4.0], ["a", 2.5]],
        GIVEN.items(),
        zip("ba", (4.0, 2.5), strict=True),
        [{"item": "b", "rating": 4.0}, {"item": "a", "rating": 2.5}],
        pd.DataFrame({"item": ["b", "a"], "rating": [4.0, 2.5]}),
        Polars(pd.DataFrame({"item": ["b", "a"], "rating": [4.0, 2.5]})),
        np.array([("b", 4.0), ("a", 2.5)], dtype=object),
    ],
)
def test_ratings_of_one_user(given_: Any) -> None:
    found = items_frame(given_, "ratings")
    assert dict(zip(found["item"], found["rating"], strict=True)) == GIVEN


@pytest.mark.parametrize(
    "given_",
    [
        ["b", "a"],
        ("b", "a"),
        np.array(["b", "a"]),
        pd.Series(["b", "a"]),
        pd.Series(["b", "a"], index=[7, 3]),
        pd.Index(["b", "a"]),
        pd.DataFrame({"item": ["b", "a"]}),
        pd.DataFrame({"item": ["b", "a"], "x": 0}).iloc[::1]["item"],
        (text for text in "ba"),
    ],
)
def test_items_of_one_user(given_: Any) -> None:
    found = items_frame(given_, "ratings")
    assert found["item"].tolist() == ["b", "a"]
    assert "rating" not in found.columns


def test_numbers_of_one_user() -> None:
    column = pd.DataFrame({"user": [1, 2, 1], "item": [30, 10, 20]}).query("user == 1")["item"]
    assert items_frame(column, "ratings")["item"].tolist() == [30, 20]
    row = sparse.csr_array(np.array([[0, 0, 3.0, 0, 1.0]]))
    for matrix in (row, row.T, sparse.csr_matrix(row)):
        found = items_frame(matrix, "ratings")
        assert dict(zip(found["item"], found["rating"], strict=True)) == {2: 3.0, 4: 1.0}


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ("film", r"ratings is a str \('film'\): give"),
        (7, "a int"),
        (None, "NoneType"),
        (pd.Series([4.0, 3.0]), "without items in its index"),
        ([("a", 3.0), "b"], "rows of 0 and 2 cells"),
        ([{"a"}], "a set"),
        ({"ann": {"a": 3.0}}, "a dict: give a rating for each item"),
        (np.zeros((4, 7)), r"\[4, 7\]"),
        (sparse.eye_array(3), "one user's row"),
    ],
)
def test_what_is_no_user_is_named(given_: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        items_frame(given_, "ratings")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pd.DataFrame({"item": [1]}), "data frame a column"),
        ({"a": 3.0}, "a dict"),
        ([("a", 3.0)], r"holds a tuple: \('a', 3.0\)"),
        ([1, [2]], "holds a list"),
        (np.zeros((2, 3)), r"\[2, 3\]"),
        (sparse.eye_array(3), "scipy"),
        (None, "NoneType"),
        (object(), "a object"),
    ],
)
def test_what_are_no_ids_is_named(ids: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        IdMap(["a", "b"]).index(ids)
