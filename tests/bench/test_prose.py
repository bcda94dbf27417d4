"""Measured numbers in the sentences of README and docs/: which count, and that each has its mark."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import prose

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_measured_number_has_a_mark(page: Path) -> None:
    assert not prose.unmarked(page.read_text(), prose.NOT_MEASURED.get(name_of(page), {}))


def test_what_is_not_measured_is_on_a_page() -> None:
    assert prose.NOT_MEASURED.keys() <= {name_of(page) for page in PAGES}


@pytest.mark.parametrize(
    "sentence",
    [
        "A step takes 6.17 ms.",
        "It is 7 times faster, and **3** times smaller.",
        "It is six times faster.",
        "A twenty-fold gain.",
        "It takes 12 s, or 3 µs a row, of 8\nminutes.",
        "It is 2× faster, or 2x.",
        "It holds 40 MB of 2 GiB.",
        "An error of 1e-7, or of 10⁻⁷.",
        "The MSE falls to .7738.",
        "The MSE changes by −0.0076 ± 0.0011.",
        "It wins by 3 % of 1,245 users.",
        "32 million ratings take two hours.",
        "| flow | bits |\n|---|---|\n| LU-Net | 1.9062 |",
        "- a list of 0.5 bits",
        "![a picture of 2.05 bits](picture.png)",
        "With f = identity it is 0.7965.",
        "An error below 0.05 in equation (2.11).",
    ],
)
def test_a_measured_number_without_a_mark_is_found(sentence: str) -> None:
    assert prose.unmarked(f"# Title\n\nSome words. {sentence}\n\n```sh\ncode\n```\n")


@pytest.mark.parametrize(
    "sentence",
    [
        "Equations (2.1) and (2.14) of 2026, arXiv [LU-Net](https://arxiv.org/abs/2302.10524).",
        "ML-100K, HR@10, float32, SHA-256, Apache-2.0, LU-Net M, 1-norm and 2-D data.",
        "PyTorch 2.11 or later, Python 3.10 to 3.13.",
        "O(D²) for D = 1,024, α = 0.1 and B ≥ 256; 2·N·D² a layer.",
        "8 × 8 pixels, 70,000 × 784 numbers, 50 epochs, digits 0 to 4 and 100 candidates.",
        "`--rate 0.02`, ``a `0.5` ``, $x = 0.5$ and\n\n$$\nx = 0.25\n$$\n",
        "```python\nx = 0.5  # 3 ms\n```",
        "<!-- a-table -->\n\n| 0.5 ms |\n\n<!-- end a-table -->",
        "<!-- 0.5 ms -->A step takes <!--=step-->0.5<!--=--> ms and <!--=more-->2 MB<!--=-->.",
        "Thousands of rows, an eighth of the memory, one minute.",
    ],
)
def test_what_is_no_measurement_needs_none(sentence: str) -> None:
    assert not prose.unmarked(f"Some words. {sentence}" if sentence[0] not in "`<" else sentence)


def test_exceptions_count_where_they_stand() -> None:
    text = "The split has 20 % of\nthe ratings. It is 20 % faster."
    assert len(prose.unmarked(text, {"has 20 % of the ratings": "the split"})) == 1
    with pytest.raises(ValueError, match="'30 % of' is no longer there"):
        prose.unmarked(text, {"30 % of": "the split"})


FIGURES = {"step-ms": lambda: "6.2", "gain": lambda: "+0.1 ± 0.2"}


class TestMarks:
    def test_are_filled(self) -> None:
        text = "takes <!--=step-ms-->?<!--=--> ms,\n| a | <!--=gain-->9<!--=--> |\n"
        new = "takes <!--=step-ms-->6.2<!--=--> ms,\n| a | <!--=gain-->+0.1 ± 0.2<!--=--> |\n"
        assert prose.filled(text, FIGURES) == new
        assert prose.filled(new, FIGURES) == new
        assert not prose.unmarked(new)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("takes <!--=step-->1<!--=--> ms", "no figure is called step"),
            ("takes <!--=step-ms-->1 ms", "on the same line"),
            ("takes <!--=step-ms-->1\n<!--=--> ms", "begins a line|on the same line"),
            ("takes 1<!--=--> ms", "on the same line"),
            ("takes <!--=Step MS-->1<!--=--> ms", "on the same line"),
            ("takes\n<!--=step-ms-->1<!--=--> ms", "begins a line"),
            ("- <!--=step-ms-->1<!--=--> ms", "begins a line"),
            ("1. <!--=step-ms-->1<!--=--> ms", "begins a line"),
        ],
    )
    def test_that_cannot_be_filled(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prose.filled(text, FIGURES)
