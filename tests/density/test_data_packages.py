"""Data sets of Debian's packages: found, fetched, checked by content; made-up files stand for them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lunet_fast.density import data, data_files, data_packages, data_rda
from lunet_fast.density.data import DataError
from lunet_fast.density.data_packages import DATASETS, DataDamagedError, DataNotFoundError, table_digest
from tests.density.test_data import idx

rdata = pytest.importorskip("rdata")

FRAME = pd.DataFrame(
    {
        "Class": pd.Categorical(["up", "down"] * 10),
        "V1": [0.25 * n - 1 for n in range(20)],
        "V2": [float(n % 3) for n in range(20)],
    }
)
VALUES = FRAME[["V1", "V2"]].to_numpy()


def rda(path: Path, **objects: Any) -> bytes:
    """R's file of these objects, not packed."""
    rdata.write_rda(path, objects, compression=None)
    return path.read_bytes()


def fashion() -> dict[str, bytes]:
    """Pictures of the layout of Fashion-MNIST."""
    return {
        f"{part}-{kind}-ubyte.gz": idx(content)
        for part, count in (("train", 12), ("t10k", 3))
        for kind, content in (
            ("images-idx3", np.full((count, 2, 2), count)),
            ("labels-idx1", np.arange(count) % 2),
        )
    }


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a made-up shuttle and fashion-mnist, of which the checksums are; no other source."""
    spec = DATASETS["shuttle"]
    assert isinstance(spec, data_packages.Table)
    digest = table_digest(VALUES, [str(label) for label in FRAME["Class"]])
    package = replace(spec.package, folder=f"{tmp_path}/installed")
    changed = replace(spec, package=package, sha256=digest, unit=0.25, lowest=-4, test_from=15)
    monkeypatch.setitem(DATASETS, "shuttle", changed)
    images = DATASETS["fashion-mnist"]
    monkeypatch.setitem(
        DATASETS,
        "fashion-mnist",
        replace(images, package=replace(images.package, folder=f"{tmp_path}/installed")),
    )
    monkeypatch.delenv("LUNET_FAST_DATA", raising=False)
    monkeypatch.setenv("LUNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_packages, "_PROGRAMS", str(tmp_path / "bin"))
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "Shuttle.rda").write_bytes(rda(tmp_path / "plain.rda", Shuttle=FRAME))
    kinds = ("training images", "training labels", "test images", "test labels")
    for (name, content), kind in zip(fashion().items(), kinds, strict=True):
        (folder / name).write_bytes(gzip.compress(content))
        found = data_packages.hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(data_files.PUBLISHED, found, f"Fashion-MNIST, {kind}")
    return folder


def test_table(made_up: Path) -> None:
    rows = data.read("shuttle", data_dir=made_up)
    assert rows.values[:, 0].tolist() == list(range(20))
    assert rows.values[:, 1].tolist() == [4 * (n % 3) + 4 for n in range(20)]
    assert rows.levels == 20
    assert rows.label_names == ("down", "up")
    assert rows.labels is not None
    assert rows.labels.tolist() == [1, 0] * 10
    parts = data.split(rows, 0)
    assert parts.test.values[:, 0].tolist() == [15, 16, 17, 18, 19]
    assert len(parts.validation) == 2


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress])
def test_table_is_known_by_its_content(made_up: Path, pack: Any) -> None:
    source = data.read("shuttle", data_dir=made_up).source
    file = made_up / "Shuttle.rda"
    file.write_bytes(pack(file.read_bytes()))
    assert data.read("shuttle", data_dir=made_up).source == source


def test_pictures(made_up: Path) -> None:
    rows = data.read("fashion-mnist", data_dir=made_up)
    assert (rows.name, len(rows), rows.image, rows.levels, rows.classes) == (
        "fashion-mnist",
        15,
        (2, 2),
        256,
        2,
    )
    assert len(data.split(rows, 0).test) == 3
    file = made_up / "t10k-labels-idx1-ubyte.gz"
    content = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(content, compresslevel=1))
    assert data.read("fashion-mnist", data_dir=made_up).source == rows.source
    file.write_bytes(gzip.compress(content[:-1] + b"\x05"))
    with pytest.raises(DataDamagedError, match="is not Fashion-MNIST, test labels: SHA-256"):
        data.read("fashion-mnist", data_dir=made_up)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda frame: frame.assign(V1=frame["V1"] + 0.25), "is not the table of r-cran-mlbench"),
        (lambda frame: frame.iloc[::-1], "is not the table of r-cran-mlbench"),
        (lambda frame: frame.rename(columns={"Class": "Kind"}), "has no column Class"),
        (lambda frame: frame.assign(V2=pd.Categorical(["x"] * 20)), "holds other columns than numbers"),
    ],
)
def test_another_table(made_up: Path, tmp_path: Path, change: Any, told: str) -> None:
    file = made_up / "Shuttle.rda"
    file.write_bytes(rda(tmp_path / "other.rda", Shuttle=change(FRAME).reset_index(drop=True)))
    with pytest.raises(DataDamagedError, match=told) as caught:
        data.read("shuttle", data_dir=made_up)
    assert str(file) in str(caught.value)


def test_files_that_are_no_tables_of_r(tmp_path: Path) -> None:
    whole = rda(tmp_path / "x.rda", Shuttle=FRAME)
    path = tmp_path / "Shuttle.rda"
    for content, told in (
        (b"", "is no data file of R"),
        (b"RDA2\nA\n2\n", "is no data file of R"),
        (gzip.compress(gzip.compress(whole)), "is no data file of R"),
        (whole[:-30], "is damaged|must hold one data frame"),
        (lzma.compress(whole)[:-30], "cannot be unpacked"),
        (whole[:14] + bytes.fromhex("0000000d7fffffff") + bytes(64), "is damaged"),
        (whole[:14] + bytes.fromhex("000000137fffffff") + bytes.fromhex("000000fe") * 64, "is damaged"),
        (whole[:14] + bytes.fromhex("00000402") * 50_000, "is damaged"),
        (rda(tmp_path / "y.rda", a=FRAME, b=FRAME), "must hold one data frame"),
        (rda(tmp_path / "y.rda", a=np.arange(3)), "must hold one data frame"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=told):
            data_rda.read_rda(path)
    counted = struct.pack(">3d", 20, 0, 1)
    assert counted in whole
    path.write_bytes(whole.replace(counted, struct.pack(">3d", 2e9, 0, 1)))
    with pytest.raises(DataError, match="compact sequences of more than 1,048,576 numbers"):
        data_rda.read_rda(path)
    path.write_bytes(lzma.compress(bytes(100 << 20)))
    with pytest.raises(DataError, match="unpack to more than 6,291,456"):
        data_rda.read_rda(path)


def test_where_it_is_looked_for(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataNotFoundError) as caught:
        data.read("shuttle")
    for part in (
        "apt-get is not on this machine",
        "Shuttle.rda into",
        "--data-dir",
        "packages.debian.org",
        "CRAN",
    ):
        assert part in str(caught.value)
    with pytest.raises(DataNotFoundError, match="get it by  lunet-fast density data fetch shuttle"):
        data.read("shuttle", fetch=False)
    with pytest.raises(DataNotFoundError, match="--data-dir .* does not hold Shuttle.rda"):
        data.read("shuttle", data_dir=tmp_path)
    for place in ("cache/r-cran-mlbench", "installed", "mine/r-cran-mlbench", "mine"):
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "Shuttle.rda").write_bytes((made_up / "Shuttle.rda").read_bytes())
        if "mine" in place:
            monkeypatch.setenv("LUNET_FAST_DATA", str(tmp_path / "mine"))
        assert data_packages.folder_of("shuttle") == folder
        assert len(data.read("shuttle", fetch=False)) == 20


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_fetch(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {}
    for name in ("shuttle", "fashion-mnist"):
        spec = DATASETS[name]
        few[name] = replace(spec, package=replace(spec.package, folder="data"))
    monkeypatch.setattr(data_packages, "DATASETS", few)
    tools = tmp_path / "bin"
    program(tools, "apt-get", 'test "$1 $2" = "download -q" && : > "$3_1.0_all.deb"')
    program(tools, "dpkg-deb", f'test -f "$2" && mkdir -p "$3/data" && cp {made_up}/* "$3/data"')
    # Nothing of the current folder runs, whatever $PATH says.
    here = tmp_path / "here"
    program(here, "apt-get", f": > {tmp_path}/bad")
    program(here, "dpkg-deb", f": > {tmp_path}/bad")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", f".:{here}:/usr/bin:/bin")
    assert len(data.read("shuttle")) == 20
    assert not (tmp_path / "bad").exists()
    kept = tmp_path / "cache" / "r-cran-mlbench"
    assert [file.name for file in kept.iterdir()] == ["Shuttle.rda"]
    program(tools, "apt-get", "exit 1")
    assert len(data.read("shuttle")) == 20  # not fetched again
    program(tools, "apt-get", "echo 'E: Unable to locate package x' >&2; exit 100")
    with pytest.raises(DataNotFoundError, match="failed: E: Unable to locate package x .*apt-get update"):
        data.read("fashion-mnist")
    program(tools, "apt-get", "exit 0")
    with pytest.raises(DataNotFoundError, match=r"left no \.deb file"):
        data.read("fashion-mnist")
    monkeypatch.setattr(data_packages, "APT_SECONDS", 0.2)
    program(tools, "apt-get", "exec sleep 20")
    with pytest.raises(DataNotFoundError, match="did not end within"):
        data.read("fashion-mnist")


def test_another_package_than_expected(
    made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    program(tools, "apt-get", ': > "$3_1.0_all.deb"')
    program(tools, "dpkg-deb", 'mkdir "$3"')
    with pytest.raises(DataNotFoundError, match="Debian's dataset-fashion-mnist has another fashion-mnist"):
        data.read("fashion-mnist")
    assert not (tmp_path / "cache").exists()


@pytest.mark.network
@pytest.mark.parametrize("name", list(DATASETS))
def test_the_real_packages(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run(["which", "apt-get"], check=False, capture_output=True).returncode:
        pytest.skip("no apt-get")
    monkeypatch.setenv("LUNET_FAST_CACHE", str(tmp_path))
    rows = data.read(name)
    assert len(data.split(rows, 0).test) >= 154
