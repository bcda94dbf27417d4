"""Figures of a report, drawn by matplotlib as SVG elements of a page."""

from __future__ import annotations

import io
import re
from typing import Any

from markupsafe import escape

from lunet_fast.recsys.report.document import Dots, Panel, signed
from lunet_fast.training.figures import BLUE, GREY, INK, ORANGE, TEAL, label_ends, new_figure, plain

LOOKS = ({"color": BLUE}, {"color": ORANGE, "dashes": (5, 2)}, {"color": TEAL, "dashes": (1.5, 1.5)})
"""Colour and dashes of a curve, by its look."""


def lines(panel: Panel, name: str) -> str:
    """A panel's curves over epochs, labelled at their ends; ``name`` makes ids unique on a page."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(5.0, 3.1)
    axes = figure.add_subplot()
    labels, told = [], []
    for curve in panel.curves:
        if curve.values:
            epochs = range(1, len(curve.values) + 1)
            axes.plot(epochs, curve.values, linewidth=1.8, **LOOKS[curve.look])
            axes.plot(epochs[-1], curve.values[-1], "o", markersize=4, color=LOOKS[curve.look]["color"])
            label = f"{curve.name} {curve.values[-1]:.3f}"
            labels.append((float(epochs[-1]), curve.values[-1], label, str(LOOKS[curve.look]["color"])))
            told.append(f"{curve.name}: {curve.values[0]:.3f} at first, {curve.values[-1]:.3f} at the end")
    longest = max((x for x, *_ in labels), default=1.0)
    # Room at the right for the labels.
    axes.set_xlim(1 - 0.02 * longest, longest + 0.34 * max(longest - 1, 1))
    if panel.level:
        called, level = panel.level
        axes.axhline(level, color=INK, linewidth=1, linestyle=":")
        labels.append((axes.get_xlim()[1] - 0.3 * longest, level, f"{called} {level:.4f}", INK))
        told.append(f"{called}: {level:.4f}")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.margins(y=0.08)
    plain(axes, grid="y")
    figure.draw_without_rendering()
    label_ends(axes, labels)
    return _svg(figure, f"{panel.title}. Over {longest:g} epochs. {'; '.join(told)}", name)


def dots(figure: Dots, name: str) -> str:
    """Changes around zero with their standard errors, a line each."""
    drawn = new_figure(7.6, 0.9 + 0.24 * len(figure.dots))
    axes = drawn.add_subplot()
    gain, loss = ("left", "right") if figure.better == "left" else ("right", "left")
    for place, dot in enumerate(figure.dots):
        sure = dot.error is None or abs(dot.change) > 2 * dot.error
        better = (dot.change < 0) == (figure.better == "left")
        colour = (TEAL if better else ORANGE) if sure else GREY
        if abs(dot.change) > figure.limit:
            edge = figure.limit if dot.change > 0 else -figure.limit
            axes.plot(edge, place, ">" if edge > 0 else "<", color=colour, markersize=6)
            side = {"xytext": (-7, 0), "ha": "right"} if edge > 0 else {"xytext": (7, 0), "ha": "left"}
            value = signed(dot.change, 3)
            axes.annotate(value, (edge, place), textcoords="offset points", va="center", fontsize=8, **side)
            continue
        style: Any = {"fmt": "o", "color": colour, "markersize": 5, "elinewidth": 1.5}
        axes.errorbar(dot.change, place, xerr=dot.error, markerfacecolor=colour if sure else "white", **style)
    axes.axvline(0, color=GREY, linewidth=1, zorder=0)
    axes.set_xlim(-1.05 * figure.limit, 1.05 * figure.limit)
    axes.set_ylim(len(figure.dots) - 0.5, -0.5)
    axes.set_yticks(range(len(figure.dots)))
    axes.set_yticklabels([dot.name for dot in figure.dots], fontsize=8, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    for side_, word in ((gain, "better"), (loss, "worse")):
        left = side_ == "left"
        text = f"← {word}" if left else f"{word} →"
        axes.set_title(text, loc=side_, fontsize=8, color=GREY)
    plain(axes, grid="x")
    seen = "; ".join(f"{dot.name}: {signed(dot.change)}" for dot in figure.dots)
    return _svg(drawn, f"{figure.caption} {seen}", name)


def _svg(figure: Any, seen: str, name: str) -> str:
    """The figure as an element; its ids, of which a page has many like it, start with ``name``."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)

    def renamed(tag: re.Match[str]) -> str:
        return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", tag[0])

    text = re.sub(r"<[^<>]+>", renamed, text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(seen)}" ', 1)
