"""Rating files: what is read, under which rules, and how each damage is reported."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lunet_fast.recsys.data import limits
from lunet_fast.recsys.data.parquet_sizes import stated_sizes
from lunet_fast.recsys.data.ratings import (
    IdMap,
    RatingFileError,
    Ratings,
    from_frame,
    parse_text,
    read_ratings,
)
from lunet_fast.recsys.data.table import MISSING
from lunet_fast.training import outside

HEADER = "user,item,rating,timestamp\n"


def write(folder: Path, content: str | bytes, name: str = "ratings.csv") -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def rows(ratings: Ratings) -> list[tuple[object, object, float, int | None]]:
    """The table in the ids of the file."""
    times = [None] * len(ratings) if ratings.timestamp is None else ratings.timestamp.tolist()
    return list(
        zip(
            ratings.users.ids[ratings.user.numpy()].tolist(),
            ratings.items.ids[ratings.item.numpy()].tolist(),
            ratings.rating.tolist(),
            times,
            strict=True,
        )
    )


# ------------------------------------------------------------------------------------------------------------
# What is read


def test_a_plain_csv(tmp_path: Path) -> None:
    file = write(tmp_path, HEADER + "7,30,4.5,100\n2,30,1,200\n7,-4,3,300\n")
    ratings = read_ratings(file)
    assert rows(ratings) == [(7, 30, 4.5, 100), (2, 30, 1.0, 200), (7, -4, 3.0, 300)]
    assert (ratings.n_users, ratings.n_items, len(ratings)) == (2, 2, 3)
    assert ratings.users.ids.tolist() == [2, 7]
    assert ratings.items.ids.tolist() == [-4, 30]
    assert ratings.scale == (1.0, 4.5)
    assert [t.dtype for t in (ratings.user, ratings.item, ratings.rating)] == [
        torch.int64,
        torch.int64,
        torch.float32,
    ]
    assert ratings.name == "ratings.csv"
    assert ratings.source == str(file)


@pytest.mark.parametrize(
    ("name", "sep"), [("r.csv", ","), ("r.tsv", "\t"), ("r.txt", "\t"), ("r.dat", "::"), ("R.TSV", "\t")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_extension_decides_the_format(tmp_path: Path, name: str, sep: str, packed: bool) -> None:
    text = sep.join(["user", "item", "rating"]) + "\n" + sep.join(["1", "2", "3"]) + "\n"
    data = gzip.compress(text.encode()) if packed else text.encode()
    ratings = read_ratings(write(tmp_path, data, name + ".gz" * packed))
    assert rows(ratings) == [(1, 2, 3.0, None)]
    assert ratings.timestamp is None


def test_sep_overrides_the_extension(tmp_path: Path) -> None:
    assert rows(read_ratings(write(tmp_path, "user;item;rating\n1;2;3\n"), sep=";")) == [(1, 2, 3.0, None)]
    assert rows(read_ratings(write(tmp_path, "user item rating\n1 2 3\n", "r.anything"), sep=" ")) == [
        (1, 2, 3.0, None)
    ]
    assert rows(read_ratings(write(tmp_path, "user§item§rating\n1§2§3\n"), sep="§")) == [(1, 2, 3.0, None)]


def test_other_column_names_and_order_and_extra_columns(tmp_path: Path) -> None:
    file = write(tmp_path, "note,when,stars,film,who\nx,5,3,20,10\n,6,4,21,10\n")
    ratings = read_ratings(file, user="who", item="film", rating="stars", timestamp="when")
    assert rows(ratings) == [(10, 20, 3.0, 5), (10, 21, 4.0, 6)]
    assert read_ratings(file, user="who", item="film", rating="stars").timestamp is None


def test_an_inter_file_loses_its_types(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t881250949\n",
        "a.inter",
    )
    assert rows(read_ratings(file, user="user_id", item="item_id")) == [(1, 2, 3.0, 881250949)]


def test_parquet_and_frame_equal_csv(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(
        {"user": [3, 1, 3], "item": ["a", "b", "ü"], "rating": [1.5, 2.0, 5.0], "timestamp": [9, 0, 7]}
    )
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_parquet(tmp_path / "r.parquet")
    expected = rows(read_ratings(tmp_path / "r.csv"))
    assert expected == [(3, "a", 1.5, 9), (1, "b", 2.0, 0), (3, "ü", 5.0, 7)]
    assert rows(read_ratings(tmp_path / "r.parquet")) == expected
    assert rows(from_frame(frame)) == expected


def test_parquet_types(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(
        {
            "user": pd.Categorical(["x", "y"], categories=["unused", "y", "x"]),
            "item": np.array([1, 2], dtype=np.uint16),
            "rating": np.array([3, 4], dtype=np.int8),
            "timestamp": pd.to_datetime(["2020-01-31T12:30:00.75Z", "NaT"]),
        }
    )
    frame.set_index("user").to_parquet(tmp_path / "r.parquet")
    ratings = read_ratings(tmp_path / "r.parquet")
    assert rows(ratings) == [("x", 1, 3.0, 1580473800), ("y", 2, 4.0, 0)]
    assert ratings.users.ids.tolist() == ["x", "y"]


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        (["7", "-3", "0"], [-3, 0, 7]),
        (["9223372036854775807", "-9223372036854775808", "4294967296"], [-(2**63), 2**32, 2**63 - 1]),
        (["9223372036854775808", "7", "70"], ["7", "70", "9223372036854775808"]),
        (["007", "7", "8"], ["007", "7", "8"]),
        (["+5", "5", "6"], ["+5", "5", "6"]),
        (["-0", "0", "1"], ["-0", "0", "1"]),
        (["1.0", "1", "2"], ["1", "1.0", "2"]),
        (["1e3", "1000", "x"], ["1000", "1e3", "x"]),
        (["true", "false", "inf"], ["false", "inf", "true"]),
        (["NA", "nil", "none of them"], ["NA", "nil", "none of them"]),
        (["žluť", "日本", "😀"], ["žluť", "日本", "😀"]),
        (["١", "1", "2"], ["1", "2", "١"]),
    ],
)
@pytest.mark.parametrize("quoted", [False, True])
def test_ids_are_integers_if_all_are(
    tmp_path: Path, written: list[str], ids: list[object], quoted: bool
) -> None:
    quote = '"' if quoted else ""
    text = HEADER + "".join(f"{quote}{one}{quote},1,3,0\n" for one in written)
    ratings = read_ratings(write(tmp_path, text))
    assert ratings.users.ids.tolist() == ids
    assert [str(row[0]) for row in rows(ratings)] == written
    assert ratings.users.ids.dtype == (np.int64 if isinstance(ids[0], int) else object)


def test_white_space_bom_line_ends_and_blank_lines(tmp_path: Path) -> None:
    plain = rows(read_ratings(write(tmp_path, HEADER + "1,2,3,4\n5,6,3.5,8\n")))
    for text in (
        "\ufeff" + HEADER + "1,2,3,4\n5,6,3.5,8",
        HEADER.replace(",", " , ") + " 1, 2 ,3 , 4\n5,6,3.5,8\n",
        (HEADER + "1,2,3,4\n5,6,3.5,8\n").replace("\n", "\r\n"),
        (HEADER + "1,2,3,4\n5,6,3.5,8\n").replace("\n", "\r"),
        "\n  \n" + HEADER + "\n1,2,3,4\n\t\n5,6,3.5,8\n\n\n",
        '\n"user","item",rating,"timestamp"\n\n1,"2",3,4\n  \n5,6,"3.5",8\n',
    ):
        assert rows(read_ratings(write(tmp_path, text))) == plain


def test_quoted_fields(tmp_path: Path) -> None:
    text = 'user,item,rating\n"Smith, John","say ""hi""",3\n"Smith, John","two\nlines",4\n'
    assert rows(read_ratings(write(tmp_path, text))) == [
        ("Smith, John", 'say "hi"', 3.0, None),
        ("Smith, John", "two\nlines", 4.0, None),
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("881250949", 881250949),
        ("9007199254740993", 2**53 + 1),
        ("-5", -5),
        ("881250949.0", 881250949),
        ("-0.5", -1),
        ("8.5e2", 850),
        ("", 0),
        ("1970-01-02", 86400),
        ("2020-01-31T12:30:00Z", 1580473800),
        ("2020-01-31 12:30:00.999", 1580473800),
        ("2020-01-31 12:30", 1580473800),
        ("2020-01-31T14:30:00+02:00", 1580473800),
        ("2020-01-31T07:00:00-0530", 1580473800),
        ("2020-02-29", 1582934400),
    ],
)
def test_timestamps(tmp_path: Path, text: str, seconds: int) -> None:
    ratings = read_ratings(write(tmp_path, HEADER + f"1,2,3,{text}\n"))
    assert ratings.timestamp is not None
    assert ratings.timestamp.tolist() == [seconds]


