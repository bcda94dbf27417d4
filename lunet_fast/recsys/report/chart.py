"""Pictures of a report as SVG elements. Their colours are the page's: classes, not values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lunet_fast.recsys.report.document import Dots, Panel, signed

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 112, 14, 40
LABEL = 14
"""Least distance of two labels, in pixels."""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from the last at or below ``low`` to the first at or above ``high``, two or more."""
    if high == low:
        low, high = low - 0.1, high + 0.1
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def lines(panel: Panel, name: str) -> str:
    """A panel's curves over epochs, labelled at their ends; ``name`` makes ids unique on a page."""
    curves = [curve for curve in panel.curves if curve.values]
    values = [v for curve in curves for v in curve.values]
    values += [panel.level[1]] if panel.level else []
    y_ticks = ticks(min(values), max(values)) if values else [0.0, 1.0]
    longest = max((len(curve.values) for curve in curves), default=1)
    x_ticks = [e for e in ticks(1, longest) if 1 < e <= longest and e == int(e)]
    x_ticks = [1, *(e for e in x_ticks if e - 1 > longest / 10)] if longest > 1 else [1]
    digits = max((len(f"{t:g}".partition(".")[2]) for t in y_ticks), default=0)

    def x(epoch: float) -> float:
        return LEFT + (epoch - 1) / max(longest - 1, 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 8, y(tick) + 4, f"{tick:.{digits}f}", anchor="end"))
    for tick in x_ticks:
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", anchor="middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "epoch", anchor="middle"))
    # (x, wanted y, text, class) of each label.
    labels = []
    if panel.level:
        called, level = panel.level
        parts.append(f'<path class="level" d="M{LEFT} {y(level):.1f}H{WIDTH - RIGHT}"/>')
        labels.append((float(WIDTH - RIGHT), y(level), f"{called} {level:.4f}", "level-label"))
    for curve in curves:
        points = [(x(e), y(v)) for e, v in enumerate(curve.values, 1)]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        parts.append(f'<path class="curve look{curve.look}" d="{path}"/>')
        end = points[-1]
        parts.append(f'<circle class="end look{curve.look}" cx="{end[0]:.1f}" cy="{end[1]:.1f}" r="3.2"/>')
        labels.append((*end, f"{curve.name} {curve.values[-1]:.3f}", f"label look{curve.look}"))
    parts += [
        _text(px + 7, py + 4, text, css=css)
        for (px, _, text, css), py in zip(labels, _apart([label[1] for label in labels]), strict=True)
    ]
    seen = "; ".join(f"{c.name}: {c.values[0]:.3f} at first, {c.values[-1]:.3f} at the end" for c in curves)
    if panel.level:
        seen += f"; {panel.level[0]}: {panel.level[1]:.4f}"
    return _svg(name, panel.title, f"Over {longest} epochs. {seen}.", WIDTH, HEIGHT, parts)


def _apart(wanted: Sequence[float]) -> list[float]:
    """The places nearest to those wanted, downwards, that are LABEL apart, within the picture."""
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    placed = [0.0] * len(wanted)
    before = float(TOP) - LABEL
    for n in order:
        before = placed[n] = max(wanted[n], before + LABEL)
    limit = HEIGHT - BOTTOM + LABEL / 2
    for n in reversed(order):
        placed[n] = min(placed[n], limit)
        limit = placed[n] - LABEL
    return placed


def dots(figure: Dots, name: str) -> str:
    """Changes around zero with their standard errors, a line each."""
    longest = max((len(dot.name) for dot in figure.dots), default=0)
    label, line, right = max(160, 24 + round(6.6 * longest)), 22, 70
    width = label + 430
    height = TOP + line * len(figure.dots) + 44
    middle, half = (label + width - right) / 2, (width - right - label) / 2 - 14

    def x(change: float) -> float:
        return middle + max(-1.0, min(1.0, change / figure.limit)) * half

    foot = TOP + line * len(figure.dots)
    parts = []
    for tick in ticks(-figure.limit, figure.limit, 4):
        if abs(tick) <= figure.limit * 1.0001:
            css = "zero" if tick == 0 else "grid"
            parts.append(f'<path class="{css}" d="M{x(tick):.1f} {TOP - 6}V{foot}"/>')
            parts.append(
                _text(x(tick), foot + 16, f"{tick:+g}".replace("-", "−") if tick else "0", anchor="middle")
            )
    sides = ("better", "worse") if figure.better == "left" else ("worse", "better")
    parts.append(_text(middle - half, foot + 36, f"← {sides[0]}"))
    parts.append(_text(middle + half, foot + 36, f"{sides[1]} →", anchor="end"))
    for n, dot in enumerate(figure.dots):
        y = TOP + line * n + line / 2
        gain = (dot.change < 0) == (figure.better == "left")
        sure = dot.error is None or abs(dot.change) > 2 * dot.error
        css = ("gain" if gain else "loss") if sure else "unsure"
        parts.append(_text(label - 12, y + 4, dot.name, anchor="end"))
        if abs(dot.change) > figure.limit:
            sign = 1 if dot.change > 0 else -1
            at = x(dot.change)
            parts.append(f'<path class="dot {css}" d="M{at} {y - 5}L{at + 9 * sign} {y}L{at} {y + 5}Z"/>')
            parts.append(_text(at + 13 * sign, y + 4, signed(dot.change, 3), "start" if sign > 0 else "end"))
            continue
        if dot.error is not None:
            low, high = x(dot.change - dot.error), x(dot.change + dot.error)
            parts.append(f'<path class="bar {css}" d="M{low:.1f} {y}H{high:.1f}"/>')
        parts.append(f'<circle class="dot {css}" cx="{x(dot.change):.1f}" cy="{y}" r="4"/>')
    seen = "; ".join(f"{dot.name}: {signed(dot.change)}" for dot in figure.dots)
    return _svg(name, figure.caption, seen, width, height, parts)


def _text(x: float, y: float, text: str, anchor: str = "start", css: str = "tick") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(name: str, title: str, seen: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(seen)}</desc>'
        + "".join(parts)
        + "</svg>"
    )
