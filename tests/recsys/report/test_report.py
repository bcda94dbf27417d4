from __future__ import annotations

import struct
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lunet_fast.recsys.report import table_2
from lunet_fast.recsys.report.document import (
    Block,
    Bullets,
    Cell,
    Code,
    Column,
    Curve,
    Details,
    Document,
    Dot,
    Dots,
    Heading,
    Highlight,
    NotMeasured,
    Panel,
    Panels,
    Paragraph,
    Picture,
    Row,
    Section,
    Table,
    Warned,
    from_markdown,
    literal,
)
from lunet_fast.recsys.report.render import markdown, page, spans
from lunet_fast.training.figures import save_loss_figure

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


def document(*blocks: Block) -> Document:
    return Document(
        "Title", "subtitle", [Highlight("1", "what", "beside")], [], [Section("A section", blocks)]
    )


ALL: tuple[Block, ...] = (
    Paragraph("text"),
    Heading("heading"),
    Bullets(["one", "two"]),
    Code("a < b && c"),
    NotMeasured("something", "run --this"),
    Warned("careful"),
    table(),
    Panels(
        "figure", [Panel("loss", [Curve("best", [1.0, 0.5], 0), Curve("paper", [0.9], 1)], ("printed", 0.8))]
    ),
    Dots("changes", [Dot("a", 0.1, 0.01), Dot("b", -5.0, None), Dot("c", 0.0, 0.1)], "left", 0.2),
    Picture(b"\x89PNG", "a picture", "p.png"),
    Details("more", [Paragraph("inside"), table()]),
)


class TestPage:
    def test_every_part_is_well_formed(self) -> None:
        read = checked(page(document(*ALL)))
        for text in (
            "text",
            "heading",
            "two",
            "a < b && c",
            "run --this",
            "careful",
            "0.9",
            "inside",
            "a note",
        ):
            assert text in read.text
        assert sum(tag == "svg" for tag, _ in read.tags) == 2

    def test_what_comes_from_data_is_shown_as_it_is(self) -> None:
        said = literal(NASTY)
        shown = [
            Paragraph(said),
            Heading(said),
            Bullets([said]),
            Code(NASTY),
            NotMeasured(said, NASTY),
            Warned(said),
        ]
        shown += [Table(said, [Column(said)], [Row([Cell(said)])], said), Details(said, [Paragraph(said)])]
        shown += [Panels(said, [Panel(said, [Curve(NASTY, [1.0], 0)])]), Picture(b"", NASTY, "p.png")]
        shown += [Dots(said, [Dot(NASTY, 0.1, None)], "left", 1.0)]
        read = checked(page(Document(said, said, [Highlight(said, said, said)], [], [Section(said, shown)])))
        assert read.text.count(NASTY) >= 20

    def test_marks(self) -> None:
        assert spans("a **b `c<`** \\*d\\*") == "a <strong>b <code>c&lt;</code></strong> *d*"
        assert unescape(spans(literal(NASTY))) == NASTY

    @pytest.mark.parametrize("values", [[], [1.0], [0.5, 0.5], [3.0, 1e-9], list(range(500))])
    def test_curves_of_any_kind(self, values: list[float]) -> None:
        text = page(document(Panels("f", [Panel("p", [Curve("c", values, 0)])])))
        assert "nan" not in checked(text).text
        assert "inf" not in text[text.index("<svg") :]


class TestMarkdown:
    def test_every_part(self) -> None:
        text = markdown(document(*ALL))
        for part in (
            "# Title",
            "## A section",
            "- two",
            "run `run --this`",
            "> careful",
            "![a picture](p.png)",
        ):
            assert part in text
        assert "| name | MSE | g: HR |" in text

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


class TestFromMarkdown:
    def test_blocks(self, tmp_path: Path) -> None:
        (tmp_path / "p.png").write_bytes(b"png")
        text = (
            "# Title\n\nSome *emphasis* and [a link](http://x).\n\n## Part\n- one\n- two\n  more\n\n"
            "| a | n |\n|---|---|\n| |x| over |y| | 1.5e-3 |\n| b | **2** |\n\n![seen](p.png)\n\n"
            "![other](../../etc/q.png)\n\n```\ncode\n```\n"
        )
        paragraph, heading, bullets, found, picture, code = from_markdown(text, tmp_path)
        assert paragraph == Paragraph("Some emphasis and a link.")
        assert heading == Heading("Part")
        assert bullets == Bullets(["one", "two more"])
        assert isinstance(found, Table)
        assert [column.number for column in found.columns] == [False, True]
        assert [[cell.text for cell in row.cells] for row in found.rows] == [
            ["|x| over |y|", "1.5e-3"],
            ["b", "**2**"],
        ]
        assert picture == Picture(b"png", "seen", "p.png")
        assert code == Code("code")