table = st.lists(
    st.tuples(
        st.text(
            st.characters(codec="utf-8", exclude_characters="\0\r\n", exclude_categories=["Cs"]), min_size=1
        ),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.integers(0, 2**38),  # more could be milliseconds
    ).filter(lambda row: row[0].strip().lower() not in ("", *MISSING)),
    min_size=1,
    max_size=20,
    unique_by=lambda row: (row[0].strip(), row[1]),
)


@given(table)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_comes_back(tmp_path: Path, content: list[tuple[str, int, float, int]]) -> None:
    """Written by Python's csv module, whatever the ids hold: separators, quotes, Unicode, odd white space."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("user", "item", "rating", "timestamp"), *content])
    ratings = read_ratings(write(tmp_path, text.getvalue()))
    read = rows(ratings)
    assert [str(row[0]) for row in read] == [row[0].strip() for row in content]
    assert [row[1:] for row in read] == [row[1:] for row in content]


plain = st.text(st.sampled_from("0123456789ab .-+é"), max_size=4)


@given(st.lists(st.lists(plain, min_size=2, max_size=5).map(",".join), max_size=8))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_two_tokenisers_agree(tmp_path: Path, lines: list[str]) -> None:
    """A quoted header sends the same rows through the csv module instead of the C parser."""

    def outcome(header: str) -> object:
        try:
            return rows(read_ratings(write(tmp_path, header + "\n" + "\n".join(lines))))
        except RatingFileError as error:
            return str(error)

    assert outcome("user,item,rating") == outcome('user,item,"rating"')


# #
# ------------------------------------------------------------------------------------------------------------
# # What is refused

DAMAGED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "ratings.csv: the file is empty"),
    "blank": ("\n \n", "the file is empty"),
    "header only": (HEADER, "header, line 1, but no row"),
    "missing user": ("item,rating\n1,2\n", "line 1: there is no column 'user'.*'item', 'rating'.*user="),
    "missing item": ("user,id,rating\n1,2,3\n", "no column 'item'.*'user', 'id', 'rating'.*item="),
    "missing rating": ("user,item\n1,2\n", "no column 'rating'.*are read with rating=None.*rating="),
    "column twice": ("user,user,item,rating\n1,1,2,3\n", "column 'user' .* occurs 2 times"),
    "no header": ("1,2,3,4\n1,3,3,4\n", "the first line holds numbers: put a header"),
    "other separator": ("user;item;rating\n1;2,3;3\n1;2;3;4\n", "line 3: the number of fields is 4"),
    "text rating": (HEADER + "1,2,3,0\n1,3,good,0\n", "line 3: rating 'good' is not a number"),
    "two decimal signs": ("user;item;rating\n1;2;3,5\n1;3;3.5\n", "line 2: rating '3,5' is not a number"),
    "decimals or thousands": ("user;item;rating\n1;2;3,500\n", "line 2: .*'3,500' has a comma for decimals"),
    "underscore": (HEADER + "1,2,1_0,0\n", "line 2: rating '1_0' is not a number"),
    "other digits": (HEADER + "1,2,٣,0\n", "line 2: rating '٣' is not a number"),
    "nan": (HEADER + "1,2,3,0\n\n1,3,NaN,0\n", "line 4: rating 'NaN' is not a finite number"),
    "inf": (HEADER + "1,2,-inf,0\n", "line 2: rating '-inf' is not a finite number"),
    "overflow": (HEADER + "1,2,1e39,0\n", "line 2: rating '1e39' is not a finite number"),
    "no rating": (HEADER + "1,2,3,0\n1,3,,0\n", "line 3: rating is missing"),
    "empty user": (
        HEADER + "1,2,3,0\n ,2,3,0\n,2,3,0\n",
        r"line 3: user id is empty.*\(2 such lines in all: 3, 4\)",
    ),
    "missing users": (
        HEADER + "1,2,3,0\nNaN,2,3,0\nNULL,2,3,0\nNone,4,2,0\n",
        r"line 3: user id 'NaN' stands for a missing one.*\(3 such lines in all: 3, 4, 5\)",
    ),
    "empty item": (HEADER + '1,"",3,0\n', "line 2: item id is empty"),
    "bad time": (HEADER + "1,2,3,yesterday\n", "line 2: timestamp 'yesterday' is neither"),
    "no such day": (HEADER + "1,2,3,2021-02-29\n", "line 2: timestamp '2021-02-29' is neither"),
    "huge time": (HEADER + "1,2,3,99999999999999999999\n", "line 2: timestamp '9+' is neither"),
    "nan time": (HEADER + "1,2,3,nan\n", "line 2: timestamp 'nan' is neither"),
    "duplicate": (
        HEADER + "8,9,3,0\n1,9,3,0\n\n8,9,4,5\n",
        "line 5: user 8 has rated item 9 already in line 2",
    ),
    "two duplicates": (
        HEADER + "8,9,3,0\n1,1,3,0\n8,9,4,5\n1,1,4,5\n",
        r"line 4: user 8 has rated item 9 already in line 2.*\(2 repeated pairs in all\)",
    ),
    "duplicate by space": (
        "user,item,rating\nx,y,3\nx , y,4\n",
        "line 3: user x has rated item y already in line 2",
    ),
    "short row": (HEADER + "1,2,3,0\n1,3,3\n", "line 3: the number of fields is 3, expected 4"),
    "long row": (HEADER + "1,2,3,0\n1,3,3,0,\n", "line 3: the number of fields is 5, expected 4"),
    "all rows long": (
        "user,item,rating\n1,2,3,4\n1,3,3,4\n",
        r"line 2: .* is 4, expected 3.*\(2 such lines in all\)",
    ),
    "open quote": (HEADER + '1,2,3,0\n"1,3,3,0\n4,5,3,0\n', "line 3: the quotes do not match"),
    "text after quote": (HEADER + '"1"x,3,3,0\n', "line 2: the quotes do not match"),
    "after a quoted line end": ('user,item,rating\n"a\nb",2,3\nc,2,bad\n', "line 4: rating 'bad'"),
    "latin-1": (
        HEADER.encode() + b"1,2,3,0\nMis\xe9rables,3,3,0\n",
        "line 3: .* not UTF-8 .byte 0xe9 at offset 38.",
    ),
    "utf-16": ((HEADER + "1,2,3,0\n").encode("utf-16"), "UTF-16 .* save it as UTF-8"),
    "zero byte": (HEADER + "1,2,3,0\n1,\0,3,0\n", "line 3: a zero byte at offset 37"),
    "a zip": (b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(range(256)), "line 2: the text is not UTF-8"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_reported_with_file_and_line(tmp_path: Path, case: str) -> None:
    content, message = DAMAGED[case]
    file = write(tmp_path, content, "ratings.csv")
    with pytest.raises(RatingFileError, match=f"(?s)^{file}.*" + message.replace("ratings.csv", "")):
        read_ratings(file)


def test_the_scale(tmp_path: Path) -> None:
    file = write(tmp_path, HEADER + "1,2,1,0\n1,3,5,0\n1,4,5.5,0\n1,5,0,0\n")
    with pytest.raises(
        RatingFileError, match=r"line 4: rating '5.5' is outside the scale 1 to 5 \(2 such lines"
    ):
        read_ratings(file, scale=(1, 5))
    assert read_ratings(file, scale=(0, 10)).scale == (0.0, 10.0)
    assert read_ratings(file).scale == (0.0, 5.5)
    for scale in [(5, 1), (1, 1), (1, float("inf")), (1, 2, 3)]:
        with pytest.raises(ValueError, match="scale must be"):
            read_ratings(file, scale=scale)  # type: ignore[arg-type]


def test_an_unquoted_dat_row_keeps_its_quotes(tmp_path: Path) -> None:
    assert rows(read_ratings(write(tmp_path, 'user::item::rating\n1::"x::3\n', "r.dat"))) == [
        (1, '"x', 3.0, None)
    ]
    with pytest.raises(RatingFileError, match="line 2: contains the control character"):
        read_ratings(write(tmp_path, "user::item::rating\n1\x1f2::3::4\n", "r.dat"))


def test_arguments_are_checked(tmp_path: Path) -> None:
    file = write(tmp_path, HEADER + "1,2,3,0\n")
    for sep in ["", "\n", '"', 3]:
        with pytest.raises(ValueError, match="sep must be"):
            read_ratings(file, sep=sep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="different columns.*'user'"):
        read_ratings(file, item="user")
    with pytest.raises(FileNotFoundError):
        read_ratings(tmp_path / "absent.csv")
    with pytest.raises(RatingFileError, match="cannot tell the format from the extension '.pdf'"):
        read_ratings(write(tmp_path, "x", "r.pdf"))
    with pytest.raises(RatingFileError, match="spreadsheets are not read: save the sheet as .csv"):
        read_ratings(write(tmp_path, "x", "r.xlsx"))


def test_damaged_archives(tmp_path: Path) -> None:
    packed = gzip.compress((HEADER + "1,2,3,0\n").encode())
    for damaged in (packed[:-9], packed[:5], b"", b"user,item,rating\n", packed[:-8] + bytes(8)):
        with pytest.raises(RatingFileError, match="r.csv.gz.*(damaged|empty)"):
            read_ratings(write(tmp_path, damaged, "r.csv.gz"))


def test_damaged_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"user": [1, 2], "item": [3, 4], "rating": [1.0, 2.0]})
    frame.to_parquet(tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for damaged in (
        b"",
        b"PAR1",
        whole[:-5],
        whole[: len(whole) // 2],
        b"user,item\n1,2\n",
        whole[:4] + whole[-40:],
    ):
        with pytest.raises(RatingFileError, match="r.parquet"):
            read_ratings(write(tmp_path, damaged, "r.parquet"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": [1], "item": [2]}, "no column 'rating'"),
        ({"user": [], "item": [], "rating": []}, "no row"),
        ({"user": [1.0, None], "item": [1, 2], "rating": [3, 3]}, "row 2: user id is empty"),
        ({"user": [1.5, 2.0], "item": [1, 2], "rating": [3, 3]}, "user ids are floating-point"),
        ({"user": ["a", None], "item": [1, 2], "rating": [3, 3]}, "row 2: user id is empty"),
        ({"user": [1, 2], "item": [1, 2], "rating": [3, np.nan]}, "row 2: rating is missing"),
        ({"user": [1, 2], "item": [1, 2], "rating": [3, np.inf]}, "row 2: rating 'inf' is not a finite"),
        ({"user": [1, 2], "item": [1, 2], "rating": ["3", "x"]}, "row 2: rating 'x' is not a number"),
        (
            {"user": [1, 1], "item": [2, 2], "rating": [3, 3]},
            "row 2: user 1 has rated item 2 already in row 1",
        ),
        ({"user": [[1], [2]], "item": [1, 2], "rating": [3, 3]}, "user column .* cannot be read"),
    ],
)
def test_frames_are_checked(columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(RatingFileError, match=message):
        from_frame(pd.DataFrame(columns), name="mine")


def test_given_id_maps(tmp_path: Path) -> None:
    train = read_ratings(write(tmp_path, HEADER + "1,x,3,0\n5,y,3,0\n9,z,3,0\n"))
    file = write(tmp_path, HEADER + "9,x,3,0\n", "test.csv")
    test = read_ratings(file, users=train.users, items=train.items)
    assert (test.user.tolist(), test.item.tolist(), test.n_users, test.n_items) == ([2], [0], 3, 3)
    file = write(tmp_path, HEADER + "9,x,3,0\n8,x,3,0\n", "test.csv")
    with pytest.raises(RatingFileError, match="test.csv, line 3: user id '8' is not among the 3 users"):
        read_ratings(file, users=train.users, items=train.items)


@given(
    st.binary(max_size=120) | st.text("user,item\trating\n\r\"'1230.-e \x00é", max_size=120).map(str.encode)
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("head", [b"", HEADER.encode(), b'"user",item,rating\n'])
@pytest.mark.parametrize("name", ["r.csv", "r.tsv", "r.dat"])
def test_any_bytes_end_in_ratings_or_the_error(tmp_path: Path, name: str, head: bytes, data: bytes) -> None:
    sep = {"r.csv": b",", "r.tsv": b"\t", "r.dat": b"::"}[name]
    file = write(tmp_path, head.replace(b",", sep) + data, name)
    try:
        ratings = read_ratings(file)
    except RatingFileError as error:
        assert str(error).startswith(str(file))  # noqa: PT017
    else:
        assert len(ratings) > 0
        assert bool(torch.isfinite(ratings.rating).all())


@given(st.integers(0, 200), st.binary(min_size=1, max_size=6))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_byte_of_a_good_file(tmp_path: Path, at: int, damage: bytes) -> None:
    good = (
        HEADER + "".join(f"{u},{i},{(u + i) % 5 + 1},{u * i}\n" for u in range(4) for i in range(4))
    ).encode()
    at = min(at, len(good) - 1)
    file = write(tmp_path, good[:at] + damage + good[at + len(damage) :])
    try:
        ratings = read_ratings(file, scale=(1, 5))
    except RatingFileError as error:
        assert str(error).startswith(str(file))  # noqa: PT017
    else:
        assert 1 <= len(ratings) <= 17
        assert ratings.scale == (1.0, 5.0)


# #
# ------------------------------------------------------------------------------------------------------------
# # What a file may take


class Reads(io.BytesIO):
    """Counts the bytes that are read of it."""

    total = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.total += len(data)
        return data


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNET_FAST_MAX_BYTES", "10000")


def many(rows: int) -> bytes:
    return HEADER.encode() + b"".join(b"%d,2,3,0\n" % n for n in range(rows))


@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz", "r.parquet"])
def test_large_files_are_refused(tmp_path: Path, small_limit: None, name: str) -> None:
    file = tmp_path / name
    for rows, fits in ((300, True), (5000, False)):
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
            pd.read_csv(io.BytesIO(many(rows))).to_parquet(file)
        else:
            file.write_bytes(gzip.compress(many(rows)) if name.endswith("gz") else many(rows))
        if fits:
            assert len(read_ratings(file)) == rows
        else:
            with pytest.raises(
                RatingFileError, match=f"{file}: .* more than the 10,000 that are read on this"
            ):
                read_ratings(file)


def test_no_more_is_unpacked_than_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for length, limit in ((100, 100), (101, 100), (1000, 100)):
        stream = Reads(bytes(length))
        monkeypatch.setattr(limits, "_BLOCK", 10)
        assert limits._within(stream, limit) == (bytes(length) if length <= limit else None)
        assert stream.total <= limit + 10


def test_gzip_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their ratio: what they unpack to could be of a size that is read."""
    monkeypatch.setattr(outside, "RATIO_FREE_BYTES", 100_000)
    file = write(tmp_path, gzip.compress(HEADER.encode() + b"\n" * 2_000_000), "r.csv.gz")
    advice = "as no ratings do: if you trust it, unpack it"
    with pytest.raises(
        RatingFileError, match=rf"{file}: its [0-9,]+ bytes unpack to more than [0-9,]+, {advice}"
    ):
        read_ratings(file)
    file = write(tmp_path, gzip.compress(many(9000)), "r.csv.gz")
    assert len(read_ratings(file)) == 9000  # 7 times its size


