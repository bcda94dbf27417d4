"""Reading: IDX, tables, arrays, data sets by name; what is damaged is refused; parts do not overlap."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast.density import data
from lunet_fast.density.data import DataError
from lunet_fast.training.outside import LIMIT_VARIABLE


def idx(array: np.ndarray) -> bytes:
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pictures = np.arange(20 * 3 * 2).reshape(20, 3, 2) % 256
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(pictures)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(20) % 4)))
    return path


def test_idx(images: Path) -> None:
    rows = data.read(str(images))
    assert rows.values.shape == (20, 6)
    assert rows.image == (3, 2)
    assert rows.levels == 256
    assert rows.values[1].tolist() == [6, 7, 8, 9, 10, 11]
    assert rows.labels is not None
    assert rows.labels.tolist() == [n % 4 for n in range(20)]
    assert rows.classes == 4
    assert "SHA-256" in rows.source


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("images", lambda b: b[:-1], "claims 20 x 3 x 2 bytes and has 119"),
        ("images", lambda b: b"\x00\x00\x0d\x03" + b[4:], "does not begin as an IDX file"),
        (
            "images",
            lambda b: b"",
            "begin as an IDX file of bytes with 3 dimensions, 00000803, but with nothing",
        ),
        ("labels", lambda b: idx(np.zeros(3)), "has 3 labels, and train-images-idx3-ubyte.gz 20 images"),
    ],
)
def test_idx_damaged(images: Path, name: str, spoil: object, told: str) -> None:
    path = images if name == "images" else images.with_name("train-labels-idx1-ubyte.gz")
    path.write_bytes(gzip.compress(spoil(gzip.decompress(path.read_bytes()))))
    with pytest.raises(DataError, match=told):
        data.read(str(images))


def test_idx_not_gzip(images: Path) -> None:
    images.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="does not begin as an IDX file"):
        data.read(str(images))
    for content in (gzip.compress(bytes(100))[:-9], b"\x1f\x8bnothing of the kind"):
        images.write_bytes(content)
        with pytest.raises(DataError, match="cannot be unpacked"):
            data.read(str(images))


def test_idx_that_unpacks_to_too_much(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "120")
    images.write_bytes(gzip.compress(bytes(4000)))
    with pytest.raises(DataError, match="unpack to more than 120: if you trust it"):
        data.read(str(images))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame({"a": [1.5, 2, 3], "kind": ["u", "v", "u"], "b": [3, 2, 1]})
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="," if suffix == ".csv" else "\t", index=False)
    rows = data.read(str(path), label_column="kind")
    assert rows.values.tolist() == [[1.5, 3], [2, 2], [3, 1]]
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 1, 0]
    with pytest.raises(DataError, match="column 'kind' holds .*, not (a number|numbers)"):
        data.read(str(path))
    with pytest.raises(DataError, match="has no column 'sort'; it has a, kind, b"):
        data.read(str(path), label_column="sort")


def test_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.eye(3))
    assert torch.equal(data.read(str(tmp_path / "x.npy")).values, torch.eye(3))
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    with pytest.raises(DataError, match="not numbers \\[rows, features\\]"):
        data.read(str(tmp_path / "cube.npy"))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        data.read(str(tmp_path / "objects.npy"))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"broken\.npy"):
        data.read(str(tmp_path / "broken.npy"))


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,\n")
    with pytest.raises(DataError, match=r"x.csv, line 3: column 'b' is empty"):
        data.read(str(tmp_path / "x.csv"))
    np.save(tmp_path / "x.npy", np.array([[1.0, 2], [3, np.nan]]))
    with pytest.raises(DataError, match=r"row 1, column 1 \(from 0\) is nan"):
        data.read(str(tmp_path / "x.npy"))


def test_what_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a known data set"):
        data.read("nothing")
    (tmp_path / "x.txt").write_text("1 2")
    with pytest.raises(DataError, match=r"give a \.npy, \.csv"):
        data.read(str(tmp_path / "x.txt"))


@pytest.mark.parametrize("name", [data.DIGITS, *data.TABULAR, "moons"])
def test_data_sets_by_name(name: str) -> None:
    if name != "moons":
        pytest.importorskip("sklearn")
    rows = data.read(name)
    assert rows.values.dtype == torch.float32
    assert (rows.labels is None) == (name in ("diabetes", "moons"))
    if name == data.DIGITS:
        assert (len(rows), rows.features, rows.classes, rows.levels) == (1797, 64, 10, 17)
        assert (float(rows.values.min()), float(rows.values.max())) == (0.0, 16.0)


@pytest.mark.parametrize("count", [10, 11, 99])
def test_parts_are_the_rows_each_once(count: int) -> None:
    rows = data.Rows("numbers", torch.arange(count, dtype=torch.float32).unsqueeze(-1))
    parts = data.split(rows, 3)
    together = torch.cat([part.values for part in (parts.training, parts.validation, parts.test)])
    assert together.flatten().sort().values.tolist() == list(range(count))
    assert len(parts.test) == -(-count // 5)
    assert torch.equal(parts.test.values, data.split(rows, 3).test.values)
    assert not torch.equal(parts.test.values, data.split(rows, 4).test.values)


def test_too_few_rows() -> None:
    with pytest.raises(DataError, match="has 9 rows"):
        data.split(data.Rows("few", torch.zeros(9, 1)), 0)


def test_integer_tables_have_levels(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npy")
    np.save(path, np.array([[0, 15], [3, 4]], dtype=np.int16))
    assert data.read(path).levels == 16
    assert data.read(path, levels=20).levels == 20
    assert data.read(path, levels=0).levels is None
    with pytest.raises(
        DataError, match="must hold integers from 0 to 9 for 10 levels, holds numbers from 0 to 15"
    ):
        data.read(path, levels=10)
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,4\n")
    assert data.read(str(tmp_path / "x.csv")).levels == 5


@pytest.mark.parametrize("values", [[[0.5, 1.0]], [[-1.0, 3.0]], [[0.0, 1e6]]])
def test_other_tables_have_none(tmp_path: Path, values: list[list[float]]) -> None:
    np.save(tmp_path / "x.npy", np.array(values))
    assert data.read(str(tmp_path / "x.npy")).levels is None
    with pytest.raises(DataError, match="for 7 levels, holds numbers"):
        data.read(str(tmp_path / "x.npy"), levels=7)


def test_test_rows_of_another_file(tmp_path: Path) -> None:
    pd.DataFrame({"a": range(20), "kind": ["u", "v", "w", "v"] * 5}).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame({"a": [3, 1], "kind": ["w", "v"]}).to_csv(tmp_path / "b.csv", index=False)
    rows = data.read(str(tmp_path / "a.csv"), label_column="kind")
    test = data.read(str(tmp_path / "b.csv"), label_column="kind", like=rows)
    assert test.levels == rows.levels == 20
    assert test.labels is not None
    assert test.labels.tolist() == [2, 1]
    parts = data.split(rows, 0, test)
    assert (len(parts.training), len(parts.validation), parts.test) == (18, 2, test)
    assert data.source_of(rows, test).startswith(rows.source)
    for content, told in (
        ("a,kind\n1,x\n", "label 'x', which a has not"),
        ("a\n25\n", "integers from 0 to 19"),
    ):
        (tmp_path / "c.csv").write_text(content)
        with pytest.raises(DataError, match=told):
            data.read(str(tmp_path / "c.csv"), label_column="kind" if "kind" in content else None, like=rows)
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="has 2 features, and a 1"):
        data.read(str(tmp_path / "c.csv"), like=rows)
