"""The result of ``splitfleet bench codec`` as tables and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ops import bench_rows
from ops.charts import HEIGHT, WIDTH, Series, line_chart, standalone
from ops.units import MISSING

Row = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]

_REFERENCE, _ONE_MAP, _PER_CHANNEL, _MASKED = "reference", "one map", "map per channel", "masked"
_ERRORS = {
    "activation": "relative error",
    "gradient": "relative error where the activation is not zero",
}
_STYLES = {_REFERENCE: "c5", _ONE_MAP: "c0", _PER_CHANNEL: "c2", _MASKED: "c1"}

_SAME_SIZE, _OF_MEMORY, _BYTES = "of a copy of the same tensor", "of a 256 MiB copy", "GB/s"
_WANTED = (
    ("int8", _SAME_SIZE, 0.1),
    ("int8", _OF_MEMORY, 0.1),
    ("int4+zstd", _BYTES, 0.5),
)
"""Codec, in what its speed is stated, the least of it."""
_COPIES = {_SAME_SIZE: "copy", _OF_MEMORY: "memory_copy"}


def speed_verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The wanted speeds against the slowest tensor's and the median."""
    found = []
    for codec, unit, wanted in _WANTED:
        for way in ("encode", "decode"):
            measured = [
                (row[way] / (row[_COPIES[unit]] if unit in _COPIES else 1), row)
                for row in rows
                if row["codec"] == codec and not row["masked"]
            ]
            if not measured:
                continue
            slowest, where = min(measured, key=lambda pair: pair[0])
            found.append(
                {
                    "codec": codec,
                    "way": way,
                    "unit": unit,
                    "wanted": wanted,
                    "slowest": slowest,
                    "slowest_at": f"{where['kind']} at cut {where['cut']}",
                    "median": statistics.median(value for value, _ in measured),
                    "reached": slowest >= wanted,
                }
            )
    return found


def tables(result: Row) -> list[Table]:
    """Title, header and cells of every table."""
    shown = []
    for kind, error in _ERRORS.items():
        rows = [row for row in result["rows"] if row["kind"] == kind]
        references = [row for row in result["reference"] if row["kind"] == kind]
        shown.append(_by_cut(f"{kind}s: bits a value, relative error", rows, _rate, references))
        if kind == "gradient":
            shown.append(
                _by_cut(
                    f"gradients: {error}",
                    rows,
                    lambda row: _percent(row["error_behind_relu"]),
                    references,
                )
            )
        levels = [row for row in rows if row["entropy"] is not None]
        title = f"{kind}s: entropy of the levels, bits a value: of the tensor, by channel"
        shown.append(_by_cut(title, levels, _entropies))
        shown.append(_speeds(kind, rows))
    shown.append(_compared(result["comparisons"]))
    shown.append(_wanted(result["speeds"]))
    return [table for table in shown if table[2]]


def append_tables(path: Path, result: Row) -> None:
    """Append every table as Markdown, its rows with date, machine and commit."""
    where = [result["date"], result["machine"], result["commit"]]
    on = (
        f"{result['network']}, {result['train_batches']} batches of {result['dataset']} "
        f"(accuracy {result['accuracy']:.3f}), {result['compute']}, "
        f"{result['batch_size']} test images"
    )
    bench_rows.append_text(path, f"\n{on}\n")
    for title, header, cells in tables(result):
        columns = ["date", "machine", "commit", *header]
        bench_rows.append_text(path, f"\n{title[:1].upper()}{title[1:]}:\n\n")
        bench_rows.append(path, [columns, ["---"] * len(columns)])
        bench_rows.append(path, [[*where, *row] for row in cells])


def draw(path: Path, result: Row) -> None:
    """Write rate–error curves, one picture for each tensor, to an SVG file."""
    cuts = sorted({row["cut"] for row in result["rows"]})
    kinds = list(_ERRORS)
    width, height, top = WIDTH + 20, HEIGHT + 40, 40
    size = f"0 0 {len(kinds) * width} {len(cuts) * height + top}"
    parts = [
        f'<g class="chart" transform="translate({40 + 170 * index} 22)"><line class="line {style}" '
        f'x2="24" y1="-4" y2="-4"/><text x="30">{escape(label)}</text></g>'
        for index, (label, style) in enumerate(_STYLES.items())
    ]
    for column, kind in enumerate(kinds):
        for row, cut in enumerate(cuts):
            x, y = column * width, row * height + top
            place = f'<svg x="{x}" y="{y + 24}" width="{WIDTH}" height="{HEIGHT}"'
            parts.append(
                f'<text x="{x + 58}" y="{y + 18}">{kind} at cut {cut}: {_ERRORS[kind]}</text>'
            )
            parts.append(_curves(kind, cut, result).replace("<svg", place, 1))
    name = "Relative error against bits a value"
    picture = f'<svg class="chart" viewBox="{size}" role="img" aria-label="{name}">'
    bench_rows.write_text(path, standalone(picture + "".join(parts) + "</svg>"))


