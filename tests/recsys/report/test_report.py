from __future__ import annotations

import struct
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lunet_fast.recsys.report import table_2
from lunet_fast.recsys.report.document import (
    MARK,
    Cell,
    Code,
    Column,
    Curve,
    Details,
    Document,
    Dot,
    Dots,
    Highlight,
    Panel,
    Panels,
    Part,
    Row,
    Table,
    literal,
)
from lunet_fast.recsys.report.render import markdown, page, spans
from lunet_fast.training.figures import apart, save_loss_figure

METRICS = {
    "dataset": "ml-100k",
    "recipe": "best",
    "test_mse": 0.80004,
    "reconstruction_error": 1.26e-11,
    "mlp_test_mse": 0.9,
    "mlp_reconstruction_error": 0.01234,
}
PAPER = [
    ("paper: classic MLP", "ML-100K", "0.9200", "0.0050"),
    ("paper: invertible model", "ML-100K", "0.8880", "0.0000"),
    ("paper: invertible model", "ML-1M", "0.7955", "0.0000"),
]


def test_table_sets_ours_beside_the_papers() -> None:
    assert table_2(METRICS) == [
        *PAPER,
        ("ours: classic MLP", "ML-100K", "0.9000", "0.0123"),
        ("ours: LU-Net, recipe best", "ML-100K", "0.8000", "1.3e-11"),
    ]


def test_table_without_control_or_test_part() -> None:
    own = {"dataset": "mine", "recipe": "paper", "test_mse": 1.0, "reconstruction_error": 0.0}
    assert table_2(own) == [*PAPER, ("ours: LU-Net, recipe paper", "mine", "1.0000", "0.0e+00")]
    assert table_2({**own, "network": "identity"})[-1][0] == "ours: f = identity, recipe paper"
    assert table_2({"dataset": "mine"}) == PAPER


@pytest.mark.parametrize(
    ("train", "test"), [([1.2, 0.9, 0.8], [1.1, 0.95, 0.93]), ([1.2], [1.1]), ([2.0] * 60, [])]
)
def test_figure(tmp_path: Path, train: list[float], test: list[float]) -> None:
    path = tmp_path / "loss.png"
    save_loss_figure(path, "ML-100K", train, test)
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert (data[:8], width, height) == (b"\x89PNG\r\n\x1a\n", 960, 600)
    pixels = imread(path)[..., :3]
    blue, orange = (
        int((np.abs(pixels - np.array(colour) / 255).max(-1) < 0.02).sum())
        for colour in ((0x1F, 0x5F, 0x99), (0xD1, 0x66, 0x2B))
    )
    assert blue > 100
    assert (orange > 100) == bool(test)
    assert [child.name for child in tmp_path.iterdir()] == ["loss.png"]
    save_loss_figure(tmp_path / "again.png", "ML-100K", train, test)
    assert (tmp_path / "again.png").read_bytes() == data


# The report -------------------------------------------------------------------------------------------------

NASTY = '<script>alert(1)</script> & "quotes" | `code` **bold** [a](http://x) \\ _u_'
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Fails on tags that do not match; collects tags, texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data


def checked(text: str) -> Page:
    """A page that is well-formed, stands by itself, and can be read aloud."""
    read = Page(text)
    names = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(names) == len(set(names))
    for tag, attrs in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attrs)
        assert tag != "img" or str(attrs["src"]).startswith("data:image/png;base64,")
        assert tag == "img" or "src" not in attrs
        assert (attrs.get("href") or "#")[0] == "#"
        if attrs.get("href"):
            assert str(attrs["href"])[1:] in names
        for name in str(attrs.get("aria-labelledby") or "").split():
            assert name in names
        if tag == "img":
            assert attrs["alt"]
        if tag == "svg":
            assert attrs["role"] == "img"
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    return read


def table() -> Table:
    columns = [
        Column("name", number=False),
        Column("MSE", best="lowest"),
        Column("HR", best="highest", group="g"),
    ]
    rows = [
        Row([Cell("a"), Cell("0.5000 ± 0.1000", 0.50001), Cell("0.1", 0.1)]),
        Row([Cell("b"), Cell("0.5000", 0.5), Cell("0.9")], ours=True),
        Row([Cell("c"), Cell("0.7000", 0.7), Cell("0.2", 0.2)]),
    ]
    return Table("A table", columns, rows, "a note")


def document(*parts: Part, body: str = "", pictures: Path | None = None) -> Document:
    body = "\n\n".join(["## A section", body, *(MARK.format(n) for n in range(len(parts)))])
    return Document("Title", "subtitle", [Highlight("1", "what", "beside")], body, parts, pictures)


BODY = """text

### heading

- one
- two

> careful, run `run --this`

![a picture](p.png)

| name | n |
|---|---|
| x < y | 1.5e-3 |
"""
PARTS: tuple[Part, ...] = (
    Code("a < b && c"),
    table(),
    Panels(
        "figure", [Panel("loss", [Curve("best", [1.0, 0.5], 0), Curve("paper", [0.9], 1)], ("printed", 0.8))]
    ),
    Dots("changes", [Dot("a", 0.1, 0.01), Dot("b", -5.0, None), Dot("c", 0.0, 0.1)], "left", 0.2),
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "p.png").write_bytes(b"\x89PNG")
    return tmp_path


