"""Where the MovieLens files come from, in which order, and what is refused.

A made-up data set of the same form stands in for the real ones, whose rows must not be in this repository.
Tests of the real files run where $LUNET_FAST_DATA names a folder that holds them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from lunet_fast.recsys.data import archives, datasets, fetching, movielens
from lunet_fast.recsys.data import zipped as zip_files
from lunet_fast.recsys.data.errors import Unavailable
from lunet_fast.recsys.data.movielens import DataNotFoundError, load, locate, read_like
from lunet_fast.recsys.data.ratings import RatingFileError, Ratings
from lunet_fast.recsys.data.splits import join
from lunet_fast.training import places

ROOT = Path(__file__).parents[3]
REAL_DATA = os.environ.get("LUNET_FAST_DATA", "")
needs_data = pytest.mark.skipif(
    not REAL_DATA, reason="$LUNET_FAST_DATA does not name a folder with MovieLens files"
)

U_DATA = b"3\t20\t5\t881250949\n1\t10\t1\t881250950\n3\t10\t2\t881250951\n"
U_ITEM = (
    "10|Caf\xe9 (1990) |01-Jan-1990||http://x|0|1|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "20|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "30|Never Rated (1991)|01-Jan-1991||http://x|0|0|0|0|0|0|0|0|0|0|1|0|0|0|0|1|0|0|0\n"
).encode("latin-1")
U_USER = b"1|24|M|technician|85711\n2|53|F|other|94043\n3|7|F|student|T8H1N\n"
FILES = {"u.data": U_DATA, "u.item": U_ITEM, "u.user": U_USER}

INTER = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + U_DATA
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "10\tCaf\xe9\t1990\tAction Comedy\n20\tunkonwn\tunkonwn\tunknown\n"
    "30\tNever Rated\t1991\tFilm-Noir Sci-Fi\n"
).encode()
USER = b"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n" + U_USER.replace(
    b"|", b"\t"
)

RATINGS_DAT = b"2::11::4::978300760\n1::11::3::0\n1::12::5::978300761\n"
MOVIES_DAT = "11::Mis\xe9rables, Les (1995)::Drama|Musical\n12::B: The Film (1996)::Sci-Fi\n".encode(
    "latin-1"
)
USERS_DAT = b"1::F::1::10::48067\n2::M::56::16::70072\n"
FILES_1M = {"ratings.dat": RATINGS_DAT, "movies.dat": MOVIES_DAT, "users.dat": USERS_DAT}


def zipped(
    files: dict[str, bytes], folder: str = "ml-100k/", compression: int = zipfile.ZIP_DEFLATED
) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(folder + name), data, compress_type=compression)
    return stream.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


ZIP = zipped(FILES)
WHEEL = zipped(
    {"ml-100k.inter": INTER, "ml-100k.item": ITEM, "ml-100k.user": USER}, "recbole/dataset_example/ml-100k/"
)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Checksums of the made-up files, an empty cache, and a network that fails; returns the cache folder."""
    spec, spec_1m = movielens.DATASETS["ml-100k"], movielens.DATASETS["ml-1m"]
    assert spec.wheel is not None
    members = {"ml-100k.inter": sha256(INTER), "ml-100k.item": sha256(ITEM), "ml-100k.user": sha256(USER)}
    monkeypatch.setitem(
        movielens.DATASETS,
        "ml-100k",
        dataclasses.replace(
            spec,
            sha256={name: sha256(data) for name, data in FILES.items()},
            md5=hashlib.md5(ZIP).hexdigest(),
            wheel=dataclasses.replace(spec.wheel, sha256=sha256(WHEEL), members=members),
        ),
    )
    monkeypatch.setitem(
        movielens.DATASETS,
        "ml-1m",
        dataclasses.replace(
            spec_1m,
            sha256={name: sha256(data) for name, data in FILES_1M.items()},
            counts=datasets.Counts(2, 2, {3.0: 1, 4.0: 1, 5.0: 1}),
        ),
    )
    monkeypatch.delenv("LUNET_FAST_DATA", raising=False)
    monkeypatch.setenv("LUNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "download", refuse("the network is down"))
    monkeypatch.setattr(fetching, "pip_download", refuse("pip is down"))
    return tmp_path / "cache"


def refuse(reason: str) -> Callable[..., bytes]:
    def fetch(*_: object) -> bytes:
        raise Unavailable(reason)

    return fetch


def put(file: Path, data: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def assert_the_made_up(ratings: Ratings) -> None:
    assert ratings.users.ids.tolist() == [1, 3]
    assert ratings.items.ids.tolist() == [10, 20]
    assert ratings.user.tolist() == [1, 0, 1]
    assert ratings.item.tolist() == [1, 0, 0]
    assert ratings.rating.tolist() == [5, 1, 2]
    assert ratings.timestamp is not None
    assert ratings.timestamp.tolist() == [881250949, 881250950, 881250951]
    assert ratings.scale == (1.0, 5.0)
    assert ratings.name == "ml-100k"
    assert ratings.item_info is not None
    assert ratings.item_info.to_dict("list") == {
        "title": ["Café (1990)", "unknown"],
        "genres": ["Action|Comedy", "unknown"],
    }
    assert ratings.user_info is not None
    assert ratings.user_info.to_dict("list") == {
        "age": [24, 7],
        "gender": ["M", "F"],
        "occupation": ["technician", "student"],
        "zip": ["85711", "T8H1N"],
    }


# ------------------------------------------------------------------------------------------------------------
# Sources


@pytest.mark.parametrize(
    "layout",
    ["ml-100k/ml-100k.zip", "ml-100k.zip", "ml-100k/u.data", "ml-100k/ml-100k/u.data", "u.data"],
)
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_layouts_of_a_data_folder(
    made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, by: str
) -> None:
    place = tmp_path / "data" / layout
    if layout.endswith(".zip"):
        put(place, ZIP)
    else:
        for name, data in FILES.items():
            put(place.with_name(name), data)
    monkeypatch.setenv("LUNET_FAST_DATA", str(tmp_path / "data") if by == "variable" else "/nowhere")
    ratings = load("ml-100k", tmp_path / "data" if by == "argument" else None)
    assert_the_made_up(ratings)
    assert ratings.source == str(place)
    assert not made_up.exists()


def test_the_wheel_gives_the_same_ratings(made_up: Path) -> None:
    file = put(made_up / "recbole-1.2.1-py3-none-any.whl", WHEEL)
    ratings = load("ml-100k")
    assert_the_made_up(ratings)
    assert ratings.source == str(file)


def test_ml_1m(made_up: Path, tmp_path: Path) -> None:
    put(tmp_path / "ml-1m" / "ml-1m.zip", zipped(FILES_1M, "ml-1m/"))
    ratings = load("ml-1m", tmp_path)
    assert ratings.user.tolist() == [1, 0, 0]
    assert ratings.item.tolist() == [0, 0, 1]
    assert ratings.rating.tolist() == [4, 3, 5]
    assert ratings.timestamp is not None
    assert ratings.timestamp.tolist() == [978300760, 0, 978300761]
    assert ratings.item_info is not None
    assert ratings.item_info.to_dict("list") == {
        "title": ["Misérables, Les (1995)", "B: The Film (1996)"],
        "genres": ["Drama|Musical", "Sci-Fi"],
    }
    assert ratings.user_info is not None
    assert ratings.user_info.to_dict("list") == {
        "age": [1, 56],
        "gender": ["F", "M"],
        "occupation": [10, 16],
        "zip": ["48067", "70072"],
    }


def test_the_order_of_sources(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def network(name: str, data: bytes) -> Callable[..., bytes]:
        def fetch(*_: object) -> bytes:
            fetched.append(name)
            return data

        return fetch

    # From the last source to the first: each one, once there, is preferred to those after it.
    monkeypatch.setattr(fetching, "pip_download", network("wheel", WHEEL))
    assert locate("ml-100k").source == "the wheel recbole==1.2.1 by pip"
    cached = made_up / "recbole-1.2.1-py3-none-any.whl"
    assert cached.read_bytes() == WHEEL
    assert locate("ml-100k").source == str(cached)
    assert fetched == ["wheel"]

    cached.unlink()
    monkeypatch.setattr(fetching, "download", network("zip", ZIP))
    assert locate("ml-100k").source == "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
    assert fetched == ["wheel", "zip"]
    put(cached, WHEEL)
    assert locate("ml-100k").source == str(made_up / "ml-100k.zip")

    variable = put(tmp_path / "variable" / "ml-100k.zip", ZIP)
    monkeypatch.setenv("LUNET_FAST_DATA", str(variable.parent))
    assert locate("ml-100k").source == str(variable)
    put(variable.parent / "ml-100k" / "ml-100k.zip", ZIP)
    assert locate("ml-100k").source == str(variable.parent / "ml-100k" / "ml-100k.zip")

    argument = put(tmp_path / "argument" / "ml-100k.zip", ZIP)
    assert locate("ml-100k", argument.parent).source == str(argument)
    assert fetched == ["wheel", "zip"]


def test_the_source_is_logged(made_up: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = put(tmp_path / "ml-100k.zip", ZIP)
    with caplog.at_level(logging.INFO, logger="lunet_fast"):
        load("ml-100k", tmp_path)
    assert f"ml-100k read from {file}" in caplog.text


def test_a_given_folder_without_the_data_is_an_error_at_once(made_up: Path, tmp_path: Path) -> None:
    put(made_up / "ml-100k.zip", ZIP)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        DataNotFoundError, match=r"given data folder:\n.*holds neither ml-100k/ml-100k.zip.*\nPut ml-100k.zip"
    ):
        load("ml-100k", empty)
    with pytest.raises(DataNotFoundError, match="is not a folder"):
        load("ml-100k", tmp_path / "absent")


def test_a_variable_without_the_data_falls_through(
    made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUNET_FAST_DATA", str(tmp_path / "absent"))
    file = put(made_up / "ml-100k.zip", ZIP)
    assert load("ml-100k").source == str(file)


def test_the_failure_of_all_sources_lists_them(
    made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUNET_FAST_DATA", str(tmp_path))
    put(tmp_path / "ml-100k.zip", ZIP[:-30])
    put(made_up / "ml-100k.zip", b"half")
    with pytest.raises(DataNotFoundError) as caught:
        load("ml-100k")
    told = str(caught.value)
    for part in (
        f"$LUNET_FAST_DATA: {tmp_path / 'ml-100k.zip'}: not a zip file, or cut short",
        f"cache: {made_up / 'ml-100k.zip'}: not a zip file",
        f"cache: there is no {made_up / 'recbole-1.2.1-py3-none-any.whl'}",
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip: the network is down",
        "the wheel recbole==1.2.1 by pip: pip is down",
        f"put it, as it is, at {made_up / 'ml-100k.zip'}",
    ):
        assert part in told
    monkeypatch.delenv("LUNET_FAST_DATA")
    with pytest.raises(DataNotFoundError, match="neither data_dir=FOLDER nor") as caught:
        load("ml-1m")
    assert "recbole" not in str(caught.value), "the wheel holds ML-100K only"


def test_the_name_is_checked() -> None:
    with pytest.raises(ValueError, match="dataset must be one of ml-100k, ml-1m, got 'ml-10m'"):
        load("ml-10m")
    with pytest.raises(ValueError, match="dataset must be one of"):
        read_like("", "x")


def test_without_pooch(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(Unavailable, match=r"pooch is not installed: pip install 'lunet-fast\[train\]'"):
        fetching.download("https://localhost/x.zip", "0" * 32)
    monkeypatch.delenv("LUNET_FAST_CACHE", raising=False)
    assert places.cache_folder().name == "lunet-fast"


def test_an_unreachable_server_is_a_reason() -> None:
    pytest.importorskip("pooch")
    with pytest.raises(Unavailable, match="ConnectionError: .*localhost"):
        fetching.download("https://localhost:9/x.zip", "0" * 32)


def test_the_download_is_checked_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through pooch itself, with the HTTP part replaced by a local file."""
    pooch = pytest.importorskip("pooch")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    timeouts = []

    class Local:
        def __init__(self, timeout: tuple[int, int]) -> None:
            timeouts.append(timeout)

        def __call__(self, url: str, output_file: str, _: object) -> None:
            Path(output_file).write_bytes(ZIP)

    monkeypatch.setattr(pooch, "HTTPDownloader", Local)
    assert fetching.download("https://localhost/x.zip", hashlib.md5(ZIP).hexdigest()) == ZIP
    with pytest.raises(Unavailable, match="ValueError: MD5 hash of downloaded file"):
        fetching.download("https://localhost/x.zip", "0" * 32)
    assert timeouts == [(10, 30)] * 2
    assert list(tmp_path.iterdir()) == []


def test_pip_is_asked_for_the_pinned_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = movielens.DATASETS["ml-100k"].wheel
    assert wheel is not None
    seen: dict[str, object] = {}

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        seen.update(options, command=command, wanted=Path(command[-1]).read_text())
        Path(command[command.index("--dest") + 1], wheel.file).write_bytes(WHEEL)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("PIP_DEFAULT_TIMEOUT", raising=False)
    assert fetching.pip_download(wheel) == WHEEL
    command = seen["command"]
    assert isinstance(command, list)
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
    assert not any("trusted" in option for option in command)
    assert seen["wanted"] == f"recbole==1.2.1 --hash=sha256:{wheel.sha256}\n"
    environment = seen["env"]
    assert isinstance(environment, dict)
    assert environment["PIP_DEFAULT_TIMEOUT"] == "15"
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "99")
    fetching.pip_download(wheel)
    environment = seen["env"]
    assert isinstance(environment, dict)
    assert environment["PIP_DEFAULT_TIMEOUT"] == "99"

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: x\nERROR: No matching distribution\nhint"
        )

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(Unavailable, match="pip download failed: ERROR: No matching distribution$"):
        fetching.pip_download(wheel)

    def hang(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(Unavailable, match="did not end within"):
        fetching.pip_download(wheel)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    monkeypatch.undo()


# ------------------------------------------------------------------------------------------------------------
# Checksums and archives


def test_repacked_zips_are_accepted_by_the_files_inside(made_up: Path, tmp_path: Path) -> None:
    for folder in ("ml-100k/", "", "copies/of/ml-100k/", "ml-100k\\"):
        for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            put(tmp_path / "ml-100k.zip", zipped({"README": b"x", **FILES}, folder, compression))
            assert_the_made_up(load("ml-100k", tmp_path))


def test_other_contents_are_refused(made_up: Path, tmp_path: Path) -> None:
    for name in FILES:
        put(tmp_path / "ml-100k.zip", zipped({**FILES, name: FILES[name] + b"\n"}))
        with pytest.raises(DataNotFoundError, match=f"{name} is not GroupLens' file: its SHA-256"):
            load("ml-100k", tmp_path)
    put(tmp_path / "ml-100k.zip", zipped({"u.item": U_ITEM}))
    with pytest.raises(DataNotFoundError, match="the zip has no u.data"):
        load("ml-100k", tmp_path)


def test_ratings_of_ml_1m_are_accepted_by_their_counts(made_up: Path, tmp_path: Path) -> None:
    other_times = RATINGS_DAT.replace(b"978300760", b"978300000").replace(b"::0\n", b"::978301111\n")
    put(tmp_path / "ml-1m.zip", zipped({**FILES_1M, "ratings.dat": other_times}, "ml-1m/"))
    timestamp = load("ml-1m", tmp_path).timestamp
    assert timestamp is not None
    assert timestamp.tolist() == [978300000, 978301111, 978300761]
    for wrong, message in (
        (RATINGS_DAT.replace(b"::5::", b"::4::"), "is not GroupLens' file: it has Counts"),
        (RATINGS_DAT + b"3::11::3::1\n", "is not GroupLens' file: it has Counts"),
        (RATINGS_DAT.replace(b"::5::", b"::6::"), "line 3: rating '6' is outside the scale 1 to 5"),
        (RATINGS_DAT[:30], "ratings.dat"),
        (b"", "the file is empty"),
    ):
        put(tmp_path / "ml-1m.zip", zipped({**FILES_1M, "ratings.dat": wrong}, "ml-1m/"))
        with pytest.raises(DataNotFoundError, match=message):
            load("ml-1m", tmp_path)


def test_a_bad_zip_does_not_hide_a_good_folder(made_up: Path, tmp_path: Path) -> None:
    put(tmp_path / "ml-100k.zip", ZIP[:100])
    for name, data in FILES.items():
        put(tmp_path / name, data)
    assert load("ml-100k", tmp_path).source == str(tmp_path / "u.data")


def test_missing_titles_are_none_and_logged(
    made_up: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "u.data", U_DATA)
    ratings = load("ml-100k", tmp_path)
    assert ratings.item_info is None
    assert ratings.user_info is None
    assert "u.item is not with it" in caplog.text


@pytest.mark.parametrize("cut", [1, 20, 60, len(ZIP) // 2, len(ZIP) - 1, len(ZIP)])
def test_truncated_zips(made_up: Path, tmp_path: Path, cut: int) -> None:
    put(tmp_path / "ml-100k.zip", ZIP[:-cut])
    with pytest.raises(DataNotFoundError, match=r"not a zip file, or cut short"):
        load("ml-100k", tmp_path)


def test_every_damaged_byte_is_noticed(made_up: Path) -> None:
    """A zip with one byte changed gives the true files or a reason, never other data and no other error."""
    spec = movielens.DATASETS["ml-100k"]
    reasons = 0
    for at in range(len(ZIP)):
        damaged = ZIP[:at] + bytes([ZIP[at] ^ 0x41]) + ZIP[at + 1 :]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of zipfile, on a name that now occurs twice
                files = archives.read_zip(spec, damaged)
        except Unavailable:
            reasons += 1
        else:
            assert files["u.data"] == U_DATA
            assert all(FILES[name] == data for name, data in files.items())
    assert reasons > len(ZIP) // 2


def test_zip_bombs_are_refused(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 1 << 16)
    honest = zipped({**FILES, "u.data": bytes(1 << 20)})
    put(tmp_path / "ml-100k.zip", honest)
    with pytest.raises(
        DataNotFoundError, match="u.data in the zip unpacks to more than 65536 bytes: refused"
    ):
        load("ml-100k", tmp_path)
    # The directory may state any size: what is read counts.
    lying = honest.replace((1 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    assert lying != honest
    put(tmp_path / "ml-100k.zip", lying)
    with pytest.raises(DataNotFoundError, match="u.data"):
        load("ml-100k", tmp_path)
    monkeypatch.setattr(archives, "MAX_ARCHIVE_BYTES", 100)
    with pytest.raises(DataNotFoundError, match="more than 100 bytes"):
        load("ml-100k", tmp_path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_packing_methods_are_refused(made_up: Path, tmp_path: Path, compression: int) -> None:
    put(tmp_path / "ml-100k.zip", zipped(FILES, compression=compression))
    with pytest.raises(DataNotFoundError, match="another method than deflate: refused"):
        load("ml-100k", tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "ml-100k/../../x", "/etc/x", "..\\x", "\\x", "C:\\x", "C:/x", "a/..", "..", "../u.data"]
)
def test_names_that_lead_out_are_refused(made_up: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "one" / "two"
    put(folder / "ml-100k.zip", zipped({**FILES, name: b"x"}, ""))
    with pytest.raises(DataNotFoundError, match="in the zip leads out of its folder: refused"):
        load("ml-100k", folder)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["ml-100k.zip"]


def test_links_are_refused(made_up: Path, tmp_path: Path) -> None:
    stream = io.BytesIO(ZIP)
    with zipfile.ZipFile(stream, "a") as archive:
        link = zipfile.ZipInfo("ml-100k/link\x1b")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    put(tmp_path / "ml-100k.zip", stream.getvalue())
    with pytest.raises(DataNotFoundError, match=r"ml-100k/link\\x1b in the zip is a link: refused"):
        load("ml-100k", tmp_path)


def test_a_member_of_another_size_than_stated_is_refused(made_up: Path, tmp_path: Path) -> None:
    """Larger than stated is noticed by the checksum of the zip, smaller would not be."""
    for stated, message in ((len(U_DATA) + 9, "states 60 bytes and has 51: refused"), (9, "is damaged")):
        lying = ZIP.replace(len(U_DATA).to_bytes(4, "little"), stated.to_bytes(4, "little"))
        assert lying != ZIP
        put(tmp_path / "ml-100k.zip", lying)
        with pytest.raises(DataNotFoundError, match=f"u.data in the zip {message}"):
            load("ml-100k", tmp_path)


def test_a_zip_of_many_names_is_refused_before_they_are_read(
    made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "ml-100k.zip", zipped({**FILES, **{f"{n}": b"" for n in range(8)}}))
    assert_the_made_up(load("ml-100k", tmp_path))
    monkeypatch.setattr(zip_files, "MAX_MEMBERS", 10)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(DataNotFoundError, match="more than 10 members: refused"):
        load("ml-100k", tmp_path)


# ------------------------------------------------------------------------------------------------------------
# The cache


def test_a_bad_file_in_the_cache_is_removed(
    made_up: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cached = put(made_up / "ml-100k.zip", ZIP[: len(ZIP) // 2])
    with pytest.raises(DataNotFoundError, match="it has been removed"):
        load("ml-100k")
    assert not cached.exists()
    put(cached, ZIP[: len(ZIP) // 2])
    monkeypatch.setattr(fetching, "download", lambda *_: ZIP)
    assert_the_made_up(load("ml-100k"))
    assert cached.read_bytes() == ZIP
    bad_wheel = put(made_up / "recbole-1.2.1-py3-none-any.whl", WHEEL + b" ")
    cached.unlink()
    monkeypatch.setattr(fetching, "download", refuse("down"))
    with pytest.raises(DataNotFoundError, match="has the SHA-256"):
        load("ml-100k")
    assert not bad_wheel.exists()


def test_a_bad_download_is_not_cached(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "download", lambda *_: zipped({**FILES, "u.data": U_DATA[:-1]}))
    monkeypatch.setattr(fetching, "pip_download", lambda *_: WHEEL[:-1])
    with pytest.raises(DataNotFoundError, match=r"(?s)u.data is not GroupLens' file.*has the SHA-256"):
        load("ml-100k")
    assert not made_up.exists() or list(made_up.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_no_file(
    made_up: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching, "download", lambda *_: ZIP)
    monkeypatch.setattr(os, step, full)
    assert_the_made_up(load("ml-100k"))
    assert list(made_up.iterdir()) == []
    assert "cannot be kept in the cache" in caplog.text


def test_a_cache_that_cannot_be_made(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(made_up, b"a file where the folder should be")
    monkeypatch.setattr(fetching, "download", lambda *_: ZIP)
    assert_the_made_up(load("ml-100k"))


FETCHER = """
import dataclasses, hashlib, logging, os, sys, time
from pathlib import Path
from lunet_fast.recsys.data import fetching, movielens

folder, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
data = (folder / "source.zip").read_bytes()
movielens.DATASETS["ml-100k"] = dataclasses.replace(
    movielens.DATASETS["ml-100k"],
    sha256=dict(zip(sys.argv[4::2], sys.argv[5::2])),
    md5=hashlib.md5(data).hexdigest(),
    wheel=None,
)
true_fsync = os.fsync
fetched, problems = [], []

def download(*_):
    fetched.append(1)
    return data

def slow_fsync(handle):
    time.sleep(0.005)  # the file lies there, not yet whole as far as the disk knows
    true_fsync(handle)

class Collect(logging.Handler):
    def emit(self, record):
        problems.append(record.getMessage())

fetching.download, os.fsync = download, slow_fsync
logging.getLogger("lunet_fast").addHandler(Collect(logging.WARNING))
(folder / me).touch()
limit = time.monotonic() + 60
while not (folder / other).exists() and time.monotonic() < limit:
    time.sleep(0.001)
for turn in range(40):
    assert movielens.locate("ml-100k").files.keys() == {"u.data", "u.item", "u.user"}
    (folder / "cache" / "ml-100k.zip").unlink(missing_ok=True)
movielens.locate("ml-100k")
print(len(fetched), problems)
"""


def test_two_processes_fetch_at_once(tmp_path: Path) -> None:
    """Both fetch slowly into one cache and remove it again; neither may ever see half a file."""
    put(tmp_path / "source.zip", ZIP)
    environment = {**os.environ, "LUNET_FAST_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("LUNET_FAST_DATA", None)
    checksums = [text for name, data in FILES.items() for text in (name, sha256(data))]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FETCHER, str(tmp_path), me, other, *checksums],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me, other in (("a", "b"), ("b", "a"))
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for text in said:
        fetched, problems = text.split(maxsplit=1)
        assert problems.strip() == "[]"
        assert int(fetched) >= 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["ml-100k.zip"]
    assert (tmp_path / "cache" / "ml-100k.zip").read_bytes() == ZIP


# ------------------------------------------------------------------------------------------------------------
# Files in the layout of a data set


def test_read_like(tmp_path: Path) -> None:
    file = put(tmp_path / "u1.base", U_DATA)
    ratings = read_like("ml-100k", file)
    assert ratings.user.tolist() == [1, 0, 1]
    assert ratings.scale == (1.0, 5.0)
    assert (ratings.name, ratings.source) == ("u1.base", str(file))
    other = put(tmp_path / "u1.test", b"1\t20\t3\t1\n")
    test = read_like("ml-100k", other, users=ratings.users, items=ratings.items)
    assert (test.user.tolist(), test.item.tolist()) == ([0], [1])
    assert read_like("ml-1m", put(tmp_path / "r", RATINGS_DAT)).rating.tolist() == [4, 3, 5]


def test_read_like_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "u1.base", U_DATA)
    monkeypatch.setenv("LUNET_FAST_MAX_BYTES", str(len(U_DATA)))
    assert len(read_like("ml-100k", file)) == 3
    monkeypatch.setenv("LUNET_FAST_MAX_BYTES", str(len(U_DATA) - 1))
    with pytest.raises(RatingFileError, match=f"{file}: has 51 bytes, more than the 50"):
        read_like("ml-100k", file)


@pytest.mark.parametrize(
    ("dataset", "data", "message"),
    [
        ("ml-100k", RATINGS_DAT, r"line 1: the number of fields is 1, expected 4, separated by '\\t'"),
        ("ml-1m", U_DATA, "line 1: the number of fields is 1, expected 4, separated by ::"),
        (
            "ml-100k",
            b"user\titem\trating\ttimestamp\n1\t2\t3\t4\n",
            "line 1: rating 'rating' is not a number",
        ),
        ("ml-100k", U_DATA + b"1\t2\t0\t4\n", "line 4: rating '0' is outside the scale 1 to 5"),
        ("ml-100k", U_DATA + b"3\t20\t4\t4\n", "line 4: user 3 has rated item 20 already in line 1"),
        ("ml-100k", b"", "the file is empty"),
    ],
)
def test_read_like_refuses(tmp_path: Path, dataset: str, data: bytes, message: str) -> None:
    file = put(tmp_path / "mine", data)
    with pytest.raises(RatingFileError, match=f"{file}.*{message}"):
        read_like(dataset, file)


# ------------------------------------------------------------------------------------------------------------
# The real files: table 1 of the paper (which prints the largest item id of ML-1M, 3952, as its number of
# items)


@needs_data
def test_known_counts_of_ml_100k() -> None:
    ratings = load("ml-100k", REAL_DATA)
    told = ratings.describe()
    assert (told["users"], told["items"], told["ratings"]) == (943, 1682, 100_000)
    assert round(told["density"], 4) == 0.0630
    assert told["histogram"] == {1.0: 6110, 2.0: 11370, 3.0: 27145, 4.0: 34174, 5.0: 21201}
    assert (told["first_timestamp"], told["last_timestamp"], told["unknown_timestamps"]) == (
        874724710,
        893286638,
        0,
    )
    assert ratings.users.ids.tolist() == list(range(1, 944))
    assert ratings.items.ids.tolist() == list(range(1, 1683))
    assert int(torch.bincount(ratings.user).min()) == 20
    assert int((torch.bincount(ratings.item) == 1).sum()) == 141
    assert ratings.item_info is not None
    assert ratings.item_info.iloc[0].tolist() == ["Toy Story (1995)", "Animation|Children's|Comedy"]
    assert not ratings.item_info.isna().any(axis=None)
    assert ratings.user_info is not None
    assert not ratings.user_info.isna().any(axis=None)


@needs_data
def test_known_counts_of_ml_1m() -> None:
    ratings = load("ml-1m", REAL_DATA)
    told = ratings.describe()
    assert (told["users"], told["items"], told["ratings"]) == (6040, 3706, 1_000_209)
    assert round(told["density"], 4) == 0.0447
    assert told["histogram"] == {1.0: 56174, 2.0: 107557, 3.0: 261197, 4.0: 348971, 5.0: 226310}
    assert int(ratings.items.ids.max()) == 3952
    assert int(torch.bincount(ratings.item, minlength=3706).min()) == 1
    assert ratings.item_info is not None
    assert not ratings.item_info.isna().any(axis=None)
    place = int(ratings.items.index(73)[0])
    assert ratings.item_info["title"][place] == "Misérables, Les (1995)"


@needs_data
def test_the_u1_fold(tmp_path: Path) -> None:
    folder = Path(REAL_DATA)
    archive = next((f for f in (folder / "ml-100k/ml-100k.zip", folder / "ml-100k.zip") if f.is_file()), None)
    if archive is None:
        pytest.skip("no ml-100k.zip, which holds the folds")
    with zipfile.ZipFile(archive) as stream:
        parts = [
            read_like("ml-100k", put(tmp_path / n, stream.read(f"ml-100k/{n}")))
            for n in ("u1.base", "u1.test")
        ]
    assert [len(part) for part in parts] == [80_000, 20_000]
    train, test = join(*parts)
    assert (train.n_users, train.n_items) == (943, 1682)
    full = load("ml-100k", REAL_DATA)
    cells = [
        set(zip(r.user.tolist(), r.item.tolist(), r.rating.tolist(), strict=True))
        for r in (train, test, full)
    ]
    assert cells[0] | cells[1] == cells[2]


@pytest.mark.network
def test_the_real_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUNET_FAST_DATA", raising=False)
    monkeypatch.setenv("LUNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(fetching, "download", refuse("left out"))
    ratings = load("ml-100k")
    assert ratings.source == "the wheel recbole==1.2.1 by pip"
    assert load("ml-100k").source == str(tmp_path / "recbole-1.2.1-py3-none-any.whl")
    assert ratings.describe()["histogram"] == {1.0: 6110, 2.0: 11370, 3.0: 27145, 4.0: 34174, 5.0: 21201}
    if REAL_DATA:
        original = load("ml-100k", REAL_DATA)
        for field in ("user", "item", "rating", "timestamp"):
            assert torch.equal(getattr(ratings, field), getattr(original, field))
        assert (ratings.users, ratings.items) == (original.users, original.items)
        assert ratings.item_info is not None
        assert original.item_info is not None
        pd.testing.assert_frame_equal(ratings.item_info, original.item_info)
        assert ratings.user_info is not None
        assert original.user_info is not None
        pd.testing.assert_frame_equal(ratings.user_info, original.user_info)
