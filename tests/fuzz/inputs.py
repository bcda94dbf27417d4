"""Inputs for the fuzzers: good files of every format, and changes that know how each is built.

An input is bytes: the first says which of CASES the rest is a file of. All that is drawn comes from the
``random.Random`` given, so a seed gives the same inputs again.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """How a file is read: its kind, its name, and the arguments of its reader."""

    kind: str  # "ratings", "pairs", "users", "like", "archive", "model"
    name: str
    options: dict[str, Any]

    @property
    def form(self) -> str:
        """ "text", "parquet", "zip" or "safetensors", below a ``.gz``."""
        name = self.name.removesuffix(".gz")
        if name.endswith(".parquet"):
            return "parquet"
        return {"archive": "zip", "model": "safetensors"}.get(self.kind, "text")

    @property
    def sep(self) -> str:
        by_name = {"csv": ",", "dat": "::"}
        return self.options.get("sep") or by_name.get(self.name.removesuffix(".gz").split(".")[-1], "\t")


CLICKS: dict[str, Any] = {"rating": None}
CASES = [
    *(Case("ratings", f"r.{end}", {}) for end in ("csv", "tsv", "dat", "inter", "txt", "parquet")),
    *(Case("ratings", f"r.{end}.gz", {}) for end in ("csv", "tsv", "dat", "inter", "parquet")),
    Case("ratings", "r.csv", {"scale": (1, 5)}),
    Case("ratings", "r.csv", CLICKS),
    Case("ratings", "r.parquet", CLICKS),
    Case("ratings", "r.parquet", {"scale": (1, 5)}),
    *(Case("ratings", "r.any", {"sep": sep}) for sep in (";", " ", "|", "§", "\x1f")),
    *(Case("pairs", f"p.{end}", {}) for end in ("csv", "parquet", "tsv.gz")),
    Case("users", "users.txt", {}),
    Case("like", "u1.base", {"sep": "\t"}),
    Case("like", "ratings.dat", {"sep": "::"}),
    Case("archive", "ml-1m.zip", {}),
    Case("model", "model.safetensors", {}),
    Case("ratings", "r.csv", {"header": False}),
    Case("ratings", "r.any", {"duplicates": "mean"}),
    Case("ratings", "r.jsonl", {}),
]
HEAVY = {"archive", "model"}
"""Kinds that have runs of their own."""

CELLS = [
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "5",
        "3.5",
        "-0",
        "+5",
        "007",
        "1e3",
        "1_000",
        "0x10",
        "3,5",
        "٣",
        "NA",
        "None",
    ),
    *("nan", "-inf", "Infinity", "1e39", "1e309", "1e-400", "-1e400", ".5", "5.", ".", "e", "1e", "+", "--1"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809"),
    *("18446744073709551616", "9007199254740993", "1" * 400, "0." + "1" * 5000, "1" * 60_000 + "x"),
    *("2020-01-31", "2020-01-31T12:30:00Z", "2020-02-30", "0000-00-00", "0001-01-01T00:00:00+14:00"),
    *("9999-12-31T23:59:59-23:59", "2020-01-01T00:00:00+99:99", "2020-01-01 00:00" + " " * 3000 + "x"),
    *("ann", "é", "日本", "😀", "\u202e", "\u2028", "\x85", "\ufeff", "\x1b[31m", "\x0c", "\x1c", "\x7f"),
    *("=1+1", "'=1", "''=1", "@x", "-x", "a" * 140_000, "b" * 5000, '"', '""', '"a', 'a"b', '"a\nb"', "'"),
]
BYTES = [
    *(
        b"\0",
        b"\r",
        b"\n",
        b"\r\n",
        b"\n\n\n",
        b"\x1f",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
    ),
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"PK\x03\x04",
        b"PAR1",
        b"\x1f\x8b",
        b'"',
        b",",
        b"\t",
        b"::",
        b";",
        b" ",
    ),
]
NUMBERS = [0, 1, -1, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, -(2**63), 10**6]
MEMBERS = [
    *("ratings.dat", "ml-1m/ratings.dat", "ml-1m/movies.dat", "ml-1m/users.dat", "README", "a/b/ratings.dat"),
    *(
        "../ratings.dat",
        "/ratings.dat",
        "C:/ratings.dat",
        "..\\ratings.dat",
        "ml-1m\\ratings.dat",
        "x\0y",
        "é",
    ),
]


# ------------------------------------------------------------------------------------------------------------
# Good files


def rows(n: int = 12) -> list[list[str]]:
    return [[str(k % 4 + 1), str(10 + k // 4), str(k % 5 + 1), str(881250949 + k)] for k in range(n)]


def text_file(case: Case) -> bytes:
    header = ["user", "item", "rating", "timestamp"]
    if case.name.endswith((".inter", ".inter.gz")):
        header = ["user:token", "item:token", "rating:float", "timestamp:float"]
    if case.name.endswith(".jsonl"):
        return "".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows()).encode()
    bare = case.kind in ("like", "users") or case.options.get("header") is False
    lines = rows() if bare else [header, *rows()]
    if case.kind == "users":
        lines = [line[:1] for line in lines]
    return "".join(case.sep.join(line) + "\n" for line in lines).encode()


def parquet_file(rng: random.Random | None = None) -> bytes:
    """A plain table, or one with types, values and settings drawn."""
    import pyarrow as pa
    from pyarrow import parquet

    cells = rows()
    columns: dict[str, Any] = {
        name: pa.array([float(row[k]) if name == "rating" else int(row[k]) for row in cells])
        for k, name in enumerate(("user", "item", "rating", "timestamp"))
    }
    settings: dict[str, Any] = {}
    if rng is not None:
        for name in rng.sample(list(columns), rng.randint(1, 3)):
            with contextlib.suppress(pa.ArrowException, ValueError, OverflowError, TypeError):
                columns[name] = rng.choice(_COLUMNS)(pa, rng, len(cells))
        if rng.random() < 0.1:
            del columns[rng.choice(list(columns))]
        settings = {
            "compression": rng.choice(["none", "snappy", "zstd", "gzip", "brotli", "lz4"]),
            "use_dictionary": rng.random() < 0.5,
            "data_page_version": rng.choice(["1.0", "2.0"]),
            "row_group_size": rng.choice([1, 5, 1000]),
            "store_schema": rng.random() < 0.7,
        }
    stream = io.BytesIO()
    try:
        parquet.write_table(pa.table(columns), stream, **settings)
    except Exception:  # of pyarrow, of many types: what was drawn cannot be written
        return parquet_file()
    return stream.getvalue()


def _ints(rng: random.Random, n: int) -> list[int]:
    return [rng.choice(NUMBERS) for _ in range(n)]


def _small(rng: random.Random, n: int) -> list[int]:
    return [rng.randint(-1000, 1000) for _ in range(n)]


_COLUMNS: list[Callable[[Any, random.Random, int], Any]] = [
    lambda pa, rng, n: pa.array([rng.choice([*range(5), None]) for _ in range(n)]),
    lambda pa, rng, n: pa.array(_ints(rng, n), pa.int64()),
    lambda pa, rng, n: pa.array([abs(v) for v in _ints(rng, n)], pa.uint64()),
    lambda pa, rng, n: pa.array(_small(rng, n), rng.choice([pa.int16(), pa.float32(), pa.decimal128(12, 2)])),
    lambda pa, rng, n: pa.array(
        [rng.choice([float("nan"), float("inf"), 1e39, 0.5, None]) for _ in range(n)]
    ),
    lambda pa, rng, n: pa.array([rng.choice(CELLS) for _ in range(n)], pa.string()),
    lambda pa, rng, n: pa.array([rng.choice(CELLS) for _ in range(n)]).dictionary_encode(),
    lambda pa, rng, n: pa.array([rng.choice(BYTES) for _ in range(n)], pa.binary()),
    lambda pa, rng, n: pa.array(
        [bytes(rng.randrange(256) for _ in range(4)) for _ in range(n)], pa.binary(4)
    ),
    lambda pa, rng, n: pa.array(_ints(rng, n), pa.timestamp(rng.choice(["s", "ms", "us", "ns"]))),
    lambda pa, rng, n: pa.array(
        _ints(rng, n), pa.timestamp("us", tz=rng.choice(["UTC", "Asia/Tokyo", "X/Y"]))
    ),
    lambda pa, rng, n: pa.array(_small(rng, n), pa.int32()).cast(pa.date32()),
    lambda pa, rng, n: pa.array([2**30 + k for k in _small(rng, n)], pa.int32()).cast(pa.date32()),
    lambda pa, rng, n: pa.array(_ints(rng, n), pa.int64()).cast(pa.time64("us")),
    lambda pa, rng, n: pa.array(_ints(rng, n), pa.int64()).cast(pa.duration("us")),
    lambda pa, rng, n: pa.array([[k] for k in range(n)]),
    lambda pa, rng, n: pa.array([{"a": k} for k in range(n)]),
    lambda pa, rng, n: pa.array([[("a", k)] for k in range(n)], pa.map_(pa.string(), pa.int64())),
    lambda pa, rng, n: pa.array([k % 2 == 0 for k in range(n)]),
    lambda pa, rng, n: pa.nulls(n),
    lambda pa, rng, n: pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), ["x" * 300_000]),
]

RATINGS_DAT = b"2::11::4::978300760\n1::11::3::0\n1::12::5::978300761\n"
MOVIES_DAT = b"11::Mis\xe9rables, Les (1995)::Drama|Musical\n12::B: The Film (1996)::Sci-Fi\n"
USERS_DAT = b"1::F::1::10::48067\n2::M::56::16::70072\n"


def zip_file(rng: random.Random | None = None) -> bytes:
    """A re-packed data set, or one with names, links, methods and contents drawn."""
    contents = {
        "ml-1m/ratings.dat": RATINGS_DAT,
        "ml-1m/movies.dat": MOVIES_DAT,
        "ml-1m/users.dat": USERS_DAT,
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in contents.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if rng is not None and rng.random() < 0.3:
                info.filename = rng.choice(MEMBERS)
                info.compress_type = rng.choice(
                    [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
                )
                info.external_attr = rng.choice([0, 0o120777 << 16, 0o100644 << 16, 0x10])
            if rng is not None and rng.random() < 0.3:
                data = rng.choice([b"", bytes(rng.choice([100, 1 << 22])), changed_text(data, "::", rng)])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a name that occurs twice
                archive.writestr(info, data)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------
# Changes


def changed(data: bytes, rng: random.Random, most: int = 1 << 18) -> bytes:
    """An input near ``data``; the case stays, mostly."""
    if len(data) < 2:
        return data + bytes(rng.randrange(256) for _ in range(rng.randint(1, 60)))
    case = CASES[data[0] % len(CASES)]
    body = data[1:]
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        body = _changed_file(body, case, rng)
    return (data[:1] + body)[:most]


def _changed_file(body: bytes, case: Case, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return changed_bytes(body, rng)
    if case.name.endswith(".gz"):
        return _changed_gzip(body, case, rng)
    return _changed_form(body, case, rng)


def _changed_form(body: bytes, case: Case, rng: random.Random) -> bytes:
    if case.form == "text":
        return changed_text(body, case.sep, rng)
    if case.form == "parquet":
        return parquet_file(rng) if rng.random() < 0.3 else _changed_parquet(body, rng)
    if case.form == "zip":
        return zip_file(rng) if rng.random() < 0.4 else _changed_zip(body, rng)
    return _changed_safetensors(body, rng)


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    how = rng.randrange(6)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + rng.choice(BYTES) + data[at:]
    if how == 2:
        return data[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 8))) + data[at + 1 :]
    if how == 3:
        return data[:at] + data[at + rng.randint(1, 50) :]
    if how == 4:
        end = min(len(data), at + rng.randint(1, 200))
        return data[:end] + data[at:end] * rng.choice([1, 2, 100]) + data[end:]
    return data[:at] + bytes([(data[at] if at < len(data) else 0) ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def changed_text(data: bytes, sep: str, rng: random.Random) -> bytes:
    text = data.decode("utf-8", "surrogateescape")
    table = [line.split(sep) for line in text.split("\n")]
    row = rng.randrange(len(table))
    column = rng.randrange(len(table[row]))
    how = rng.randrange(14)
    if how <= 3:
        table[row][column] = rng.choice(CELLS)
    elif how == 4:
        del table[row]
    elif how == 5:
        table.insert(rng.randrange(len(table) + 1), list(table[row]))
    elif how == 6:
        table[row].insert(column, rng.choice(CELLS))
    elif how == 7:
        del table[row][column]
    elif how == 8:
        table[row][column] = '"' + table[row][column] + '"'
    elif how == 9:  # a whole column
        value = rng.choice(CELLS)
        for n, line in enumerate(table[1:]):
            if column < len(line):
                line[column] = value if rng.random() < 0.5 else f"{value}{n}"
        if sum(map(len, value)) > 1000:
            table = table[:4]
    elif how == 10:
        names = ["user", "item", "rating", "timestamp", "user:token", "", " user ", "x" * 100, "é", "1"]
        table[0] = [rng.choice(names) for _ in range(rng.choice([1, 3, 4, 5, 300]))]
    elif how == 11:
        text = text.replace("\n", rng.choice(["\r\n", "\r", "\n\n", "\n \t\n"]))
        return text.encode("utf-8", "surrogateescape")
    elif how == 12:
        text = "\n".join(sep.join(line) for line in table)
        code = rng.choice(["utf-16", "utf-8-sig", "latin-1", "utf-32", "utf-7", "cp037"])
        return text.encode(code, "replace")
    else:
        other = rng.choice([",", "\t", ";", "::", "|", " "])
        return text.replace(sep, other).encode("utf-8", "surrogateescape")
    return "\n".join(sep.join(line) for line in table).encode("utf-8", "surrogateescape")


def _changed_gzip(body: bytes, case: Case, rng: random.Random) -> bytes:
    how = rng.randrange(400)
    if how < 20:
        return body + body
    if how < 40:
        return body + gzip.compress(bytes(rng.choice([0, 1000, 1 << 20])), mtime=0)
    if how == 40:  # a bomb, 70 to 140 MB from as many KB
        return gzip.compress(rng.choice([b"\n", b"\0", b"1,"]) * (70 << 20), 1, mtime=0)
    inner = body
    with contextlib.suppress(OSError, EOFError, zlib.error):
        inner = zlib.decompressobj(31).decompress(body, 1 << 18)
    return gzip.compress(_changed_form(inner, case, rng), 1, mtime=0)


def _changed_parquet(data: bytes, rng: random.Random) -> bytes:
    """Bytes of the footer, or of a page's header, as numbers of another size; the footer's length stays."""
    if len(data) < 16:
        return changed_bytes(data, rng)
    length = min(int.from_bytes(data[-8:-4], "little"), len(data) - 12)
    start = len(data) - 8 - length
    how = rng.randrange(5)
    if how == 0:
        return changed_bytes(data[:start], rng) + data[start:]
    footer = bytearray(data[start:-8]) or bytearray(b"\0")
    at = rng.randrange(len(footer))
    if how == 1:
        footer[at] = rng.randrange(256)
    elif how == 2:  # a number of Thrift's compact protocol
        footer[at : at + 1] = _varint(rng.choice(NUMBERS))
    elif how == 3:
        head = bytearray(data[:start])
        where = min(4 + rng.randrange(24), len(head))
        head[where : where + 1] = _varint(rng.choice(NUMBERS))
        return bytes(head) + bytes(footer) + len(footer).to_bytes(4, "little") + b"PAR1"
    else:
        footer = bytearray(changed_bytes(bytes(footer), rng))
    return data[:start] + bytes(footer) + len(footer).to_bytes(4, "little") + b"PAR1"


def _varint(number: int) -> bytes:
    value = ((number << 1) ^ (number >> 63)) & (2**64 - 1)
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _changed_zip(data: bytes, rng: random.Random) -> bytes:
    """A field of a header: sizes, offsets, flags, methods and lengths of names."""
    marks = [at for at in range(len(data) - 30) if data[at : at + 2] == b"PK"]
    if not marks:
        return changed_bytes(data, rng)
    at = rng.choice(marks) + rng.randrange(4, 46)
    size = rng.choice([2, 4])
    value = struct.pack("<q", rng.choice(NUMBERS))[:size]
    return data[:at] + value + data[at + size :]


def _changed_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A value somewhere in the header's JSON, or in the JSON that it holds as a text."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        own = json.loads(header["__metadata__"]["lunet_fast"])
    except (ValueError, KeyError, TypeError):
        return changed_bytes(data, rng)
    payload = data[8 + length :]
    how = rng.randrange(4)
    if how == 0:
        _change_json(own, rng)
    elif how == 1:
        _change_json(header, rng)
    elif how == 2 or len(payload) < 8:
        payload = changed_bytes(payload, rng)
    else:  # an id, an index, an offset, a weight
        at = rng.randrange(len(payload) // 8) * 8
        payload = payload[:at] + struct.pack("<q", rng.choice(NUMBERS)) + payload[at + 8 :]
    if rng.random() < 0.9 and isinstance(own, dict):  # of the version without a digest, or nothing passes it
        own.pop("sha256", None)
        own["version"] = 1 if own.get("version") == 2 else own.get("version")
    with contextlib.suppress(TypeError, KeyError):
        header["__metadata__"]["lunet_fast"] = json.dumps(own)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def _change_json(value: Any, rng: random.Random) -> None:
    """One value, at some depth, becomes another, or goes."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        if rng.random() < 0.15:
            del value[key]
        else:
            other = [
                None,
                True,
                "",
                "x",
                "F32",
                "I64",
                [],
                {},
                [1],
                [[1, 2]],
                0.5,
                1e308,
                float("nan"),
                *NUMBERS,
            ]
            value[key] = rng.choice(other)
        return


# ------------------------------------------------------------------------------------------------------------


def seed_inputs(kinds: list[str], model: bytes = b"") -> list[bytes]:
    """A good file of each case of ``kinds``; ``model`` is a model's file."""
    found = []
    for n, case in enumerate(CASES):
        if case.kind not in kinds:
            continue
        if case.form == "text":
            data = text_file(case)
        elif case.form == "parquet":
            data = parquet_file()
        else:
            data = zip_file() if case.form == "zip" else model
        if case.name.endswith(".gz"):
            data = gzip.compress(data, mtime=0)
        found.append(bytes([n]) + data)
    return found
