from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunet_fast.cli.output import (
    given_text,
    prepare_out,
    printable,
    shortest,
    write_csv,
    write_json,
    write_json_lines,
    write_out,
)
from lunet_fast.recsys.data.spreadsheet import as_it_was, spreadsheet_safe


class TestSpreadsheetSafe:
    @pytest.mark.parametrize(
        "text",
        [
            *(
                "=1+1",
                "+A1",
                "-A1",
                "@SUM(A1)",
                "\tx",
                "\rx",
                "\nx",
                "=",
                "-",
                "+",
                "-5+cmd|' /C calc'!A0",
                "＝1",
            ),
            *("'=1", "''-x", " =1", "\u00a0+x", "-1e5", "+1;2", "'-7"),
        ],
    )
    def test_formulas_get_an_apostrophe(self, text: str) -> None:
        assert spreadsheet_safe(text) == f"'{text}"

    @pytest.mark.parametrize(
        "value", ["", "Alien", "a=b", "'", "'tis", "-7", "+5", "-1.5", "007", -7, -1.5, 3, None]
    )
    def test_other_values_and_numbers_stay(self, value: object) -> None:
        assert spreadsheet_safe(value) is value

    @given(st.text("'=+-@\t\r\n 1a＝") | st.text())
    @settings(max_examples=500)
    def test_any_text_comes_back(self, text: str) -> None:
        cell = spreadsheet_safe(text)
        assert as_it_was(cell) == text
        assert cell in (text, f"'{text}")
        assert not cell.lstrip().startswith(tuple("=+-@＝＋－＠")) or cell.strip("+-.0123456789") == ""


def test_texts_of_the_command_line_are_utf8() -> None:
    assert given_text("--user", " ann ") == "ann"
    with pytest.raises(ValueError, match=r"--user a\\udcff: is not UTF-8"):
        given_text("--user", "a\udcff")


HEADER = ("user", "title")
ROWS: list[tuple[object, object]] = [
    (1, "Léon, uncut"),
    ("a\rb", 'say "x"'),
    ("two\nlines", None),
    (-3, "=1"),
    ("a\r\n", "b"),
]


def test_csv_comes_back_whole() -> None:
    stream = io.StringIO(newline="")
    write_csv(stream, HEADER, ROWS)
    text = stream.getvalue()
    assert text.startswith('user,title\n1,"Léon, uncut"\n')
    back = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    expected = [["1", "Léon, uncut"], ["a\rb", 'say "x"'], ["two\nlines", ""], ["-3", "'=1"], ["a\r\n", "b"]]
    assert back == [list(HEADER), *expected]


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS])
def test_json_comes_back_whole(rows: list[tuple[object, object]]) -> None:
    objects = [dict(zip(HEADER, row, strict=True)) for row in rows]
    stream, lines = io.StringIO(), io.StringIO()
    write_json(stream, HEADER, rows)
    assert json.loads(stream.getvalue()) == objects
    write_json_lines(lines, HEADER, rows)
    assert [json.loads(line) for line in lines.getvalue().splitlines()] == objects


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[31mb\nü") == "a\\x1b[31mb\\nü"


def test_shortest_is_the_same_float32() -> None:
    for value in np.linspace(0.1, 5, 50, dtype=np.float32):
        assert np.float32(shortest(value)) == value
    assert shortest(np.float32(4.1)) == 4.1


class TestOut:
    def test_a_failure_leaves_the_file_that_was_there(self, tmp_path: Path) -> None:
        out = tmp_path / "out.csv"
        out.write_text("before")

        def rows() -> object:
            yield (1, "a")
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            write_out(out, lambda stream: write_csv(stream, HEADER, rows()))  # type: ignore[arg-type]
        assert out.read_text() == "before"
        assert list(tmp_path.iterdir()) == [out]

    def test_folders_are_made(self, tmp_path: Path) -> None:
        out = tmp_path / "a" / "b" / "out.csv"
        prepare_out(out)
        write_out(out, lambda stream: write_csv(stream, HEADER, ROWS[:1]))
        assert out.read_text(encoding="utf-8") == 'user,title\n1,"Léon, uncut"\n'

    def test_refusals_name_the_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for out, message in (
            (tmp_path, "is a folder"),
            (Path("/dev/null"), "is not a plain file"),
            (tmp_path / "file" / "out.csv", "cannot write there"),
        ):
            with pytest.raises(ValueError, match=f"--out {out}: {message}"):
                prepare_out(out)