class TestPage:
    def test_every_part_is_well_formed(self, pictures: Path) -> None:
        details = Details("more", "inside\n\n" + MARK.format(1))
        read = checked(page(document(*PARTS, details, body=BODY, pictures=pictures)))
        for text in (
            *("text", "heading", "two", "a < b && c", "run --this", "careful", "0.9", "inside", "a note"),
            *("more", "x < y", "A section"),
        ):
            assert text in read.text
        assert MARK[0] not in read.text
        assert sum(tag == "svg" for tag, _ in read.tags) == 2
        assert [attrs["alt"] for tag, attrs in read.tags if tag == "img"] == ["a picture"]

    def test_what_comes_from_data_is_shown_as_it_is(self, pictures: Path) -> None:
        said = literal(NASTY)
        shown: list[Part] = [
            Code(NASTY),
            Table(said, [Column(said, group=said)], [Row([Cell(said)])], said),
            Details(said, said),
            Panels(said, [Panel(said, [Curve(NASTY, [1.0], 0)])]),
            Dots(said, [Dot(NASTY, 0.1, None)], "left", 1.0),
        ]
        body = (
            f"## {said}\n\n{said}\n\n### {said}\n\n- {said}\n\n> {said}\n\n![{said}](p.png)\n\n"
            f"| {said} | {said} |\n|---|---|\n| {said} | **{said}** |\n\n"
        )
        marks = "\n\n".join(MARK.format(n) for n in range(len(shown)))
        highlights = [Highlight(said, said, said)]
        read = checked(page(Document(said, said, highlights, body + marks, shown, pictures)))
        assert read.text.count(NASTY) >= 24
        assert [attrs["alt"] for tag, attrs in read.tags if tag == "img"] == [NASTY]

    @pytest.mark.parametrize(
        "body",
        [
            NASTY,
            "<script>alert(1)</script>",
            "<img src=x onerror=alert(1)>",
            "[a](javascript:alert(1)) <http://x> [b](http://x)",
            "![p](http://x/q.png) ![p](../../etc/passwd) ![p](gone.png)",
            "<div onclick='x'>\n\n## <b onclick='x'>",
            "&lt;script&gt; &#60;script&#62;",
        ],
    )
    def test_no_html_of_a_quoted_file_gets_through(self, body: str, pictures: Path) -> None:
        checked(page(document(body=body, pictures=pictures)))

    def test_marks_of_data_are_none(self) -> None:
        assert literal(f"a{MARK.format(0)}b") == "a0b"

    def test_columns_of_figures_stand_at_the_right(self) -> None:
        body = "| name | n | words |\n|---|---|---|\n| a | **1.5e-3** ± 0.1 | 2 |\n| b | 12 % | two |\n"
        read = checked(page(document(body=body)))
        kinds = [attrs.get("class") for tag, attrs in read.tags if tag in ("th", "td")]
        assert kinds == [None, "n", None] * 3

    def test_marks(self) -> None:
        assert spans("a **b `c<`** \\*d\\*") == "a <strong>b <code>c&lt;</code></strong> *d*"
        assert unescape(spans(literal(NASTY))) == NASTY

    @pytest.mark.parametrize("values", [[], [1.0], [0.5, 0.5], [3.0, 1e-9], list(range(500))])
    def test_curves_of_any_kind(self, values: list[float]) -> None:
        text = page(document(Panels("f", [Panel("p", [Curve("c", values, 0)])])))
        assert "nan" not in checked(text).text
        assert "inf" not in text[text.index("<svg") :]

    @pytest.mark.parametrize("wanted", [[0.5], [0.5, 0.5, 0.5], [0.0, 1.0], [0.9, 1.0, 0.95, 0.2]])
    def test_labels_keep_apart(self, wanted: list[float]) -> None:
        found = apart(wanted, 0.1, 0.0, 1.0)
        order = sorted(range(len(wanted)), key=lambda n: wanted[n])
        assert all(found[b] - found[a] >= 0.1 - 1e-9 for a, b in pairwise(order))
        assert all(-1e-9 <= place <= 1 + 1e-9 for place in found)


class TestMarkdown:
    def test_every_part(self) -> None:
        text = markdown(document(*PARTS, Details("more", "inside"), body=BODY))
        for part in (
            *("# Title", "## A section", "- two", "run `run --this`", "> careful", "![a picture](p.png)"),
            *("1. [A section](#a-section)", "```\na < b && c\n```", "**more**\n\ninside"),
        ):
            assert part in text
        assert "| name | MSE | g: HR |" in text
        assert MARK[0] not in text

    def test_the_best_is_bold(self) -> None:
        # Equal as printed is equal, and a cell without a value does not take part.
        rows = markdown(document(table())).splitlines()
        assert "| a | **0.5000 ± 0.1000** | 0.1 |" in rows
        assert "| b | **0.5000** | 0.9 |" in rows
        assert "| c | 0.7000 | **0.2** |" in rows

    def test_bars_in_cells(self) -> None:
        text = markdown(document(Table("", [Column("|x|", number=False)], [Row([Cell(literal("a|b"))])])))
        assert "| \\|x\\| |" in text
        assert "| a\\|b |" in text

    def test_code_with_fences(self) -> None:
        assert "````\n```\n````" in markdown(document(Code("```")))