def test_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUNET_FAST_MAX_BYTES", raising=False)
    assert outside.max_bytes(16) == outside._memory() // 16 > 1 << 20
    monkeypatch.setenv("LUNET_FAST_MAX_BYTES", " 123 ")
    assert outside.max_bytes(16) == 123
    for wrong in ("0", "-1", "1e9", "x", "4 GB"):
        monkeypatch.setenv("LUNET_FAST_MAX_BYTES", wrong)
        with pytest.raises(ValueError, match=f"LUNET_FAST_MAX_BYTES must be a whole number .*'{wrong}'"):
            outside.max_bytes(16)


@pytest.mark.parametrize(
    "text",
    [HEADER + "1,2,{},0\n", HEADER + "1,2,3,{}\n", "{},item,rating\n1,2,3\n"],
    ids=["rating", "time", "name"],
)
def test_long_numbers_take_no_long_time(tmp_path: Path, text: str) -> None:
    """120 kB of digits and a letter: two minutes when a digit could be matched in two ways."""
    file = write(tmp_path, text.format("1" * 120_000 + "x"))
    begin = time.monotonic()
    with pytest.raises(RatingFileError, match="is not a number|is neither|no column 'user'"):
        read_ratings(file)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("quote", ["", '"'])
def test_long_ids(tmp_path: Path, quote: str) -> None:
    """The two tokenisers have one limit; messages stay short."""
    fits, long = "a" * 131_072, "a" * 131_073
    text = f"user,item,rating\n{quote}{{}}{quote},2,3\n{quote}{{}}{quote},3,3\n"
    assert read_ratings(write(tmp_path, text.format(fits, "b"))).users.ids.tolist() == [fits, "b"]
    with pytest.raises(
        RatingFileError, match="line 3: .*(more than 131,072 characters|field larger than)"
    ) as caught:
        read_ratings(write(tmp_path, text.format("b", long)))
    assert len(str(caught.value)) < 400
    with pytest.raises(RatingFileError, match=r"line 3: user a+\.\.\. has rated item 2 already") as caught:
        read_ratings(write(tmp_path, f"user,item,rating\n{fits},2,3\n{fits},2,4\n"))
    assert len(str(caught.value)) < 400


