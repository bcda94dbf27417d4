"""Good files of every kind that a program of ours reads back, and changes that know how each is built.

An input is a number: with the seed it says which file is changed how, so that a failure is found again by it.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from lunet_fast.training import files

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 17, 255, 1000, 1001, 2**31, 2**53, 10**9, 10**12, 10**30, -(10**9)),
    *(
        0.0,
        -0.0,
        0.5,
        1.5,
        1e-320,
        1e308,
        -1e308,
        "",
        "0",
        "1",
        "\x1b[31m\x07",
        "[bold]x[/]",
        "é\u202e\ud800",
    ),
    *([], [[]], [1], [0.5, None], {}, {"a": 1}, {"$ref": "#"}, ["x"] * 50, "x" * 5000),
]
"""What a value of JSON is replaced by."""

FILLS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, 1e38, -1e38, math.inf, math.nan, 2.0**31, -(2.0**31), 2.0**62]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]


def changed_json(value: Any, rng: random.Random) -> Any:
    """The value with one thing in it replaced, taken out, added, or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        way = rng.random()
        if way < 0.6:
            return {**value, name: changed_json(value[name], rng)}
        if way < 0.75:
            return {key: each for key, each in value.items() if key != name}
        if way < 0.85:
            return {**value, rng.choice(["more", "", "__class__", name.upper(), "\x1b"]): rng.choice(VALUES)}
        return {**value, name: value[rng.choice(sorted(value))]}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        way = rng.random()
        if way < 0.5:
            return [*value[:place], changed_json(value[place], rng), *value[place + 1 :]]
        if way < 0.7:
            return value[:place] + value[place + 1 :]
        return value * rng.choice([2, 3, 100]) if len(value) < 100 else value[::-1]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value)])
    return rng.choice(VALUES)


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, cut, repeated or put in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(len(data) + 1)
        way = rng.random()
        if way < 0.4 and place < len(data):
            data[place] = rng.randrange(256)
        elif way < 0.6:
            del data[place : place + rng.choice([1, 2, 8, 100, 10**6])]
        elif way < 0.8:
            data[place:place] = rng.choice(
                [b"\0", b"\xff" * 8, b"\n", b'"', b"1" * 400, bytes(rng.randbytes(9))]
            )
        else:
            data[place:place] = data[place : place + rng.choice([1, 16, 300])]
    return bytes(data)


def _changed_tensor(tensor: Tensor, rng: random.Random) -> Tensor:
    """Another shape, dtype or content."""
    way = rng.random()
    if way < 0.2:
        shape = list(tensor.shape) or [1]
        place = rng.randrange(len(shape))
        shape[place] = max(0, rng.choice([0, 1, shape[place] + 1, shape[place] - 1, shape[place] * 2]))
        return torch.zeros(shape, dtype=tensor.dtype)
    if way < 0.3:
        return tensor.reshape(rng.choice([[-1], [1, *tensor.shape], [*tensor.shape, 1]]))
    if way < 0.35:
        return (
            tensor.mT.contiguous() if tensor.dim() > 1 else tensor.flip(0) if tensor.dim() else tensor[None]
        )
    if way < 0.5:
        return tensor.nan_to_num().to(rng.choice(DTYPES))
    if tensor.numel() == 0:
        return torch.ones(3, dtype=tensor.dtype)
    flat = tensor.reshape(-1).clone()
    place, fill = rng.randrange(len(flat)), rng.choice(FILLS)
    if not flat.is_floating_point():
        fill = 0 if not math.isfinite(fill) else int(fill)
        top = torch.iinfo(flat.dtype).max if flat.dtype != torch.bool else 1
        fill = max(
            -top, min(top, rng.choice([fill, int(flat[place]) + 1, int(flat[place]) - 1, -1, len(flat)]))
        )
        fill = max(fill, 0) if flat.dtype in (torch.uint8, torch.bool) else fill
    if rng.random() < 0.3:
        flat.fill_(fill)
    else:
        flat[place] = fill
    return flat.reshape(tensor.shape)