def _by_cut(
    title: str,
    rows: Sequence[Row],
    cell: Callable[[Row], str],
    references: Sequence[Row] = (),
) -> Table:
    cuts = sorted({row["cut"] for row in rows})
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        lines.setdefault(row["label"], {})[row["cut"]] = cell(row)
    for row in references:
        lines.setdefault(f"reference, {row['reference_bits']} bit", {})[row["cut"]] = cell(row)
    cells = [
        [label, *(by_cut.get(cut, MISSING) for cut in cuts)] for label, by_cut in lines.items()
    ]
    return title, ["codec", *(f"cut {cut}" for cut in cuts)], cells


def _speeds(kind: str, rows: Sequence[Row]) -> Table:
    """Medians over the cuts."""
    ways = ("encode", "decode", "encode_plain", "decode_plain")
    names = ("encode", "decode", "encode float32", "decode float32")
    cells = []
    for label in dict.fromkeys(row["label"] for row in rows):
        of_codec = [row for row in rows if row["label"] == label]
        cells.append(
            [
                label,
                *(_speed(of_codec, way) for way in ways),
            ]
        )
    copies = [statistics.median([row[copy] for row in rows] or [0.0]) for copy in _COPIES.values()]
    against = ", ".join(
        f"{what} at {speed:.1f} GB/s" for what, speed in zip(_COPIES, copies, strict=True)
    )
    title = f"{kind}s: GB/s of float32 ({against}), median of the cuts"
    return title, ["codec", *names], cells


def _speed(rows: Sequence[Row], way: str) -> str:
    ratios = [statistics.median(row[way] / row[copy] for row in rows) for copy in _COPIES.values()]
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    return f"{statistics.median(row[way] for row in rows):.2f} ({shown})"


def _compared(comparisons: Sequence[Row]) -> Table:
    points = sorted({row["reference_bits"] for row in comparisons}, reverse=True)
    lines: dict[tuple[str, int], dict[int, str]] = {}
    for row in comparisons:
        name = row["kind"] + (", masked" if row["masked"] else "")
        lines.setdefault((name, row["cut"]), {})[row["reference_bits"]] = _ratio(row)
    cells = [
        [name, str(cut), *(by_bits.get(bits, MISSING) for bits in points)]
        for (name, cut), by_bits in sorted(lines.items())
    ]
    fewer = sum(row["fewer"] for row in comparisons)
    title = (
        "our bits against the reference's at its error "
        f"(fewer at {fewer} of {len(comparisons)} points; ! marks the others)"
    )
    return title, ["tensor", "cut", *(f"reference, {bits} bit" for bits in points)], cells


def _wanted(speeds: Sequence[Row]) -> Table:
    cells = [
        [
            f"{row['codec']}, {row['way']}",
            f"{row['wanted']:g} {row['unit']}",
            f"{row['slowest']:.3g} ({row['slowest_at']})",
            f"{row['median']:.3g}",
            "pass" if row["reached"] else "miss",
        ]
        for row in speeds
    ]
    return "wanted speeds", ["codec", "wanted", "slowest", "median", "verdict"], cells


def _rate(row: Row) -> str:
    return f"{row['bits']:.2f}, {_percent(row['error'])}"


def _entropies(row: Row) -> str:
    return f"{row['entropy']:.2f}, {row['entropy_channel']:.2f}"


def _ratio(row: Row) -> str:
    if row["ratio"] is None:
        return f"! {row['note']}"
    note = f", {row['note']}" if row["note"] else ""
    return f"{'' if row['fewer'] else '! '}{row['ratio']:.3f}{note}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _curves(kind: str, cut: int, result: Row) -> str:
    here = [row for row in result["rows"] if (row["kind"], row["cut"]) == (kind, cut)]
    reference = [row for row in result["reference"] if (row["kind"], row["cut"]) == (kind, cut)]
    zstd = [
        row
        for row in here
        if row["entropy"] is not None and row["codec"].endswith("+zstd")
        if "+stochastic" not in row["codec"]
    ]
    lines = {
        _REFERENCE: reference,
        _ONE_MAP: [r for r in zstd if "+channel" not in r["codec"] and not r["masked"]],
        _PER_CHANNEL: [r for r in zstd if "+channel" in r["codec"]],
        _MASKED: [r for r in zstd if r["masked"]],
    }
    series = [
        Series(label, _STYLES[label], sorted(_point(row) for row in rows))
        for label, rows in lines.items()
        if rows
    ]
    values = [point for line in series for point in line.points]
    return line_chart(
        series,
        name=f"{kind} at cut {cut}",
        x_label="bits a value",
        x_range=(0.0, math.ceil(max(x for x, _ in values))),
        y_range=(math.floor(min(y for _, y in values)), math.ceil(max(y for _, y in values))),
        x_format=lambda x: f"{x:.2g}",
        y_format=lambda y: f"{10**y:.3g}",
    )


def _point(row: Row) -> tuple[float, float]:
    """Bits, and the decimal logarithm of the error that matters."""
    error = row["error_behind_relu"] if row["kind"] == "gradient" else row["error"]
    return row["bits"], math.log10(max(error, 1e-12))