def test_messages_steer_no_terminal(tmp_path: Path) -> None:
    for text in (
        "user,item,rating\n\x1b[31m,\x07,3\n\x1b[31m,\x07,3\n",
        'user\titem\trating\n"a"b\t2\t3\n',
        "user,item,rating\n1,2,\x1b[31m\n",
    ):
        with pytest.raises(RatingFileError) as caught:
            read_ratings(write(tmp_path, text), sep="\t" if "\t" in text else ",")
        assert str(caught.value).isprintable()


def test_only_the_first_byte_order_mark_goes(tmp_path: Path) -> None:
    for header in (HEADER, HEADER.replace("user", '"user"')):
        text = "\ufeff" + header + "\ufeffann,2,3,0\n"
        assert read_ratings(write(tmp_path, text)).users.ids.tolist() == ["\ufeffann"]
    assert parse_text(
        "x", b"\xef\xbb\xbf\xef\xbb\xbfann\t2\t3\t0\n", "\t", name="x", scale=(1, 5)
    ).users.ids.tolist() == ["\ufeffann"]


@pytest.mark.parametrize("zone", ["+99:99", "+24:00x", "-20:00", "+05:60"])
def test_zones_that_are_none(tmp_path: Path, zone: str) -> None:
    with pytest.raises(RatingFileError, match="line 2: timestamp '2020-01-01T00:00:00.*is neither"):
        read_ratings(write(tmp_path, HEADER + f"1,2,3,2020-01-01T00:00:00{zone}\n"))


