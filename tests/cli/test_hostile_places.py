"""What a folder or a file holds is not run, and reaches a terminal as text."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress as Bars
from rich.table import Table

from lunet_fast.cli.output import FigureOutput, Terminal, fail, harmless
from lunet_fast.recsys.data.archives import Unavailable
from lunet_fast.recsys.data.datasets import Wheel
from lunet_fast.recsys.data.fetching import pip_download
from lunet_fast.recsys.data.ratings import from_frame
from lunet_fast.recsys.evaluation import compare
from tests.recsys.synthetic import latent_frame

ESCAPES = "\x1b[31mred\x1b]0;title\x07 \x9b2J back\b \rover"
MARKUP = "[bold red]x[/] [link=http://evil]y[/link] :smile: [/nothing]"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with modules of the names that programs import; the file that one of them makes."""
    mark = tmp_path / "executed"
    place = tmp_path / "downloads"
    place.mkdir()
    code = f"open({str(mark)!r}, 'w').close()\nraise SystemExit('hostile')\n"
    for name in ("json", "pickle", "numpy", "pandas", "pip", "runpy", "lunet_fast"):
        (place / f"{name}.py").write_text(code)
    monkeypatch.chdir(place)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return mark


def test_compare_runs_nothing_of_the_current_folder(hostile: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "ratings.pickle"
    data.parent.mkdir()
    data.write_bytes(pickle.dumps(from_frame(latent_frame(9, 7, 40), scale=(1, 5))))
    outcome = compare._in_a_process(data, "biases", 0, "leave-one-out", "cpu")
    assert not hostile.exists()
    assert outcome["test_rmse"] > 0


def test_fetching_a_wheel_runs_nothing_of_the_current_folder(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    wheel = Wheel("no-such-package==1", "no_such_package-1-py3-none-any.whl", "0" * 64, "", {})
    with pytest.raises(Unavailable, match="pip download failed"):
        pip_download(wheel)
    assert not hostile.exists()


def test_the_folder_would_have_been_run(hostile: Path) -> None:
    import subprocess

    subprocess.run([sys.executable, "-m", "pip", "--version"], check=False, capture_output=True)
    assert hostile.exists(), "the trap does nothing, so the tests say nothing"


@given(st.text(st.characters(codec=None)))
def test_harmless_text_has_no_control_character(text: str) -> None:
    shown = harmless(text)
    assert all(c == "\n" or c.isprintable() for c in shown)
    assert shown.count("\n") == text.count("\n")
    if all(c == "\n" or c.isprintable() for c in text):
        assert shown == text


def test_messages_reach_the_terminal_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    with pytest.raises(typer.Exit):
        fail(ValueError(f"{ESCAPES}: two\nlines"), 2)
    output = FigureOutput()
    output.note(ESCAPES)
    output.line(ESCAPES)
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert "red" in text
        assert all(c == "\n" or c.isprintable() for c in text)


@pytest.mark.parametrize("text", [ESCAPES, MARKUP])
def test_tables_and_prints_take_neither_escapes_nor_markup(text: str) -> None:
    file = io.StringIO()
    terminal = Terminal(file=file, force_terminal=True, color_system=None, width=300)
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    terminal.print(table)
    terminal.print(text, highlight=False)
    shown = file.getvalue()
    for control in ("\x1b[31m", "\x1b]", "\x07", "\x9b", "\b", "\r"):
        assert control not in shown
    assert shown.count(harmless(text)) == 5


def test_bars_too() -> None:
    from lunet_fast.cli import progress

    file = io.StringIO()
    made = Terminal(file=file, force_terminal=True, width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "Terminal", lambda **_: made)
        with progress.counted(2, "files") as told:
            told(1, ESCAPES)
            told(1, MARKUP)
    assert "\x1b]0;" not in file.getvalue()
    assert "\x07" not in file.getvalue()
    assert isinstance(Bars(console=made).console, Terminal)
