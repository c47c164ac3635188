"""Four kinds of charts as inline SVG, which is all that a report needs. Text and axes take the page's colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Series", "bars", "histograms", "lines"]

WIDTH, LEFT, RIGHT = 720, 56, 16
STEP = 0.02
"""Width of a bin of overlap."""


class Series(NamedTuple):
    """Points under a name.

    name: in the legend.
    points: x and y of each.
    colour: a number from 1 on, of the page's palette.
    dots: whether they are drawn as dots, not as a line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dots: bool = False


def histograms(kinds: Mapping[str, Sequence[float]], marks: Mapping[str, float]) -> str:
    """One histogram of overlaps in [0, 1] under the other, on one x axis; each kind has its own scale.

    kinds: the overlaps of each, by its name.
    marks: vertical lines through all of them, by what they are called.
    """
    low = min((min(values) for values in kinds.values() if values), default=0.0)
    low = math.floor(min([low, *marks.values()]) / 0.1) * 0.1
    height, top = 90, 26
    bottom = top + len(kinds) * (height + 22)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (1 - low)

    body: list[str] = []
    for row, (name, values) in enumerate(kinds.items()):
        base = top + row * (height + 22) + height
        counts: dict[int, int] = {}
        for value in values:
            bin_ = min(int(value / STEP + 1e-9), round(1 / STEP) - 1)  # 1.0 belongs to the last bin
            counts[bin_] = counts.get(bin_, 0) + 1
        most = max(counts.values(), default=1)
        body.append(_text(LEFT, base - height - 4, f"{name} ({len(values)})", "start"))
        for bin_, count in sorted(counts.items()):
            tall = (height - 8) * count / most
            body.append(
                f'<rect class="c{row + 1}" x="{x(bin_ * STEP) + 0.5:.1f}" y="{base - tall:.1f}" '
                f'width="{max(1.0, x(STEP) - x(0) - 1):.1f}" height="{tall:.1f}"><title>{bin_ * STEP:.2f} to '
                f"{(bin_ + 1) * STEP:.2f}: {count}</title></rect>"
            )
        body.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        body.append(_text(LEFT - 6, base - height + 14, str(most), "end"))
    for tick in _ticks(low, 1.0):
        body.append(_text(x(tick), bottom + 14, f"{tick:g}", "middle"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 29, "overlap", "middle"))
    body += _marks(marks, x, top - 6, bottom, top - 10)
    return _svg(bottom + 36, body, "Histograms of overlap: " + ", ".join(kinds))


def lines(
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    y_range: tuple[float, float] | None = None,
    log_x: bool = False,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Lines (or dots) over a common x axis.

    series: what is drawn.
    x_name, y_name: of the axes.
    y_range: of the y axis; by default that of the values.
    log_x: decades on the x axis, whose values must then be positive.
    marks: vertical lines, by what they are called.
    """
    points = [point for line in series for point in line.points]
    height, top, bottom = 220, 34, 44
    least, most = min(p[0] for p in points), max(p[0] for p in points)
    if least == most:
        least, most = (least / 2, most * 2) if log_x else (least - 1, most + 1)
    low, high = y_range or (0.0, max(p[1] for p in points) * 1.05 or 1.0)
    scale: Callable[[float], float] = math.log10 if log_x else float

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (scale(value) - scale(least)) / (scale(most) - scale(least))

    def y(value: float) -> float:
        return top + height * (1 - (value - low) / (high - low))

    body = []
    for tick in _ticks(low, high):
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(_text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    for tick in _decades(least, most) if log_x else _ticks(least, most):
        body.append(_text(x(tick), top + height + 16, f"{tick:g}", "middle"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, top + height + 34, x_name, "middle"))
    body.append(_text(LEFT, 12, y_name, "start"))
    shown = {name: value for name, value in (marks or {}).items() if least <= value <= most}
    body += _marks(shown, x, top, top + height, top + 14)
    for number, line in enumerate(series):
        if not line.dots:
            path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
            body.append(f'<polyline class="s{line.colour}" points="{path}"/>')
        if line.dots or len(line.points) < 40:
            body += [
                f'<circle class="c{line.colour}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{2 if line.dots else 3}">'
                f"<title>{escape(line.name)}: {a:g}, {b:g}</title></circle>"
                for a, b in line.points
            ]
        if len(series) > 1:
            at_x = WIDTH - RIGHT - min(190, (WIDTH - LEFT - RIGHT - 130) // len(series)) * (len(series) - number)
            body.append(f'<rect class="c{line.colour}" x="{at_x}" y="4" width="10" height="10"/>')
            body.append(_text(at_x + 15, 13, line.name, "start"))
    return _svg(top + height + bottom, body, f"{y_name} over {x_name}")


def bars(rows: Mapping[str, Sequence[float | None]], names: Sequence[str]) -> str:
    """Shares in [0, 1] as bars from the left.

    rows: a group of bars for each; None leaves a gap.
    names: what the first bar of each group is, the second and so on; they have the colours of the page in turn.
    """
    left, height = 270, 11
    top, step = 26, height * len(names) + 8
    bottom = top + step * len(rows)

    def x(value: float) -> float:
        return left + (WIDTH - left - RIGHT - 34) * value

    body: list[str] = []
    for i, name in enumerate(names):
        body.append(f'<rect class="c{i + 1}" x="{left + 110 * i}" y="4" width="10" height="10"/>')
        body.append(_text(left + 110 * i + 15, 13, name, "start"))
    for tick in _ticks(0.0, 1.0):
        body.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        body.append(_text(x(tick), bottom + 14, f"{tick:g}", "middle"))
    for row, (name, values) in enumerate(rows.items()):
        y = top + row * step + 4
        body.append(_text(left - 8, y + height * len(names) / 2 + 4, name, "end"))
        for i, value in enumerate(values):
            if value is None:
                continue
            body.append(
                f'<rect class="c{i + 1}" x="{left}" y="{y + i * height}" width="{max(1.0, x(value) - left):.1f}" '
                f'height="{height - 2}"><title>{escape(name)}, {escape(names[i])}: {value:.3f}</title></rect>'
            )
            body.append(_text(max(x(value), left + 1) + 4, y + i * height + 9, f"{value:.2f}", "start"))
    return _svg(bottom + 20, body, "Shares of " + ", ".join(names))


def _marks(marks: Mapping[str, float], x: Callable[[float], float], top: float, bottom: float, y: float) -> list[str]:
    """Vertical lines and their names at height `y`: that of the leftmost of several on its left, else on the right."""
    drawn: list[str] = []
    for name, value in marks.items():
        left = len(marks) > 1 and value == min(marks.values())
        drawn.append(f'<line class="mark" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top:g}" y2="{bottom:g}"/>')
        drawn.append(_text(x(value) + (-5 if left else 5), y, f"{name} {value:g}", "end" if left else "start"))
    return drawn


def _svg(height: float, body: Iterable[str], label: str) -> str:
    inner = "".join(body)
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {height:g}">{inner}</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, four to eight of them."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    while (high - low) / step > 8:
        step *= 2 if round(step / 10 ** math.floor(math.log10(step) + 1e-9)) in (1, 5) else 2.5
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    steps = [step * 10.0**power for power in range(math.floor(math.log10(low)), 8) for step in (1, 3)]
    return [step for step in steps if low <= step <= high]
