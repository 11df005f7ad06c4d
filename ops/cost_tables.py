"""The tables of ``splitfleet bench cost``: which columns a row has and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from ops import bench_rows
from ops.units import MISSING, byte_size

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]

ORIGIN = ("date", "machine", "commit")


def cut_name(cut: int | None) -> str:
    """A cut, or the network that has none."""
    return "whole" if cut is None else f"cut {cut}"


def show(name: str, rows: Sequence[Row], console: Console) -> None:
    """Print a table."""
    title, columns = _TABLES[name]
    bench_rows.show(title, [head for head, _ in columns], _cells(name, rows), console)


def markdown(name: str, rows: Sequence[Row], origin: Sequence[str]) -> str:
    """The table with its head, every row behind the date, machine and commit of ``origin``."""
    title, columns = _TABLES[name]
    head = [*ORIGIN, *(column for column, _ in columns)]
    lines = [head, ["---"] * len(head), *([*origin, *cells] for cells in _cells(name, rows))]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"\n{title[0].upper()}{title[1:]}:\n\n{text}"


def _cells(name: str, rows: Sequence[Row]) -> list[list[str]]:
    return [[write(row) for _, write in _TABLES[name][1]] for row in rows]


def _mega(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / 1e6:.1f}"


def _milli(key: str) -> Callable[[Row], str]:
    return lambda row: MISSING if row[key] is None else f"{1000 * row[key]:.2f}"


def _share(key: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row[key]:.0f} %"


def _size(key: str) -> Callable[[Row], str]:
    return lambda row: byte_size(row[key])


def _plain(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


_WIDTH: Column = ("width", _plain("width"))
_CUT: Column = ("cut", lambda row: str(row["cut"] or "whole"))

_TABLES: Mapping[str, tuple[str, Sequence[Column]]] = {
    "device": (
        "a device, per sample, by cut",
        (
            _WIDTH,
            _CUT,
            ("training MFLOP", _mega("training_flops")),
            ("of whole", _share("training_flops_share")),
            ("CPU ms", _milli("training_cpu_s")),
            ("of whole", _share("training_cpu_share")),
            ("peak", _size("training_peak_bytes")),
            ("predicted", _size("predicted_bytes")),
            ("of whole", _share("training_peak_share")),
            ("up + down", _size("moved_bytes")),
            ("mJ", _milli("training_joules")),
            ("answering MFLOP", _mega("inference_flops")),
            ("CPU ms", _milli("inference_cpu_s")),
            ("peak", _size("inference_peak_bytes")),
        ),
    ),
    "answers": (
        "an answer, by cut and exit rate",
        (
            _WIDTH,
            _CUT,
            ("exit rate", lambda row: f"{row['exit_rate']:.2f}"),
            ("device MFLOP", _mega("device_flops")),
            ("server MFLOP", _mega("server_flops")),
            ("up", _size("uplink_bytes")),
            ("device mJ", _milli("joules")),
            ("whole network mJ", _milli("whole_joules")),
        ),
    ),
    "server": (
        "the server, by strategy and devices",
        (
            _WIDTH,
            ("strategy", _plain("strategy")),
            ("devices", _plain("devices")),
            ("peak in training", _size("peak_bytes")),
            ("before it", _size("ground_bytes")),
            ("copies predicted", _size("predicted_bytes")),
            ("CPU ms/sample", _milli("cpu_s")),
            ("peak in aggregation", _size("aggregation_peak_bytes")),
            ("aggregation CPU ms", _milli("aggregation_cpu_s")),
        ),
    ),
}
