"""Rating files as people have them: headers, separators, decimals, packings, times and repeated pairs."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lunet_fast.recsys.data.ratings import RatingFileError, Ratings, from_frame, read_ratings
from lunet_fast.recsys.data.streaming import RatingStream

ROWS = [("ann", "x", 4.5), ("bob", "x", 2.0), ("ann", "y", 1.0)]
EXPECTED = {row[:2]: row[2] for row in ROWS}


def found(ratings: Ratings) -> dict[tuple[Any, Any], float]:
    users, items = ratings.users.ids[ratings.user.numpy()], ratings.items.ids[ratings.item.numpy()]
    return dict(zip(zip(users, items, strict=True), ratings.rating.tolist(), strict=True))


def write(folder: Path, name: str, *lines: str) -> Path:
    file = folder / name
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "header",
    [
        "userId,movieId,rating",
        "user_id,item_id,rating",
        "User_ID,Item_ID,Rating",
        "UserID,ItemID,Score",
        "reviewerID,asin,overall",
        "user_id:token,item_id:token,rating:float",
        "User-ID,ISBN,Book-Rating",
        "userID,placeID,rating",
        "customer_id,product_id,star_rating",
        "uid,iid,stars",
        "user id,artist id,play count",
    ],
)
def test_usual_headers_are_recognised_and_said(tmp_path: Path, header: str) -> None:
    file = write(tmp_path, "r.csv", f"n,{header}", *(f"{n},{u},{i},{r}" for n, (u, i, r) in enumerate(ROWS)))
    ratings = read_ratings(file)
    assert found(ratings) == EXPECTED
    names = header.split(",")
    assert all(repr(name) in ratings.notes[0] for name in names if name != "rating")
    assert ratings.reading is not None
    assert [ratings.reading[role] for role in ("user", "item", "rating")] == names
    again = read_ratings(file, **ratings.reading)
    assert found(again) == EXPECTED
    assert again.notes == ()
    frame = pd.DataFrame(ROWS, columns=names)
    assert found(from_frame(frame)) == EXPECTED


def test_a_header_is_not_guessed_twice(tmp_path: Path) -> None:
    file = write(tmp_path, "r.csv", "user_id,userId,item,rating", "1,2,3,4")
    with pytest.raises(RatingFileError, match="'user_id' and 'userId' could both be the user"):
        read_ratings(file)
    assert read_ratings(file, user="userId").users.ids.tolist() == [2]
    plain = write(tmp_path, "p.csv", "movieId,user,item,rating", "9,2,3,4")
    assert read_ratings(plain).items.ids.tolist() == [3]
    with pytest.raises(RatingFileError, match="no column 'userId'"):
        read_ratings(plain, user="userId")


def test_headers_of_a_stream(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"userId": [1, 2, 1], "movieId": [3, 4, 4], "rating": [4.0, 5.0, 3.0]})
    frame.to_parquet(tmp_path / "r.parquet")
    stream = RatingStream.open(tmp_path / "r.parquet", test_share=0)
    assert stream.users.ids.tolist() == [1, 2]
    assert stream.items.ids.tolist() == [3, 4]
    assert found(stream.in_memory()[0]) == dict(zip([(1, 3), (2, 4), (1, 4)], [4.0, 5.0, 3.0], strict=True))


SEPARATED = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|", "colons": "::", "space": "   "}


@pytest.mark.parametrize("name", SEPARATED)
@pytest.mark.parametrize("header", [True, False])
def test_separators_by_name_or_sniffed(tmp_path: Path, name: str, header: bool) -> None:
    sep = SEPARATED[name]
    lines = [sep.join(map(str, row)) for row in ROWS]
    if header:
        lines.insert(0, sep.join(("user", "item", "rating")))
    for extension in ("csv", "txt", "data"):
        file = write(tmp_path, f"{name}.{extension}", *lines)
        for given in (None, name):
            ratings = read_ratings(file, sep=given, header=header)
            assert found(ratings) == EXPECTED
            usual = {"csv": "comma", "txt": "tab"}.get(extension)
            said = [note for note in ratings.notes if "separated by" in note]
            assert bool(said) == (given is None and name != usual)
            again = read_ratings(file, **(ratings.reading or {}))
            assert found(again) == EXPECTED


def test_without_a_header(tmp_path: Path) -> None:
    file = write(tmp_path, "r.csv", "1,7,4,100", "2,8,3,200")
    with pytest.raises(RatingFileError, match="holds numbers.*header=False"):
        read_ratings(file)
    texts = write(tmp_path, "t.csv", "ann,x,4,100", "bob,y,3,200")
    with pytest.raises(RatingFileError, match="holds numbers.*header=False"):
        read_ratings(texts)
    ratings = read_ratings(file, header=False)
    assert (ratings.users.ids.tolist(), ratings.items.ids.tolist()) == ([1, 2], [7, 8])
    assert ratings.timestamp is not None
    assert ratings.timestamp.tolist() == [100, 200]
    turned = read_ratings(file, header=False, item="1", user="2", rating=None)
    assert (turned.users.ids.tolist(), turned.items.ids.tolist()) == ([7, 8], [1, 2])
    with pytest.raises(RatingFileError, match="give its number from 1, here to 4"):
        read_ratings(file, header=False, user="who")
    with pytest.raises(RatingFileError, match="no column 'rating'"):
        read_ratings(write(tmp_path, "two.csv", "1,7", "2,8"), header=False)


def test_decimal_commas_and_booleans(tmp_path: Path) -> None:
    ratings = read_ratings(write(tmp_path, "r.csv", "user;item;rating", "a;x;4,5", "b;x;2", "a;y;-1,25"))
    assert found(ratings) == {("a", "x"): 4.5, ("b", "x"): 2.0, ("a", "y"): -1.25}
    assert any("decimal commas" in note for note in ratings.notes)
    liked = read_ratings(write(tmp_path, "b.csv", "user,item,rating", "a,x,True", "b,x,false"))
    assert found(liked) == {("a", "x"): 1.0, ("b", "x"): 0.0}
    frame = pd.DataFrame({"user": [1, 2], "item": [3, 3], "rating": [True, False]})
    assert from_frame(frame).rating.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("parts", [1, 1000, 1_000_000, 1_000_000_000])
def test_units_of_times(tmp_path: Path, parts: int) -> None:
    seconds = [881250949, 0, 1700000000]
    lines = [f"{n},1,3,{time * parts}" for n, time in enumerate(seconds)]
    ratings = read_ratings(write(tmp_path, "r.csv", "user,item,rating,timestamp", *lines))
    assert ratings.timestamp is not None
    assert ratings.timestamp.tolist() == seconds
    assert any("seconds" in note for note in ratings.notes) == (parts > 1)
    mixed = write(tmp_path, "m.csv", "user,item,rating,timestamp", "1,1,3,881250949000", "2,1,3,2020-01-31")
    times = read_ratings(mixed).timestamp
    assert times is not None
    assert times[0] == 881250949000


def test_json(tmp_path: Path) -> None:
    keys = ("reviewerID", "asin", "overall")
    rows = [dict(zip(keys, row, strict=True)) | {"helpful": [1, 2], "unixReviewTime": 9} for row in ROWS]
    lines = [json.dumps(row) for row in rows]
    for name, content in (
        ("r.jsonl", "\n".join(lines)),
        ("r.json", "\n\n".join(lines) + "\n"),
        ("list.json", json.dumps(rows, indent=1)),
    ):
        (tmp_path / name).write_text(content)
        ratings = read_ratings(tmp_path / name)
        assert found(ratings) == EXPECTED
        assert ratings.timestamp is not None
        assert ratings.timestamp.tolist() == [9, 9, 9]
    with gzip.open(tmp_path / "r.jsonl.gz", "wt") as stream:
        stream.write("\n".join(lines))
    assert found(read_ratings(tmp_path / "r.jsonl.gz")) == EXPECTED


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("7", "line 2: is no JSON object"),
        ('{"user": 1, "item": 2}', "line 2: rating is missing"),
        ('{"user": null, "item": 2, "rating": 3}', "line 2: user id is empty"),
        ('{"user": [1], "item": 2, "rating": 3}', "line 2: user is a list"),
        ('{"user": 1, "item": 2, "rating": NaN}', "line 2: rating 'nan' is not a finite"),
        ("[" * 100_000, "line 2: is not JSON"),
        ('{"user": ' + "1" * 5000 + "}", "line 2: is not JSON"),
    ],
)
def test_json_that_is_none(tmp_path: Path, second: str, message: str) -> None:
    file = write(tmp_path, "r.jsonl", '{"user": 1, "item": 1, "rating": 3}', second)
    with pytest.raises(RatingFileError, match=message):
        read_ratings(file)


def packed(file: Path, **members: str) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name.replace("_dot_", "."), text)
    return file


TEXT = "user;item;rating\nann;x;4.5\nbob;x;2\nann;y;1\n"


def test_a_zip_of_one_table(tmp_path: Path) -> None:
    ratings = read_ratings(packed(tmp_path / "r.zip", README="read me", r_dot_csv=TEXT))
    assert found(ratings) == EXPECTED
    assert "read r.csv in the zip" in ratings.notes[0]
    beside = packed(tmp_path / "w.zip", README_dot_txt="read me", license_dot_txt="free", r_dot_csv=TEXT)
    assert found(read_ratings(beside)) == EXPECTED
    several = packed(tmp_path / "s.zip", ratings_dot_csv=TEXT, movies_dot_csv="a,b\n1,2\n")
    assert found(read_ratings(several)) == EXPECTED
    with pytest.raises(RatingFileError, match=r"one table.* it has 2 \(a.csv, b.csv\)"):
        read_ratings(packed(tmp_path / "t.zip", a_dot_csv=TEXT, b_dot_csv=TEXT))
    with pytest.raises(RatingFileError, match=r"has 0 \(README\)"):
        read_ratings(packed(tmp_path / "u.zip", README="none"))
    (tmp_path / "v.zip").write_bytes(b"PK\x03\x04nothing")
    with pytest.raises(RatingFileError, match="not a zip file"):
        read_ratings(tmp_path / "v.zip")


def test_a_zip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNET_FAST_MAX_BYTES", "100000")
    bomb = packed(tmp_path / "b.zip", r_dot_csv="user,item,rating\n" + "1,1,1\n" * 100_000)
    assert bomb.stat().st_size < 10_000
    with pytest.raises(RatingFileError, match="unpacks to more than 100000 bytes"):
        read_ratings(bomb)


@pytest.mark.parametrize(("how", "expected"), [("latest", 2.0), ("mean", 3.0), ("max", 5.0)])
def test_repeated_pairs(tmp_path: Path, how: str, expected: float) -> None:
    lines = ["b,x,1,5", "a,y,5,10", "a,y,2,30", "a,x,4,1", "a,y,2,20"]
    file = write(tmp_path, "r.csv", "user,item,rating,timestamp", *lines)
    ratings = read_ratings(file, duplicates=how)
    assert found(ratings) == {("b", "x"): 1.0, ("a", "y"): expected, ("a", "x"): 4.0}
    assert ratings.timestamp is not None
    assert ratings.timestamp.tolist() == [5, 30, 1]
    assert any(f"2 repeated pairs: the {how}" in note for note in ratings.notes)
    with pytest.raises(RatingFileError, match="has rated item y already"):
        read_ratings(file)
    with pytest.raises(ValueError, match="duplicates='first' is unknown"):
        read_ratings(file, duplicates="first")


def test_means_of_repeated_pairs_are_those_of_pandas() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.integers(0, 9, (300, 2)), columns=["user", "item"])
    frame["rating"] = rng.normal(size=300)
    for how in ("mean", "max"):
        options: dict[str, Any] = {"duplicates": how}
        of_pairs = found(from_frame(frame, **options))
        expected = frame.groupby(["user", "item"])["rating"].agg(how).to_dict()
        assert of_pairs == pytest.approx(expected, abs=1e-6)
