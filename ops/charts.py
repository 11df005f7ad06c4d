"""Small charts as inline SVG: no library, no script. Colours are classes of the page around them.

A chart scales with its place; what is hovered over tells its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 466, 16, 252
DOTS = 12
LINE = 16
"""From one line of a legend to the next."""
MARKERS = 60
"""Up to so many points a line has marks to hover over; more than ``DOTS`` show only then."""
POINTS = 400

_STANDALONE = (
    ".chart{--ink:#14181f;--soft:#5b6472;--faint:#e3e6eb;--card:#fff;"
    "--c0:#2563eb;--c1:#d9730d;--c2:#0f8a5f;--c3:#b5309e;--c4:#0a87a8;--c5:#c2362f;--c6:#6d53d3;"
    "--c7:#7d8a17;--c8:#8a5a35;background:var(--card);font-family:system-ui,sans-serif}"
    ".chart text{fill:var(--soft);font-size:11px}.grid{stroke:var(--faint)}"
    ".axis{stroke:var(--soft)}.band{fill:var(--faint);opacity:.5}"
    ".line{stroke-width:2;fill:none}.line.dashed{stroke-dasharray:6 4}"
    ".dot{stroke:var(--card);stroke-width:1.5}"
    ".dot.hidden{opacity:0}.dot.hidden:hover{opacity:1}"
    + "".join(f".line.c{i}{{stroke:var(--c{i})}}.dot.c{i}{{fill:var(--c{i})}}" for i in range(9))
)
"""What a chart needs of the page's style sheet when it stands alone."""

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
class Interval:
    """One point with its interval ``y ± half``."""

    label: str
    style: str
    x: float
    y: float
    half: float


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
    legend: bool = False,
) -> str:
    """Lines over a common axis; ``marker`` is a labelled vertical line at one x.

    With ``legend`` the chart names the first line of every style itself, below the axis.
    """
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
    if not legend:
        return _svg(name, parts)
    named = {line.style: line.label for line in reversed(series)}
    for index, (style, label) in enumerate(reversed(named.items())):
        row = HEIGHT + LINE * (index + 1)
        parts.append(
            f'<circle class="dot {style}" cx="{LEFT + 6}" cy="{row - 4}" r="4"/>'
            f'<text class="note" x="{LEFT + 18}" y="{row}">{escape(label)}</text>'
        )
    return _svg(name, parts, HEIGHT + LINE * len(named) + 12)


def interval_chart(
    points: Sequence[Interval],
    *,
    name: str,
    x_label: str,
    y_label: str,
    x_format: Format,
    y_format: Format,
    band: float,
) -> str:
    """Points with their intervals over a logarithmic axis, and a legend; ``± band`` is shaded."""
    left, right = (pick(math.log10(p.x) for p in points) for pick in (min, max))
    x = _Scale(left - 0.15, right + 0.15, LEFT, RIGHT)
    low = min(-band, *(p.y - p.half for p in points))
    high = max(band, *(p.y + p.half for p in points))
    room = 0.05 * (high - low)
    y = _Scale(low - room, high + room, BOTTOM, TOP)
    marks = [m * 10.0**e for e in range(math.floor(x.low), math.ceil(x.high)) for m in (1, 2, 5)]
    shown = [(x(math.log10(m)), x_format(m)) for m in marks if x.low <= math.log10(m) <= x.high]
    parts = [
        _rectangle("band", LEFT, RIGHT - LEFT, y(band), y(-band)),
        _grid(y, [(t, y_format(t)) for t in ticks(y.low, y.high, 6)]),
        _x_axis(shown, x_label),
        f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>',
    ]
    parts.append(f'<text class="note" x="{LEFT}" y="{TOP - 4}">{escape(y_label)}</text>')
    for index, point in enumerate(points):
        centre, top, bottom = (
            x(math.log10(point.x)),
            y(point.y + point.half),
            y(point.y - point.half),
        )
        value = f"{x_format(point.x)}: {y_format(point.y)} ± {y_format(point.half).lstrip('+')}"
        row = HEIGHT + 16 + LINE * index
        parts.append(
            f'<line class="line {point.style}" x1="{centre:.1f}" x2="{centre:.1f}" '
            f'y1="{top:.1f}" y2="{bottom:.1f}"/>'
            f'<circle class="dot {point.style}" cx="{centre:.1f}" cy="{y(point.y):.1f}" r="4">'
            f"<title>{escape(point.label)}, {escape(value)}</title></circle>"
            f'<text class="note" x="{centre + 6:.1f}" y="{y(point.y) - 5:.1f}">{index + 1}</text>'
            f'<circle class="dot {point.style}" cx="{LEFT + 6}" cy="{row - 4}" r="4"/>'
            f'<text class="note" x="{LEFT + 18}" y="{row}">'
            f"{index + 1} {escape(point.label)}, {escape(value)}</text>"
        )
    return _svg(name, parts, HEIGHT + LINE * len(points) + 12)


def standalone(chart: str) -> str:
    """A chart as a file of its own, with the colours it would else get from the page."""
    style = f"<style>{_STANDALONE}</style>"
    start = chart.index(">") + 1
    return chart[: start - 1].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"') + (
        f">{style}{chart[start:]}\n"
    )


def side_by_side(panels: Mapping[str, str]) -> str:
    """Charts in a row, as one; each under its title."""
    parts, highest = [], 0.0
    for index, (title, chart) in enumerate(panels.items()):
        height = float(chart.split('viewBox="', 1)[1].split('"', 1)[0].split()[3])
        highest = max(highest, height)
        place = f'<svg x="{WIDTH * index}" y="{LINE}" width="{WIDTH}" height="{height:g}"'
        parts.append(
            f'<text class="note" x="{WIDTH * index + LEFT}" y="{LINE - 4}">{escape(title)}</text>'
            + chart.replace("<svg", place, 1)
        )
    return _svg("; ".join(panels), parts, highest + LINE, WIDTH * len(panels))


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


def _rectangle(style: str, x: float, width: float, top: float, bottom: float) -> str:
    return (
        f'<rect class="{style}" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{bottom - top:.1f}"/>'
    )


def _svg(name: str, parts: Iterable[str], height: float = HEIGHT, width: float = WIDTH) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(name)}">{"".join(parts)}</svg>'
    )