def test_a_separator_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sep must be"):
        read_ratings(write(tmp_path, HEADER + "1,2,3,0\n"), sep="\udcff")


class TestParquet:
    """Types and sizes that only Parquet has."""

    @pytest.fixture(autouse=True)
    def _needs_pyarrow(self) -> None:
        pytest.importorskip("pyarrow")

    @staticmethod
    def put(folder: Path, columns: dict[str, Any], **settings: Any) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        n = len(next(iter(columns.values())))
        usual = {"user": np.arange(n), "item": np.arange(n), "rating": np.full(n, 3.0)}
        parquet.write_table(pa.table({**usual, **columns}), folder / "r.parquet", **settings)
        return folder / "r.parquet"

    def test_values_that_cannot_be_read(self, tmp_path: Path) -> None:
        import pyarrow as pa

        far = pa.array([2**62, 0], pa.timestamp("us", tz="Europe/Berlin"))
        for columns, message in (
            (
                {"timestamp": far},
                "the timestamp column 'timestamp' has values of type .* that cannot be read",
            ),
            ({"timestamp": far.cast(pa.timestamp("us"))}, "row 1: timestamp '148108-07-06 .*is neither"),
            (
                {"timestamp": pa.array([2**30, 0], pa.int32()).cast(pa.date32())},
                "year 2941775 is out of range",
            ),
            ({"user": pa.array([b"a", b"\xff"])}, r"row 2: user b'\\xff' is not UTF-8: store it as a string"),
            (
                {"user": [[1], [2]]},
                "the user column 'user' is of type list<.*: store a number, a string or a time",
            ),
            ({"user": [{"a": 1}, {"a": 2}]}, "the user column 'user' is of type struct<"),
        ):
            with pytest.raises(RatingFileError, match=f"r.parquet.*{message}"):
                read_ratings(self.put(tmp_path, columns))

    def test_writers_settings(self, tmp_path: Path) -> None:
        """Whatever pages, groups and columns beside them there are, the sizes are read."""
        n = 3000
        frame = pd.DataFrame({"user": np.arange(n) // 30, "item": np.arange(n) % 30, "rating": 3.0})
        columns = {
            "nested": [{"a": [1, 2], "b": {"c": "x"}}] * n,
            "user": [f"u{u}" for u in frame["user"]],
            "item": frame["item"],
        }
        for version in ("1.0", "2.0"):
            for compression in ("none", "snappy", "zstd"):
                for dictionary in (True, False):
                    file = self.put(
                        tmp_path,
                        columns,
                        compression=compression,
                        data_page_version=version,
                        use_dictionary=dictionary,
                        row_group_size=1000,
                        data_page_size=200,
                        write_page_index=True,
                    )
                    ratings = read_ratings(file)
                    assert (len(ratings), ratings.n_users, ratings.n_items) == (n, 100, 30)
                    sizes = stated_sizes(file.read_bytes(), [0, 1, 2])
                    assert (sizes.rows, sizes.values) == (n, 3 * n)

    def test_many_rows_of_few_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A run of equal values has any length: each of these rows took 150 bytes of memory."""
        monkeypatch.setenv("LUNET_FAST_MAX_BYTES", str(1 << 30))
        file = self.put(
            tmp_path, {name: np.zeros(10_000_000, np.int8) for name in ("user", "item", "rating")}
        )
        assert file.stat().st_size < 1 << 20
        with pytest.raises(
            RatingFileError, match="bytes state 10,000,000 rows of 240,000,000 bytes, as no rat"
        ):
            read_ratings(file)

    def test_a_long_text_named_often_is_kept_once(self, tmp_path: Path) -> None:
        import pyarrow as pa

        text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200, np.int32)), ["x" * 100_000])
        file = self.put(tmp_path, {"user": text.cast(pa.string())})
        pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            assert read_ratings(file).n_users == 1
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(usual)
        assert 0 < pool.max_memory() < 5_000_000
        assert peak < 5_000_000

    def test_lies_about_sizes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The footer says little, the page's header what it unpacks to; or the other way round."""
        monkeypatch.setattr(outside, "RATIO_FREE_BYTES", 100_000)
        settings = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
        file = self.put(tmp_path, {"user": ["x" * 1_000_000]}, **settings)
        good = file.read_bytes()
        page, total = varint(1_000_010), varint(stated_sizes(good, [0]).bytes)
        assert page != total  # the footer's has the page's header too
        assert (good.count(page), good.count(total)) == (1, 1)
        one = b"\x82\x80\x00"
        for lying in (good, good.replace(page, one), good.replace(total, one)):
            file.write_bytes(lying)
            with pytest.raises(
                RatingFileError, match="bytes state 1 rows of 1,000,0.. bytes, as no ratings do"
            ):
                read_ratings(file)
        monkeypatch.setattr(outside, "RATIO_FREE_BYTES", 10_000_000)
        file.write_bytes(good)
        with pytest.raises(RatingFileError, match="more than 131,072 characters"):
            read_ratings(file)
        for wrong in (one, varint(1_000_009), varint(2**20 - 1)):
            file.write_bytes(good.replace(page, wrong))
            with pytest.raises(RatingFileError, match="damaged or cut short"):
                read_ratings(file)

    def test_no_rows(self, tmp_path: Path) -> None:
        import pyarrow as pa

        with pytest.raises(RatingFileError, match="there is no row"):
            read_ratings(self.put(tmp_path, {"user": pa.array([], pa.int64())}))

    @given(st.binary(max_size=60), st.integers(0, 60))
    @settings(max_examples=300)
    def test_headers_of_any_bytes(self, data: bytes, length: int) -> None:
        file = b"PAR1" + data + length.to_bytes(4, "little") + b"PAR1"
        with contextlib.suppress(ValueError):
            stated_sizes(file, [0, 1])


def varint(number: int) -> bytes:
    """As Thrift's compact protocol has it."""
    value, out = number << 1, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# #
# ------------------------------------------------------------------------------------------------------------
# # Id maps


def test_index_of_an_integer_map() -> None:
    ids = IdMap.of([30, -7, 2**40, 30])
    assert ids.ids.tolist() == [-7, 30, 2**40]
    assert ids.ids.dtype == np.int64
    expected = [1, 0, 2, -1]
    for given_ids in (
        [30, -7, 2**40, 8],
        ["30", " -7", str(2**40), "8"],
        [np.int64(30), "-7", 2.0**40, 8.5],
        np.array([30, -7, 2**40, 8]),
        np.array([30.0, -7.0, 2.0**40, np.nan]),
        np.array(["30", "-7", str(2**40), "030"]),
        torch.tensor([30, -7, 2**40, 8]),
        pd.Series([30, -7, 2**40, 8], index=[5, 6, 7, 8]),
        ["30", "-7", str(2**40), "+30"],
        [30, -7, 2**40, 2**70],
        [30, -7, 2**40, None],
    ):
        assert ids.index(given_ids).tolist() == expected
        assert ids.index(given_ids).dtype == np.int64
    assert ids.index(30).tolist() == [1]
    assert ids.index("30").tolist() == [1]
    assert ids.index([]).tolist() == []


def test_index_of_a_string_map() -> None:
    ids = IdMap.of(["b", "10", "007", "é"])
    assert ids.ids.tolist() == ["007", "10", "b", "é"]
    assert ids.index(["é", 10, np.int32(10), "10", 7, "7", "007", "nobody"]).tolist() == [
        3,
        1,
        1,
        1,
        -1,
        -1,
        0,
        -1,
    ]
    assert ids.index(np.array([10, 7])).tolist() == [1, -1]
    assert ids.index("b").tolist() == [2]
    assert ids.index([]).tolist() == []


@given(st.lists(st.integers(-(2**63), 2**63 - 1)) | st.lists(st.text(max_size=3)))
def test_a_map_finds_its_ids(values: list[int] | list[str]) -> None:
    ids = IdMap.of(values)
    assert ids.index(ids.ids).tolist() == list(range(len(ids)))
    assert bool((ids.index(values) >= 0).all())
    assert IdMap(ids.ids.tolist()) == ids
    assert IdMap(ids.ids) == ids


def test_maps_are_sorted_and_of_one_kind() -> None:
    for wrong in ([2, 1], [1, 1], ["b", "a"], ["a", "a"]):
        with pytest.raises(ValueError, match="sorted and unique"):
            IdMap(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all integers or all strings"):
        IdMap([1, "a"])  # type: ignore[arg-type]
    assert IdMap.of([1, "a"]).ids.tolist() == ["1", "a"]
    assert IdMap.of([1, 2]) != IdMap.of(["1", "b"])
    assert len(IdMap.of([])) == 0


# #
# ------------------------------------------------------------------------------------------------------------
# # Ratings


def small() -> Ratings:
    frame = pd.DataFrame(
        {"user": [1, 1, 2], "item": [5, 6, 5], "rating": [1, 3, 3.0], "timestamp": [7, 0, 9]}
    )
    return from_frame(frame, scale=(1, 5))


def test_select_keeps_the_maps() -> None:
    ratings = small()
    part = ratings.select(torch.tensor([2, 0]))
    assert rows(part) == [(2, 5, 3.0, 9), (1, 5, 1.0, 7)]
    assert part.users is ratings.users
    assert part.items is ratings.items
    assert part.scale == (1.0, 5.0)
    assert rows(ratings.select(np.array([2, 0]))) == rows(part)
    assert rows(ratings.select(torch.tensor([True, False, True]))) == [(1, 5, 1.0, 7), (2, 5, 3.0, 9)]
    assert len(ratings.select([])) == 0


def test_describe() -> None:
    assert small().describe() == {
        "name": "ratings",
        "users": 2,
        "items": 2,
        "ratings": 3,
        "density": 0.75,
        "mean": pytest.approx(7 / 3),
        "scale": (1.0, 5.0),
        "histogram": {1.0: 1, 3.0: 2},
        "first_timestamp": 7,
        "last_timestamp": 9,
        "unknown_timestamps": 1,
    }
    many = from_frame(pd.DataFrame({"user": range(500), "item": [0] * 500, "rating": np.linspace(0, 1, 500)}))
    told = many.describe()
    assert list(told["histogram"].values()) == [50] * 10
    assert (told["first_timestamp"], told["unknown_timestamps"]) == (None, 500)
    assert small().select([]).describe()["mean"] is None


def test_shapes_and_dtypes_are_checked() -> None:
    good = small()
    for field, wrong in (
        ("item", good.item[:2]),
        ("rating", good.rating.double()),
        ("timestamp", good.item.int()),
        ("item_info", pd.DataFrame({"title": ["one"]})),
    ):
        with pytest.raises(ValueError, match=f"{field} must"):
            Ratings(**{**good.__dict__, field: wrong})


class TestInteractions:
    """Files without ratings: clicks, purchases."""

    def test_each_pair_once_at_its_latest_time(self, tmp_path: Path) -> None:
        file = tmp_path / "clicks.csv"
        file.write_text("user,item,timestamp\na,x,5\nb,x,7\na,y,6\na,x,9\na,x,2\n")
        clicks = read_ratings(file, rating=None)
        assert clicks.users.ids[clicks.user].tolist() == ["b", "a", "a"]
        assert clicks.items.ids[clicks.item].tolist() == ["x", "y", "x"]
        assert clicks.rating.tolist() == [1, 1, 1]
        assert clicks.timestamp is not None
        assert clicks.timestamp.tolist() == [7, 6, 9]

    def test_without_times(self) -> None:
        clicks = from_frame(pd.DataFrame({"user": [1, 1, 2, 1], "item": [3, 4, 3, 3]}), rating=None)
        assert (clicks.user.tolist(), clicks.item.tolist()) == ([0, 1, 0], [1, 0, 0])

    def test_a_rating_column_is_not_read(self) -> None:
        frame = pd.DataFrame({"user": [1, 1], "item": [3, 4], "rating": ["good", "bad"]})
        assert from_frame(frame, rating=None).rating.tolist() == [1, 1]
