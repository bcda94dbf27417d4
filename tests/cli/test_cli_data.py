from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from lunet_fast.recsys.data import archives, fetching, movielens
from tests.cli.invoke import run, squeezed
from tests.recsys.data.test_movielens import FILES, INTER, ITEM, USER, WHEEL, ZIP, sha256
from tests.recsys.synthetic import latent_frame

needs_data = pytest.mark.skipif(
    not os.environ.get("LUNET_FAST_DATA"),
    reason="$LUNET_FAST_DATA does not name a folder with MovieLens files",
)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Checksums of a made-up ml-100k, an empty cache, no network; returns the cache folder."""
    spec = movielens.DATASETS["ml-100k"]
    assert spec.wheel is not None
    members = {"ml-100k.inter": sha256(INTER), "ml-100k.item": sha256(ITEM), "ml-100k.user": sha256(USER)}
    changed = replace(
        spec,
        sha256={name: sha256(data) for name, data in FILES.items()},
        md5=hashlib.md5(ZIP).hexdigest(),
        wheel=replace(spec.wheel, sha256=sha256(WHEEL), members=members),
    )
    monkeypatch.setitem(movielens.DATASETS, "ml-100k", changed)

    def refuse(*_: object) -> bytes:
        raise archives.Unavailable("the network is down")

    monkeypatch.setattr(fetching, "download", refuse)
    monkeypatch.setattr(fetching, "pip_download", refuse)
    monkeypatch.delenv("LUNET_FAST_DATA", raising=False)
    monkeypatch.setenv("LUNET_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "films.csv"
    latent_frame(text_ids=True).to_csv(path, index=False)
    return path


class TestFetch:
    def test_fetches_once(self, made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetching, "download", lambda *_: ZIP)
        kept = tmp_path / "kept" / "ml-100k.zip"
        result = run("data", "fetch", "ml-100k", "--cache", kept.parent)
        assert result.exit_code == 0, result.output
        assert kept.read_bytes() == ZIP
        assert "ml-100k: https://files.grouplens.org" in result.stdout
        assert f"kept at {kept}" in result.stdout
        assert result.stdout.count("as expected") == 3
        assert "fetching https://files.grouplens.org" in result.stderr
        monkeypatch.setattr(fetching, "download", None)
        result = run("data", "fetch", "ml-100k", "--cache", kept.parent)
        assert result.stdout.startswith(f"ml-100k: {kept}\n")
        assert "kept at" not in result.stdout

    def test_the_other_source(self, made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetching, "pip_download", lambda *_: WHEEL)
        result = run("data", "fetch", "ml-100k")
        assert result.exit_code == 0, result.output
        assert "ml-100k.inter" in result.stdout
        assert f"kept at {made_up / 'recbole-1.2.1-py3-none-any.whl'}" in result.stdout
        assert run("data", "verify", "ml-100k").exit_code == 0

    def test_takes_what_is_in_the_data_folder(self, made_up: Path, tmp_path: Path) -> None:
        (tmp_path / "ml-100k.zip").write_bytes(ZIP)
        result = run("data", "fetch", "ml-100k", "--data-dir", tmp_path)
        assert result.exit_code == 0, result.output
        assert not made_up.exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["ml-10m"], "NAME ml-10m: fetched can be ml-100k, ml-1m"),
            (["ml-100k"], "the network is down"),
            (["ml-100k", "--cache", __file__], "is a file: name a folder"),
            (["ml-100k", "--data-dir", "/nowhere"], "/nowhere is not a folder"),
        ],
    )
    def test_refusals(self, made_up: Path, options: list[str], message: str) -> None:
        result = run("data", "fetch", *options)
        assert result.exit_code == 2
        assert message in result.stderr


class TestVerify:
    def test_movielens(self, made_up: Path, tmp_path: Path) -> None:
        result = run("data", "verify", "ml-100k")
        assert result.exit_code == 2
        assert "get it by  lunet-fast data fetch ml-100k" in result.stderr
        made_up.mkdir()
        (made_up / "ml-100k.zip").write_bytes(ZIP)
        result = run("data", "verify", "ml-100k")
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith("All right: 3 ratings from 1 to 5 by 2 users of 2 items\n")
        assert result.stdout.count("as expected") == 3

    def test_a_damaged_copy(self, made_up: Path) -> None:
        made_up.mkdir()
        file = made_up / "ml-100k.zip"
        for damaged in (ZIP[:-30], b"", ZIP.replace(b"u.data", b"u.dot_")):
            file.write_bytes(damaged)
            result = run("data", "verify", "ml-100k")
            assert result.exit_code == 1, result.output
            assert str(file) in result.stderr
            assert file.exists()  # looking at a file does not remove it
        file.unlink()
        (made_up / "recbole-1.2.1-py3-none-any.whl").write_bytes(WHEEL[:-1])
        result = run("data", "verify", "ml-100k")
        assert result.exit_code == 1
        assert "its SHA-256 is" in result.stderr

    def test_own_file(self, csv: Path) -> None:
        result = run("data", "verify", csv)
        assert result.exit_code == 0, result.output
        assert result.stdout == "All right: 1,200 ratings from 1 to 5 by 60 users of 40 items\n"

    def test_options_on_columns_apply(self, tmp_path: Path) -> None:
        frame = latent_frame().rename(columns={"user": "who", "item": "what", "rating": "stars"})
        frame.to_csv(tmp_path / "r.txt", index=False, sep=";")
        columns = ["--user-column", "who", "--item-col", "what", "--rating-column", "stars", "--sep", ";"]
        for command in ("verify", "describe"):
            assert run("data", command, tmp_path / "r.txt", *columns).exit_code == 0
            assert run("data", command, tmp_path / "r.txt").exit_code != 0

    def test_a_wrong_file_names_the_line(self, csv: Path, tmp_path: Path) -> None:
        frame = pd.read_csv(csv).astype({"rating": str})
        frame.loc[6, "rating"] = "good"
        frame.to_csv(csv, index=False)
        result = run("data", "verify", csv)
        assert result.exit_code == 1
        assert "line 8" in result.stderr
        assert "good" in result.stderr
        assert run("data", "verify", csv, "--scale", 5, 1).exit_code == 2
        result = run("data", "verify", tmp_path / "none.csv")
        assert result.exit_code == 2
        assert "NAME|PATH" in result.stderr

    @needs_data
    @pytest.mark.parametrize(
        ("name", "counts"),
        [
            ("ml-100k", "100,000 ratings from 1 to 5 by 943 users of 1,682 items"),
            ("ml-1m", "1,000,209 ratings from 1 to 5 by 6,040 users of 3,706 items"),
        ],
    )
    def test_the_real_files(self, name: str, counts: str) -> None:
        result = run("data", "verify", name)
        assert result.exit_code == 0, result.output
        assert f"All right: {counts}" in result.stdout


class TestDescribe:
    def test_table(self, csv: Path) -> None:
        frame = pd.read_csv(csv)
        frame["timestamp"] = 874724710
        frame.loc[3:4, "timestamp"] = 0
        frame.to_csv(csv, index=False)
        result = run("data", "describe", csv)
        assert result.exit_code == 0, result.output
        text = squeezed(result.stdout)
        expected = ["films.csv", "users60", "items40", "ratings1,200", "density50.000%", "scale1to5"]
        expected += ["1997-09-2003:05:10UTC", "ofunknowntime2", f"meanrating{frame['rating'].mean():.4f}"]
        for part in expected:
            assert part in text, part
        counts = frame["rating"].value_counts()
        bars = {int(row.split()[0]): row.count("█") for row in result.stdout.splitlines() if "█" in row}
        assert bars == {level: round(40 * n / counts.max()) for level, n in counts.items()}

    def test_without_times_and_with_many_levels(self, tmp_path: Path) -> None:
        frame = latent_frame()
        frame["rating"] = [n / 7 for n in range(len(frame))]
        frame.to_csv(tmp_path / "r.csv", index=False)
        result = run("data", "describe", tmp_path / "r.csv")
        assert result.exit_code == 0, result.output
        assert "unknown" in result.stdout
        assert result.stdout.count("10.0%") == 10

    def test_extreme_times_and_a_name_that_is_no_text(self, tmp_path: Path) -> None:
        file = Path(f"{tmp_path}/\udcff.csv")
        try:
            file.write_text(f"user,item,rating,timestamp\n1,2,3,{-(2**63)}\n1,3,4,{2**63 - 1}\n")
        except OSError:
            pytest.skip("the file system wants UTF-8")
        result = run("data", "describe", file, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert (found["name"], found["first_timestamp"], found["last_timestamp"]) == (
            "?.csv",
            -(2**63),
            2**63 - 1,
        )
        result = run("data", "describe", file)
        assert result.exit_code == 0, result.output
        assert f"{2**63 - 1} s after 1970" in result.stdout

    def test_json(self, csv: Path) -> None:
        result = run("data", "describe", csv, "--json")
        found = json.loads(result.stdout)
        assert (found["users"], found["items"], found["ratings"], found["scale"]) == (
            60,
            40,
            1200,
            [1.0, 5.0],
        )
        assert sum(found["histogram"].values()) == 1200
        assert found["source"] == str(csv)
