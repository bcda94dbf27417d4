"""What is published of the MovieLens data sets: their files, their checksums, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SCALE = (1.0, 5.0)


@dataclass(frozen=True)
class Counts:
    """What a ratings file that is not byte for byte the known one must still amount to."""

    users: int
    items: int
    histogram: Mapping[float, int]


@dataclass(frozen=True)
class Wheel:
    """A wheel on the Python package index that holds a copy of a data set."""

    requirement: str
    file: str
    sha256: str
    folder: str
    members: Mapping[str, str]  # name -> SHA-256


@dataclass(frozen=True)
class DataSet:
    """What is published about a data set: its files, their checksums, and where they are."""

    name: str
    sep: str
    files: tuple[str, str, str]
    """Of ratings, of movies and of people."""
    sha256: Mapping[str, str]
    counts: Counts | None
    md5: str
    """Of the zip."""
    wheel: Wheel | None = None

    @property
    def title(self) -> str:
        """The name as the literature writes it."""
        return self.name.upper()

    @property
    def zip(self) -> str:
        return f"{self.name}.zip"

    @property
    def url(self) -> str:
        return f"https://files.grouplens.org/datasets/movielens/{self.zip}"

    @property
    def ratings(self) -> str:
        return self.files[0]


DATASETS: dict[str, DataSet] = {
    "ml-100k": DataSet(
        name="ml-100k",
        sep="\t",
        files=("u.data", "u.item", "u.user"),
        sha256={
            "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
            "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
            "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
        },
        counts=None,
        md5="0e33842e24a9c977be4e0107933c0723",
        wheel=Wheel(
            requirement="recbole==1.2.1",
            file="recbole-1.2.1-py3-none-any.whl",
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            folder="recbole/dataset_example/ml-100k",
            members={
                "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
            },
        ),
    ),
    "ml-1m": DataSet(
        name="ml-1m",
        sep="::",
        files=("ratings.dat", "movies.dat", "users.dat"),
        sha256={
            # A re-packed copy in circulation, with some timestamps set to 0; the original passes by its
            # counts.
            "ratings.dat": "7362743e57c16f514c1835f1fa3ebcc41d099374e0cfed5f46eac6aa44724a7e",
            "movies.dat": "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9",
            "users.dat": "1dc3a95300cb19f7c10e027daf29b8cdf1d908dab65b5edfb45950aa389a10a3",
        },
        counts=Counts(6040, 3706, {1.0: 56174, 2.0: 107557, 3.0: 261197, 4.0: 348971, 5.0: 226310}),
        md5="c4d9eecfca2ab87c1945afe126590906",
    ),
}


def dataset_title(name: str) -> str:
    """A data set's name as the literature writes it; of one's own data, as it is."""
    return DATASETS[name].title if name in DATASETS else name
