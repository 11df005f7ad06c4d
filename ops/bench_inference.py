"""``splitfleet bench inference``: what asking the coordinator about an image costs.

*Latency*: devices ask about single images at random times, together ``rate`` times a second,
whether or not earlier answers have come (an open loop). From the round trip of each question its
own forward pass at the server is taken off: what is left is encoding at the server, the broker,
both ends' threads and the wait for company in a batch. Beside it, in the same minute, a bare MQTT
client asks another one as often, with payloads of the same size.

*Batching*: devices that always have questions out, answered together and one by one by turns.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ops import bench_rows
from ops.bench_echo import Echo, echo
from ops.bench_inference_fleet import CUTS, Asks, Load, Served, ask_all, saturate, serving
from ops.bench_training import broker_at
from ops.errors import FleetFailed, SettingsWrong

TOGETHER = 64
SATURATED_DEVICES, OUTSTANDING = 16, 16
SATURATED_S, ECHO_S = 8.0, 10.0

Row = dict[str, Any]


def run_bench(
    parts: Sequence[str],
    *,
    width: int,
    rate: float,
    seconds: float,
    pairs: int,
    broker: str | None,
    append: Path | None,
    quiet: bool,
) -> dict[str, Row]:
    """Measure ``latency`` and ``batching``, or one of them; a row of each, printed and appended."""
    if odd := sorted(set(parts) - {"latency", "batching"}):
        raise SettingsWrong(f"--parts {odd[0]!r}: there are latency and batching")
    rows = {}
    if "latency" in parts:
        row = rows["latency"] = {**_where(broker, width), **_latency(broker, width, rate, seconds)}
        _tell("ms: median / 90 % / 99 %", row, append, quiet=quiet)
    if "batching" in parts:
        row = rows["batching"] = {**_where(broker, width), **_batching(broker, width, pairs)}
        _tell("images answered a second at saturation", row, append, quiet=quiet)
    return rows


def _latency(broker: str | None, width: int, rate: float, seconds: float) -> Row:
    """An open loop of one device at each of :data:`CUTS`."""
    with _fleet(broker, width, TOGETHER) as served:
        devices = [
            Asks(served.url, served.folder, f"asks-{cut}", cut, rate / len(CUTS), seconds, cut)
            for cut in CUTS
        ]
        found = ask_all(devices)
        up, down = (
            round(statistics.mean(device[key] for device in found))
            for key in ("bytes_up", "bytes_down")
        )
        bare = [1000 * taken for taken in echo(Echo(served.url, rate, ECHO_S, up, down))]
    answers = [answer for device in found for answer in device["answers"]]
    images = len(answers) + sum(device["unanswered"] for device in found)
    asked = [answer for answer in answers if answer["server_forward"]]
    if not asked:
        raise FleetFailed("the server has not answered a single image")
    cost = [1000 * (answer["round_trip"] - answer["server_forward"]) for answer in asked]
    cost += [math.inf] * (images - len(asked))  # whose answer never came
    return {
        "rate": f"{rate:g}/s, {len(CUTS)} devices",
        "images": images,
        "by server": f"{100 * len(asked) / images:.1f} %",
        "bytes up/down": f"{up}/{down}",
        "round trip − forward, ms": _quantiles(cost),
        "wait at server": _quantiles(1000 * answer["server_queue"] for answer in asked),
        "forward": _quantiles(1000 * answer["server_forward"] for answer in asked),
        "whole answer": _quantiles(1000 * answer["since_due"] for answer in answers),
        "bare MQTT": _quantiles(bare),
        "ratio": f"{np.median(cost) / np.median(bare):.1f}",
    }


def _batching(broker: str | None, width: int, pairs: int) -> Row:
    """A coordinator with more questions than it can answer, together and one by one in turn."""
    measured: dict[int, list[float]] = {TOGETHER: [], 1: []}
    for pair in range(pairs):
        for batch in (TOGETHER, 1) if pair % 2 else (1, TOGETHER):
            with _fleet(broker, width, batch) as served:
                found = saturate(Load(served, SATURATED_DEVICES, OUTSTANDING, SATURATED_S))
            if found["refused"]:
                raise FleetFailed(f"{found['refused']} questions were refused")
            measured[batch].append(found["answered_per_s"])
    ratios = [
        together / single for together, single in zip(measured[TOGETHER], measured[1], strict=True)
    ]
    return {
        "devices": f"{SATURATED_DEVICES}, {OUTSTANDING} questions out each",
        "together, images/s": f"{statistics.median(measured[TOGETHER]):.0f}",
        "one by one": f"{statistics.median(measured[1]):.0f}",
        "ratio": f"{statistics.median(ratios):.2f}",
        "pairs": ", ".join(f"{ratio:.2f}" for ratio in ratios),
    }


@contextmanager
def _fleet(broker: str | None, width: int, batch: int) -> Iterator[Served]:
    folder = tempfile.TemporaryDirectory(prefix="splitfleet-bench-")
    with folder as name, broker_at(broker) as url:
        served = Served(url, name, width, batch)
        with serving(served):
            yield served


def _where(broker: str | None, width: int) -> Row:
    return {
        "date": bench_rows.today(),
        "machine": bench_rows.machine(),
        "commit": bench_rows.commit(),
        "broker": broker or "embedded",
        "width": width,
    }


def _quantiles(values: Iterable[float]) -> str:
    found = np.quantile(np.fromiter(values, float), (0.5, 0.9, 0.99), method="higher")
    return " / ".join(f"{value:.2f}" for value in found)


def _tell(title: str, row: Row, append: Path | None, *, quiet: bool) -> None:
    cells = [[str(value) for value in row.values()]]
    bench_rows.show(title, list(row), cells, Console(stderr=True, quiet=quiet))
    if append is not None:
        bench_rows.append(append, cells)
