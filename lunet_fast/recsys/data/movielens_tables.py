"""The contents of the files of MovieLens: ratings, and tables of movies and users that are indexed by id."""

from __future__ import annotations

import pandas as pd

from lunet_fast.recsys.data.datasets import SCALE, DataSet
from lunet_fast.recsys.data.ratings import Ratings, parse_text

# fmt: off
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on


def parse(spec: DataSet, data: bytes, source: str) -> Ratings:
    """The ratings of ``u.data`` or ``ratings.dat``."""
    return parse_text(source, data, spec.sep, name=spec.name, scale=SCALE)


def wheel_ratings(spec: DataSet, data: bytes, source: str) -> Ratings:
    """The ratings in the wheel, those of ``u.data`` row for row."""
    header, _, rows = data.partition(b"\n")
    assert header.split(b"\t") == [b"user_id:token", b"item_id:token", b"rating:float", b"timestamp:float"]
    return parse_text(source, rows, "\t", name=spec.name, scale=SCALE)


def movies_of(spec: DataSet, data: bytes | None) -> pd.DataFrame | None:
    """Titles and genres of ``u.item`` or ``movies.dat``; None without the file."""
    if data is None:
        return None
    if "u.item" in spec.files:
        rows = [
            (
                int(f[0]),
                f[1].strip(),
                "|".join(g for g, flag in zip(GENRES_100K, f[5:], strict=True) if flag == "1"),
            )
            for f in _fields(data, "|", "latin-1")
        ]
    else:
        rows = [
            (int(number), title.strip(), genres) for number, title, genres in _fields(data, "::", "latin-1")
        ]
    return pd.DataFrame(rows, columns=["id", "title", "genres"]).set_index("id")


def people_of(spec: DataSet, data: bytes | None) -> pd.DataFrame | None:
    """What is known of the users, from ``u.user`` or ``users.dat``; None without the file."""
    if data is None:
        return None
    if "u.user" in spec.files:
        return _people_table(_fields(data, "|", "latin-1"))
    rows = [
        [number, age, gender, job, code] for number, gender, age, job, code in _fields(data, "::", "latin-1")
    ]
    return _people_table(rows).astype({"occupation": "int64"})


def wheel_movies(data: bytes) -> pd.DataFrame:
    """Titles with the year and genres separated by "|", as in u.item."""
    rows = []
    for number, title, year, genres in _fields(data, "\t", "utf-8")[1:]:
        # One film has no title; the wheel misspells "unknown" and repeats it as the year.
        full = "unknown" if title == "unkonwn" else f"{title} ({year})"
        rows.append((int(number), full, genres.replace(" ", "|")))
    return pd.DataFrame(rows, columns=["id", "title", "genres"]).set_index("id")


def wheel_people(data: bytes) -> pd.DataFrame:
    """What is known of the users, as in u.user."""
    return _people_table(_fields(data, "\t", "utf-8")[1:])


def _people_table(rows: list[list[str]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["id", "age", "gender", "occupation", "zip"])
    return table.astype({"id": "int64", "age": "int64"}).set_index("id")


def _fields(data: bytes, sep: str, encoding: str) -> list[list[str]]:
    return [line.split(sep) for line in data.decode(encoding).replace("\r\n", "\n").split("\n") if line]
