"""Small charts as inline SVG: no library, no script. Colours are classes of the page around them.

A chart scales with its place; what is hovered over tells its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 466, 16, 252
DOTS = 12
MARKERS = 60
"""Up to so many points a line has marks to hover over; more than ``DOTS`` show only then."""
POINTS = 400

Point = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """One line; ``style`` is its CSS class."""

    label: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Bar:
    """One stack upwards and one downwards: (label, CSS class, amount) from the axis outwards."""

    label: str
    up: Sequence[tuple[str, str, float]]
    down: Sequence[tuple[str, str, float]]


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def line_chart(
    series: Sequence[Series],
    *,
    name: str,
    x_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_format: Format,
    y_format: Format,
    whole_x: bool = False,
    marker: tuple[float, str] | None = None,
) -> str:
    """Lines over a common axis; ``marker`` is a labelled vertical line at one x."""
    x = _Scale(*_widened(*x_range), LEFT, RIGHT)
    y = _Scale(*_widened(*y_range), BOTTOM, TOP)
    x_ticks = [t for t in ticks(*x_range, 6) if not whole_x or t == int(t)]
    parts = [
        _grid(y, [(t, y_format(t)) for t in ticks(*y_range, 5)]),
        _x_axis([(x(t), x_format(t)) for t in x_ticks], x_label),
    ]
    if marker is not None and x_range[0] <= marker[0] <= x_range[1]:
        parts.append(_marker(x(marker[0]), marker[1]))
    for line in series:
        points = thinned(line.points, POINTS)
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if len(points) <= MARKERS:
            shown = "dot" if len(points) <= DOTS else "dot hidden"
            parts += [
                f'<circle class="{shown} {line.style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5">'
                f"<title>{escape(line.label)}, {escape(x_label)} {x_format(a)}: {y_format(b)}"
                "</title></circle>"
                for a, b in points
            ]
    return _svg(name, parts)


def mirrored_bars(
    bars: Sequence[Bar], *, name: str, x_label: str, y_format: Format, tick_format: Format
) -> str:
    """Stacks above and below a common axis, one pair per bar."""
    most_up = max((sum(part[2] for part in bar.up) for bar in bars), default=0.0)
    most_down = max((sum(part[2] for part in bar.down) for bar in bars), default=0.0)
    top, bottom = most_up or most_down or 1.0, most_down or most_up or 1.0
    room = 0.1 * (top + bottom)  # for the words above and below
    y = _Scale(-bottom - room, top + room, BOTTOM, TOP)
    slot = (RIGHT - LEFT) / max(1, len(bars))
    width = min(44.0, 0.72 * slot)
    every = math.ceil(len(bars) / 8)
    centres = [LEFT + slot * (i + 0.5) for i in range(len(bars))]
    labels = [(c, bar.label) for c, bar in zip(centres, bars, strict=True)][::every]
    step = ticks(0, max(top, bottom), 3)
    marks = [-t for t in step[:0:-1] if t <= bottom] + [t for t in step if t <= top]
    parts = [_grid(y, [(t, tick_format(abs(t))) for t in marks]), _x_axis(labels, x_label)]
    for centre, bar in zip(centres, bars, strict=True):
        for stack, sign in ((bar.up, 1), (bar.down, -1)):
            parts += _stack(stack, sign, bar.label, centre, width, y, x_label, y_format)
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    parts += [
        f'<text class="note" x="{RIGHT}" y="{place}" text-anchor="end">{text}</text>'
        for text, place in (("▲ up", TOP + 8), ("▼ down", BOTTOM - 2))
    ]
    return _svg(name, parts)


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``wanted`` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def share_range(values: Iterable[float]) -> tuple[float, float]:
    """A range within 0 to 1 that holds all ``values`` and ends at ticks."""
    found = list(values)
    low, high = min(found, default=0.0), max(found, default=1.0)
    step = 0.2 if high - low > 0.45 else 0.1
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if last - first < 2:
        first, last = first - 1, last + 1
    return max(0.0, round(first * step, 2)), min(1.0, round(last * step, 2))


def thinned(points: Sequence[Point], limit: int) -> Sequence[Point]:
    """At most about ``limit`` of the points, the first and the last among them."""
    if len(points) <= limit:
        return points
    last = len(points) - 1
    return [points[round(i * last / (limit - 1))] for i in range(limit)]


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _grid(y: _Scale, marks: Iterable[tuple[float, str]]) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        for value, text in marks
    )


def _x_axis(marks: Iterable[tuple[float, str]], label: str) -> str:
    texts = "".join(
        f'<text x="{place:.1f}" y="{BOTTOM + 19}" text-anchor="middle">{escape(text)}</text>'
        for place, text in marks
    )
    middle = (LEFT + RIGHT) / 2
    return (
        f'{texts}<text class="note" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(label)}</text>"
    )


def _marker(x: float, text: str) -> str:
    near_end = x > (LEFT + 2 * RIGHT) / 3
    place, anchor = (x - 6, "end") if near_end else (x + 6, "start")
    return (
        f'<line class="marker" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>'
        f'<text class="note" x="{place:.1f}" y="{BOTTOM - 8}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _stack(
    stack: Sequence[tuple[str, str, float]],
    sign: int,
    of_bar: str,
    centre: float,
    width: float,
    y: _Scale,
    x_label: str,
    y_format: Format,
) -> list[str]:
    parts, reached = [], 0.0
    for label, style, amount in stack:
        edges = sorted((y(sign * reached), y(sign * (reached + amount))))
        reached += amount
        parts.append(
            f'<rect class="bar {style}" x="{centre - width / 2:.1f}" y="{edges[0]:.2f}" '
            f'width="{width:.1f}" height="{edges[1] - edges[0]:.2f}">'
            f"<title>{escape(label)}, {escape(x_label)} {escape(of_bar)}: {y_format(amount)}"
            "</title></rect>"
        )
    return parts


def _svg(name: str, parts: Iterable[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(name)}">{"".join(parts)}</svg>'
    )
