"""Files that nobody would write: each ends in ratings, or in our error that names the file.

``tests/fuzz/ratings.py`` does the same with more inputs, in processes of bounded time and memory.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lunet_fast.recsys.data import movielens
from tests.fuzz import inputs
from tests.fuzz.inputs import CASES, CELLS
from tests.fuzz.reader import Failure, Reader

pytest.importorskip("pyarrow")

KINDS = ["ratings", "pairs", "users", "like", "archive"]
SEEDS = inputs.seed_inputs(KINDS)
QUICK = settings(max_examples=500, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=20_000, suppress_health_check=list(HealthCheck))
IN_TEXT = [n for n, case in enumerate(CASES) if case.form == "text"]
IN_PARQUET = [n for n, case in enumerate(CASES) if case.form == "parquet"]

cells = (
    st.sampled_from(CELLS)
    | st.integers().map(str)
    | st.floats().map(repr)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.datetimes().map(str)
)
lines = st.lists(st.lists(cells, min_size=3, max_size=5), max_size=6)


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """A header, mostly the right one, and rows of anything, in any text format or as Parquet."""
    names = ["user", "item", "rating", "timestamp"]
    header = draw(st.just(names) | st.permutations(names) | st.lists(cells, min_size=1, max_size=5))
    body = draw(lines)
    if draw(st.booleans()):  # rows of the right number of fields, and the two ids right
        body = [[f"u{n}", f"i{n}", *row, "0"][: len(header)] for n, row in enumerate(body)]
    number = draw(st.sampled_from(IN_TEXT + IN_PARQUET))
    case = CASES[number]
    if case.form == "text":
        end = draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
        data = end.join(case.sep.join(row) for row in [header, *body]).encode("utf-8", "surrogatepass")
    else:
        columns = {name: [row[k] for row in body if k < len(row)] for k, name in enumerate(header)}
        frame = pd.DataFrame({name: pd.Series(column, dtype=object) for name, column in columns.items()})
        stream = io.BytesIO()
        frame.to_parquet(stream)
        data = stream.getvalue()
    return bytes([number]) + (gzip.compress(data) if case.name.endswith(".gz") else data)


@st.composite
def changes(draw: st.DrawFn) -> bytes:
    """A good file with a few changes that know its format."""
    start = draw(st.sampled_from(SEEDS))
    return inputs.changed(start, random.Random(draw(st.integers(0, 2**32))))


raw = st.builds(lambda number, data: bytes([number]) + data, st.sampled_from(range(len(CASES))), st.binary())
anything = tables() | changes() | raw.filter(lambda data: CASES[data[0]].kind in KINDS)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    before = movielens.DATASETS["ml-1m"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUNET_FAST_MAX_BYTES", str(64 << 20))
        yield Reader(tmp_path_factory.mktemp("fuzz"))
    movielens.DATASETS["ml-1m"] = before


@given(anything)
@QUICK
def test_every_file_ends_in_a_result_or_our_error(reader: Reader, data: bytes) -> None:
    reader.ending(data)


@pytest.mark.slow
@given(anything)
@LONG
def test_every_file_ends_in_a_result_or_our_error_thoroughly(reader: Reader, data: bytes) -> None:
    reader.ending(data)


@pytest.mark.parametrize("data", SEEDS, ids=lambda data: CASES[data[0]].name)
def test_good_files_are_read(reader: Reader, data: bytes) -> None:
    """Otherwise all of the above would end in errors alone."""
    assert reader.ending(data) == "result"


def test_the_judge_refuses_other_errors(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, message in (
        (KeyError("x"), "KeyError"),
        (ValueError("x"), "ValueError"),
        (reader.ratings.RatingFileError("x"), "does not name"),
        (reader.ratings.RatingFileError(f"{reader.folder / 'r.csv'}: \x1b"), "not fit for a terminal"),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(reader.ratings, "read_ratings", fail)
        with pytest.raises(Failure, match=message):
            reader.ending(SEEDS[0])


DAMAGES = """
import io, sys
from pathlib import Path
from lunet_fast.recsys.data.ratings import RatingFileError, read_ratings

file, data = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes()
read = 0
for at in range(4, len(data) - 4):
    file.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
    try:
        read_ratings(file)
        read += 1
    except RatingFileError as error:
        assert str(error).startswith(str(file)), error
print(len(data) - 8, read)
"""


def test_every_damaged_byte_of_a_parquet_file(tmp_path: Path) -> None:
    """In a process of its own: of some of these pyarrow 26's description of a column ends the process."""
    file = tmp_path / "r.parquet"
    file.write_bytes(inputs.parquet_file())
    done = subprocess.run(
        [sys.executable, "-c", DAMAGES, str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    tried, read = map(int, done.stdout.split())
    assert tried > 1000
    assert 0 < read < tried / 2


def test_the_program(tmp_path: Path) -> None:
    """A small run: it counts all inputs, and finds and keeps what is wrong."""
    out, keep = tmp_path / "out.json", tmp_path / "keep"
    command = [sys.executable, "tests/fuzz/ratings.py", "--inputs", "60", "--archives", "20", "--models", "0"]
    command += ["--no-guide", "--out", str(out), "--keep", str(keep)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert (report["inputs"], report["failed"], report["guided_by"]) == (80, 0, None)
    assert sum(report["archives"]["endings"]["archive"].values()) == 20
    assert not keep.exists()
