"""Files that lie, swell or are torn: each is refused by name, before memory is taken."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lunet_fast.density import data, data_files
from lunet_fast.density.data import DataError
from lunet_fast.training.outside import LIMIT_VARIABLE


def npy(header: str, content: bytes = b"") -> bytes:
    """A ``.npy`` file with this header."""
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def header(shape: str, kind: str = "'<f4'") -> str:
    return f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (npy(header("(2, 2)"), bytes(15)), "states 16 bytes of numbers, and it has 15"),
        (npy(header("(2, 2)"), bytes(17)), "states 16 bytes of numbers, and it has 17"),
        (npy(header("(1000000000000, 1000000000)"), bytes(16)), "states 4,000,000,000,000,000,000,000 bytes"),
        (npy(header("(4294967296, 4294967296)", "'<f8'"), bytes(16)), "bytes of numbers, and it has 16"),
        (npy(header("(-2, -2)"), bytes(16)), r"of shape \(-2, -2\)"),
        (npy(header("(4,)"), bytes(16)), r"of shape \(4,\), not numbers"),
        (npy(header("()"), bytes(4)), r"of shape \(\)"),
        (npy(header("(2, 1)", "'|O'"), bytes(16)), "Python objects"),
        (npy(header("(2, 1)", "[('a', '<f4'), ('b', '|O')]"), bytes(16)), "Python objects"),
        (npy(header("(2, 1)", "'<c8'"), bytes(16)), "not numbers"),
        (npy(header("(2, 1)", "'<U1'"), bytes(8)), "not numbers"),
        (npy(header("(0, 3)")), r"is empty, shape \(0, 3\)"),
        (npy("{'descr': '<f4'}"), "its header is damaged"),
        (npy("__import__('os')"), "its header is damaged"),
        (npy("(" * 60), "its header is damaged"),
        (b"\x93NUMPY\x09\x00" + bytes(20), "its header is damaged"),
        (b"", "it begins with nothing"),
        (b"1,2\n3,4\n", "is no .npy file"),
    ],
)
def test_headers_of_arrays(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        data.read(str(path))
    assert str(path) in str(caught.value)


def test_an_archive_with_the_name_of_an_array(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.eye(3))
    (tmp_path / "x.npy").write_bytes(stream.getvalue())
    with pytest.raises(DataError, match=r"is an archive \(.npz\): save one array"):
        data.read(str(tmp_path / "x.npy"))


def test_arrays_of_any_order_and_type(tmp_path: Path) -> None:
    wanted = np.arange(12).reshape(4, 3)
    for kind in (">f8", "<f2", "u1", ">i8"):
        np.save(tmp_path / "x.npy", np.asfortranarray(wanted.astype(kind)))
        assert data.read(str(tmp_path / "x.npy")).values.tolist() == wanted.tolist()
    np.save(tmp_path / "x.npy", np.array([[1.0], [1e300]]))
    with pytest.raises(DataError, match="row 1, column 0 .* is inf"):
        data.read(str(tmp_path / "x.npy"))


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
def test_files_larger_than_the_limit(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x{suffix}"
    values = np.arange(4000.0).reshape(1000, 4) + 0.5
    if suffix == ".npy":
        np.save(path, values.astype(np.float16))
    elif suffix == ".csv":
        pd.DataFrame(values, columns=list("abcd")).to_csv(path, index=False)
    else:
        pd.DataFrame(values, columns=list("abcd")).to_parquet(path)
    assert len(data.read(str(path))) == 1000
    monkeypatch.setenv(LIMIT_VARIABLE, "9000")
    with pytest.raises(DataError, match=r"more than the 9,000 .* set \$LUNET_FAST_MAX_BYTES"):
        data.read(str(path))
    monkeypatch.setenv(LIMIT_VARIABLE, "many")
    with pytest.raises(ValueError, match="must be a whole number of bytes"):
        data.read(str(path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1,2\n3,4,5\n", "line 3: has 3 fields and the header 2"),
        ("a,b\n1,2\n3\n4\n", r"line 3: has 1 fields and the header 2.*\(2 such lines in all\)"),
        ("a,b\n\n1,2\n\n3,x\n", "line 5: column 'b' holds 'x', not a number"),
        ('a,b\n"1",2\n"3\n",4\n5,"six"\n', "line 5: column 'b' holds 'six', not a number"),
        ('a,b\n1,"2\n', "line 2: the quotes do not match"),
        ("a,b\n1,nan\n", "line 2: column 'b' holds nan, which is no finite number"),
        ("a,b\n1,-inf\n", "line 2: column 'b' holds -inf, which is no finite number"),
        ("a,b\n1,2\n1,1e39\n1,1e40\n", r"line 3: column 'b' holds 1e39.*\(2 such rows"),
        ("a,b\n1,\x1b[31m\n", r"holds '\\x1b\[31m'"),
        ("a,b\n1,0x10\n", "holds '0x10', not a number"),
        ("a,b\n1,1_000\n", "holds '1_000', not a number"),
        ("a,a\n1,2\n", "line 1: the column 'a' occurs twice"),
        ("1.5,2\n3,4\n", "line 1: holds numbers"),
        ("a,b\n", "has a header and no row after it"),
        ("\n\n", "is empty"),
        ("", "is empty"),
        ("a,b\n1,\x002\n", "line 2: a zero byte at offset 6"),
    ],
)
def test_texts(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=told) as caught:
        data.read(str(tmp_path / "x.csv"))
    assert str(tmp_path / "x.csv") in str(caught.value)


def test_texts_of_other_encodings(tmp_path: Path) -> None:
    for content, told in (
        ("a,b\n1,2\n".encode("utf-16"), "line 1: the text is UTF-16"),
        (b"a,b\n1,2\n3,\xe9\n", "line 3: the text is not UTF-8"),
    ):
        (tmp_path / "x.csv").write_bytes(content)
        with pytest.raises(DataError, match=told):
            data.read(str(tmp_path / "x.csv"))


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2.5\n3,4\n",
        "a,b\r\n1,2.5\r\n3,4",
        "\ufeffa,b\n1,2.5\n\n 3 ,+4.0e0\n",
        '"a","b"\n1,"2.5"\n3,4\n',
        "0,1\n1,2.5\n3,4\n",
    ],
)
def test_texts_that_say_the_same(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_bytes(text.encode())
    assert data.read(str(tmp_path / "x.csv")).values.tolist() == [[1, 2.5], [3, 4]]


def test_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,kind\n1.5,10\n2,9\n3,-1\n")
    rows = data.read(str(path), label_column="kind")
    assert rows.label_names == ("-1", "9", "10")
    assert rows.labels is not None
    assert rows.labels.tolist() == [2, 1, 0]
    path.write_text("a,kind\n1,u\n2, \n")
    with pytest.raises(DataError, match="line 3: column 'kind' is empty"):
        data.read(str(path), label_column="kind")
    monkeypatch.setattr(data_files, "MOST_CLASSES", 2)
    path.write_text("a,kind\n1,u\n2,v\n3,w\n")
    with pytest.raises(DataError, match="the label column holds 3 different values"):
        data.read(str(path), label_column="kind")
    with pytest.raises(DataError, match="has its own labels"):
        data.read("digits", label_column="kind")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"a": [[1], [2]]}, "column 'a' holds list<.*>, not numbers"),
        ({"a": [{"b": 1}, {"b": 2}]}, "column 'a' holds struct<.*>, not numbers"),
        ({"a": pd.to_datetime(["2020-01-01", "2020-01-02"])}, "column 'a' holds timestamp.*, not numbers"),
        ({"a": [1.0, None]}, "row 2: column 'a' is (missing|nan)"),
        ({"a": pd.array([1, None], "Int64")}, "row 2: column 'a' is missing"),
        ({"a": [1.0, np.inf]}, "row 2: column 'a' is inf"),
        ({"a": ["x", "y"]}, "not numbers: leave it out, or name it with --label-column"),
    ],
)
def test_columns_of_parquet(tmp_path: Path, columns: dict[str, object], told: str) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    pd.DataFrame(columns).to_parquet(path)
    with pytest.raises(DataError, match=told):
        data.read(str(path))


def test_more_of_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path = tmp_path / "x.parquet"
    frame = pd.DataFrame({"a": [True, False], "kind": pd.Categorical(["u", "v"]), "b": [1, 2]}, index=[5, 6])
    frame.to_parquet(path)
    rows = data.read(str(path), label_column="kind")
    assert rows.values.tolist() == [[1, 1], [0, 2]]  # the index is no feature
    assert rows.label_names == ("u", "v")
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", b"PAR1", whole[:4] + whole[40:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.parquet.* is damaged or cut short"):
            data.read(str(path), label_column="kind")
    table = pa.Table.from_arrays([pa.array([1, 2]), pa.array([3, 4])], names=["a", "a"])
    parquet.write_table(table, path)
    with pytest.raises(DataError, match="the column 'a' occurs twice"):
        data.read(str(path))


def test_a_page_of_many_equal_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"a": np.zeros(5_000_000)}), path, compression="zstd")
    assert path.stat().st_size < 50_000
    monkeypatch.setenv(LIMIT_VARIABLE, str(1 << 20))
    with pytest.raises(DataError, match="holds numbers of 20,000,000 bytes, more than the 1,048,576"):
        data.read(str(path))