def changed_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Its tensors and its header changed, with the digest that then belongs to it; or the bytes."""
    if rng.random() < 0.15:
        return changed_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lunet_fast"])
    tensors = load(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(sorted(tensors)) if tensors else ""
        way = rng.random()
        if way < 0.35:
            header = changed_json(header, rng)
            header = header if isinstance(header, dict) else {"format": header}
        elif way < 0.8 and tensors:
            tensors[name] = _changed_tensor(tensors[name], rng)
        elif way < 0.86 and tensors:
            del tensors[name]
        elif way < 0.93 and tensors:
            tensors[rng.choice(sorted(tensors))] = tensors[name].clone()
        elif tensors:
            tensors[name + rng.choice(["", ".more", ".exp_avg", "\x1b[31m"])] = tensors.pop(name)
    header.pop("sha256", None)
    digested = json.loads(json.dumps(header))
    with_digest = {**digested, "sha256": files.digest(tensors, digested)} if rng.random() < 0.97 else digested
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    found = save(tensors, {"lunet_fast": json.dumps(with_digest)})
    return found if rng.random() < 0.9 else _lying_offsets(found, rng)


def _lying_offsets(data: bytes, rng: random.Random) -> bytes:
    """The safetensors header itself changed: shapes, dtypes and places that are not those of the data."""
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(changed_json(json.loads(data[8 : 8 + length]), rng)).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def changed_settings(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return changed_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        value = changed_json(value, rng)
    return json.dumps(value).encode()


def changed_journal(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return changed_bytes(data, rng)
    lines = [json.loads(line) for line in data.splitlines()]
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(lines))
        way = rng.random()
        if way < 0.7:
            lines[place] = changed_json(lines[place], rng)
        elif way < 0.8:
            lines[place : place + 1] = []
        elif way < 0.9:
            lines.insert(place, rng.choice(lines))
        else:
            other = rng.randrange(len(lines))
            lines[place], lines[other] = lines[other], lines[place]
        lines = lines or [{}]
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return text[: rng.randrange(len(text))] if rng.random() < 0.1 else text


CELLS = [
    *("", " ", "0", "-1", "1e39", "1e309", "nan", "inf", "1e-400", "x", "é", "\x1b[31m", '"', '""', '"a,b"'),
    *("1" * 400, "0." + "1" * 5000, "1_000", "٣", "0x10", "=1+1", "\x00", "\ufeff1", "1,2", "1\r", "'"),
]


def changed_text(data: bytes, rng: random.Random) -> bytes:
    """Cells, rows and columns of a table of text changed."""
    if rng.random() < 0.2:
        return changed_bytes(data, rng)
    sep = "\t" if b"\t" in data else ","
    rows = [line.split(sep) for line in data.decode().splitlines()]
    for _ in range(rng.choice([1, 1, 2, 5])):
        row = rng.choice(rows)
        way = rng.random()
        if way < 0.5:
            row[rng.randrange(len(row))] = rng.choice(CELLS)
        elif way < 0.65:
            row.append(rng.choice(CELLS))
        elif way < 0.8 and len(row) > 1:
            row.pop()
        elif way < 0.9:
            rows.insert(rng.randrange(len(rows)), list(row))
        else:
            row[:] = row * rng.choice([2, 1000])
    text = rng.choice(["\n", "\n", "\r\n"]).join(sep.join(row) for row in rows)
    return text.encode(rng.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"]), "replace")


def changed_npy(data: bytes, rng: random.Random) -> bytes:
    """Its header: shape, dtype and order; or the bytes."""
    if rng.random() < 0.3:
        return changed_bytes(data, rng)
    length = struct.unpack("<H", data[8:10])[0]
    described = {
        "descr": rng.choice(
            ["<f4", "<f8", ">f8", "<i8", "|u1", "|O", "<U9", "<c16", "|b1", "|V8", "<f2", "zz"]
        ),
        "fortran_order": rng.choice([False, False, True, 1, None]),
        "shape": rng.choice(
            [(6, 2), (12,), (), (0, 2), (6, 0), (2**40, 2), (2**62, 2**62), (-1, 2), (6.0, 2), "x", (3, 2, 2)]
        ),
    }
    text = repr(described) if rng.random() < 0.9 else rng.choice(["", "{", "[" * 10_000, "__import__('os')"])
    header = text.encode() + b"\n"
    return data[:8] + struct.pack("<H", min(len(header), 65535)) + header[:65535] + data[10 + length :]


def changed_idx(data: bytes, rng: random.Random) -> bytes:
    """Its magic number and its sizes; or the bytes."""
    sizes = [
        rng.choice([0, 1, 2, 4, 20, 2**31 - 1, 2**32 - 1]) if rng.random() < 0.5 else n for n in (20, 2, 2)
    ]
    head = bytes([0, 0, rng.choice([8, 8, 8, 9, 13, 255]), rng.choice([3, 3, 1, 0, 255])])
    found = head + struct.pack(">3I", *sizes) + data[16:]
    return found if rng.random() < 0.6 else changed_bytes(data, rng)


def packed(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """The same below gzip, whose bytes may be changed too; now and then of something that unpacks to much."""

    def apply(data: bytes, rng: random.Random) -> bytes:
        inner = change(gzip.decompress(data), rng)
        if rng.random() < 0.1:
            inner += bytes(rng.choice([10**6, 10**7, 10**8]))
        found = gzip.compress(inner, 1)
        return changed_bytes(found, rng) if rng.random() < 0.2 else found

    return apply


def changed_parquet(data: bytes, rng: random.Random) -> bytes:
    """Written anew with columns of other types, or the bytes, those of its footer more often."""
    import pyarrow as pa
    from pyarrow import parquet

    if rng.random() < 0.6:
        start = rng.choice([0, max(0, len(data) - 400)])
        return data[:start] + changed_bytes(data[start:], rng)
    n = rng.choice([0, 1, 12])
    columns: list[Any] = [
        *([1.5] * n, [1] * n, ["x"] * n, [None] * n, [[1.0]] * n, [{"a": 1}] * n, [b"\xff"] * n, [True] * n),
        *([math.nan] * n, [math.inf] * n, [2**63 - 1] * n, [1e308] * n),
    ]
    names = rng.sample(["a", "b", "kind", "\x1b[31m", "", "a b"], 3)
    table = pa.table([pa.array(rng.choice(columns)) for _ in names], names=names)
    sink = io.BytesIO()
    parquet.write_table(table, sink, compression=rng.choice(["none", "snappy", "zstd"]))
    return sink.getvalue()


def table_seeds() -> dict[str, bytes]:
    """By file name, data for a density."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 2))
    text = "a,b,kind\n" + "".join(f"{x:.3f},{y:.3f},k{n % 3}\n" for n, (x, y) in enumerate(values))
    sink = io.BytesIO()
    np.save(sink, values.astype("<f4"))
    pictures = (
        bytes([0, 0, 8, 3]) + struct.pack(">3I", 20, 2, 2) + rng.integers(0, 255, 80, np.uint8).tobytes()
    )
    import pyarrow as pa
    from pyarrow import parquet

    written = io.BytesIO()
    parquet.write_table(pa.table({"a": values[:, 0], "b": values[:, 1], "kind": ["x", "y"] * 6}), written)
    return {
        "t.csv": text.encode(),
        "t.tsv": text.replace(",", "\t").encode(),
        "t.npy": sink.getvalue(),
        "t-idx3-ubyte": pictures,
        "t-idx3-ubyte.gz": gzip.compress(pictures),
        "t.parquet": written.getvalue(),
    }


TABLE_CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "t.csv": changed_text,
    "t.tsv": changed_text,
    "t.npy": changed_npy,
    "t-idx3-ubyte": changed_idx,
    "t-idx3-ubyte.gz": packed(changed_idx),
    "t.parquet": changed_parquet,
}


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
