"""Whatever bytes of a file are changed, it is read, or refused with a DataError and by its name."""

from __future__ import annotations

import gzip
import io
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lunet_fast.density import data
from lunet_fast.density.data import DataError
from lunet_fast.training.outside import LIMIT_VARIABLE
from tests.density.test_data import idx

TRIES = 150
PIECES = (b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"1e999,,\n", b'"', b"\n", b"\xed\xb0\x80")


def whole(name: str) -> bytes:
    """A sound file of this name."""
    numbers = np.random.default_rng(0).normal(size=(20, 3))
    frame = pd.DataFrame(numbers, columns=list("abc"))
    if "idx3" in name:
        content = idx(np.zeros((20, 2, 2)))
        return gzip.compress(content) if name.endswith(".gz") else content
    if name.endswith(".csv"):
        return frame.to_csv(index=False, quoting=1 if "quoted" in name else 0).encode()
    stream = io.BytesIO()
    if name.endswith(".npy"):
        np.save(stream, numbers)
    elif name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
        frame.to_parquet(stream)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(stream, "w") as file:
            for part in ("train", "validation", "test"):
                file.create_dataset(part, data=numbers.astype(np.float32), compression="gzip")
    return stream.getvalue()


def spoilt(content: bytes, draw: random.Random) -> bytes:
    """The content with one to four changes: a byte, a piece over or between, the rest cut off."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(found) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            found[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            piece = draw.choice(PIECES)
            found[place : place + len(piece)] = piece
        elif kind == 2:
            found[place:place] = draw.choice(PIECES)
        else:
            del found[max(place, 1) :]
    return bytes(found)


@pytest.mark.parametrize(
    "name",
    ["a.npy", "a.csv", "quoted.csv", "a.parquet", "x-idx3-ubyte", "x-idx3-ubyte.gz", "BSDS300.hdf5"],
)
def test_changed_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, str(1 << 24))
    sound, path, draw, refused, read = whole(name), tmp_path / name, random.Random(0), 0, 0
    for _ in range(TRIES):
        path.write_bytes(spoilt(sound, draw))
        try:
            rows = data.read("bsds300", data_dir=tmp_path) if name == "BSDS300.hdf5" else data.read(str(path))
        except DataError as error:
            refused += str(path) in str(error)
        else:
            read += 1
            assert bool(rows.values.isfinite().all())
    assert refused + read == TRIES
    assert refused > TRIES // 10
