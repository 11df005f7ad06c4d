"""``splitfleet bench inference-link``: over a slow link, from never to always asking.

A trained fleet answers test images at both ends of a :mod:`ops.network_link`. For every threshold τ
the coordinator is started anew with it, and every device is asked about the same images at the same
times. *Edge only* is τ = −1, which never asks; *cloud only* is τ = 1, which always asks, with the
features at the cut. Latencies, shares and bytes are of all devices together.
"""

from __future__ import annotations

import io
import itertools
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from ops import bench_rows
from ops.bench_link_devices import Measured, OfDevice, shares
from ops.bench_link_fleet import LinkFleet, TrainedRun
from ops.charts import Series, line_chart, side_by_side, standalone
from ops.errors import SettingsWrong
from ops.network_link import NetworkLink
from ops.paired import difference
from ops.units import MISSING, percent
from tensors.calibration import ANSWER_ALL, OFFLOAD_ALL
from tensors.datasets import Dataset, load_dataset

JPEG_QUALITY = 90

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """``images`` and ``images_per_s`` (the mean) are of each device; ``delay_s`` is one way."""

    images: int = 500
    images_per_s: float = 10.0
    delay_s: float = 0.02
    bits_per_s: float = 10e6


def parse_thresholds(text: str) -> list[float]:
    """Numbers separated by commas. Raises :class:`SettingsWrong`."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise SettingsWrong(f"--thresholds {text!r}: write numbers like 0.5,0.7,0.9") from None


def run_link(
    state_dir: Path,
    setup: Setup,
    *,
    thresholds: Sequence[float],
    data_root: Path | None,
    append: Path | None,
    plot: Path | None,
    quiet: bool,
) -> list[Row]:
    """Measure these thresholds, edge only and cloud only; a row for each, which is shown.

    ``state_dir`` is a coordinator's whose run has closed rounds; it is copied, not changed.
    ``append``: a Markdown file to whose table the rows are added. ``plot``: where the curves go.

    Raises:
        SettingsWrong: a threshold or a number is wrong.
        DataError: the test images of the run's data set are missing.
        OpsError: no link can be made here, or there is no Mosquitto or no trained run.
        FleetFailed: a process has ended, or did not answer in time.
    """
    sweep = sorted({ANSWER_ALL, OFFLOAD_ALL, *thresholds})
    if not (sweep[0] == ANSWER_ALL and sweep[-1] == OFFLOAD_ALL) or any(map(math.isnan, sweep)):
        raise SettingsWrong(f"--thresholds must lie from {ANSWER_ALL:g} to {OFFLOAD_ALL:g}")
    if not min(setup.images, setup.images_per_s, setup.delay_s, setup.bits_per_s) > 0:
        raise SettingsWrong("--images, --rate, --delay-ms and --mbit-per-s must be above 0")
    console = Console(stderr=True, quiet=quiet)
    run = TrainedRun.read(state_dir)
    test = load_dataset(run.dataset, "test", root=data_root)
    measured = {}
    with (
        tempfile.TemporaryDirectory(prefix="splitfleet-link-") as folder,
        NetworkLink(delay_s=setup.delay_s, bits_per_s=setup.bits_per_s) as link,
        LinkFleet(
            run,
            link,
            Path(folder),
            images=setup.images,
            images_per_s=setup.images_per_s,
            data_root=data_root,
        ) as fleet,
    ):
        for threshold in sweep:
            measured[threshold] = fleet.measure(threshold)
            reasons = sum((Counter(d.reasons) for d in measured[threshold].devices), Counter())
            console.print(f"τ = {threshold:g} is measured", *([dict(reasons)] if reasons else []))
        if link.dropped:
            console.print(f"the link's queue was full for {link.dropped} packets")
    rows = make_rows(measured)
    pictures = picture_sizes(test, np.concatenate(shares(test, len(run.cuts), setup.images)))
    for row in rows:
        row |= {"dataset": test.name, "pictures": pictures}
    cells = [_cells(row) for row in rows]
    title = f"{test.name}, {rows[0]['images']:,} images, {_link(setup)}"
    bench_rows.show(title, _HEADER, cells, console)
    console.print(about_pictures(pictures, setup), soft_wrap=True)
    if append is not None:
        origin = [bench_rows.today(), bench_rows.machine(), bench_rows.commit(), test.name]
        bench_rows.append(append, [[*origin, *line] for line in cells])
    if plot is not None:
        bench_rows.write_text(plot, curves(rows, pictures))
    return rows


def _link(setup: Setup) -> str:
    return f"{1000 * setup.delay_s:g} ms each way, {setup.bits_per_s / 1e6:g} Mbit/s"


# -- rows -----------------------------------------------------------------------------------------

_HEADER = (
    "τ",
    "asked",
    "fell back",
    "accuracy %",
    "− edge only",
    "− cloud only",
    "mean ms",
    "p50 / p90 / p99",
    "bytes up + down",
    "beats both",
)


def make_rows(measured: Mapping[float, Measured]) -> list[Row]:
    """A row for each threshold, by rising τ; the first is edge only and the last cloud only.

    Accuracies are compared image by image, in points with a 95 % interval (half of it). ``beats``:
    more accurate than edge only beyond that interval, and both faster in the mean and smaller in
    bytes than cloud only.
    """
    thresholds = sorted(measured)
    right = {t: np.concatenate([d.right for d in measured[t].devices]) for t in thresholds}
    rows = [_row(threshold, measured[threshold]) for threshold in thresholds]
    edge, cloud = thresholds[0], thresholds[-1]
    for threshold, row in zip(thresholds, rows, strict=True):
        for name, other in (("edge", edge), ("cloud", cloud)):
            points = 100.0 * (right[threshold].astype(float) - right[other])
            found = difference(points.tolist())
            row[f"against_{name}"], row[f"half_{name}"] = found.mean, found.half
        row["beats"] = (
            row["half_edge"] is not None
            and row["against_edge"] > row["half_edge"]
            and row["mean_ms"] < rows[-1]["mean_ms"]
            and row["bytes_up"] + row["bytes_down"] < rows[-1]["bytes_up"] + rows[-1]["bytes_down"]
        )
    return rows


def _row(threshold: float, measured: Measured) -> Row:
    seconds = [each for device in measured.devices for each in device.seconds]
    whole = _shares(measured.devices)
    images = len(seconds)
    p50, p90, p99 = (1000 * float(np.quantile(seconds, share)) for share in (0.5, 0.9, 0.99))
    return {
        "threshold": threshold,
        "images": images,
        **whole,
        "mean_ms": 1000 * statistics.fmean(seconds),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "bytes_up": measured.bytes_up / images,
        "bytes_down": measured.bytes_down / images,
        "tensor_bytes_up": sum(device.bytes_up for device in measured.devices) / images,
        "tensor_bytes_down": sum(device.bytes_down for device in measured.devices) / images,
        "cuts": {device.cut: _shares([device]) for device in measured.devices},
    }


def _shares(devices: Sequence[OfDevice]) -> dict[str, float]:
    """Of all their images; ``offloaded`` are those the server was asked about."""
    by = [each for device in devices for each in device.by]
    return {
        "offloaded": sum(device.offloads for device in devices) / len(by),
        "fallbacks": by.count("fallback") / len(by),
        "accuracy": statistics.fmean(each for device in devices for each in device.right),
        "exit_accuracy": sum(device.exit_right for device in devices) / len(by),
    }


def _cells(row: Row) -> list[str]:
    return [
        f"{row['threshold']:g}".replace("-", "−"),
        percent(row["offloaded"]),
        percent(row["fallbacks"]),
        f"{100 * row['accuracy']:.1f}",
        _points(row["against_edge"], row["half_edge"]),
        _points(row["against_cloud"], row["half_cloud"]),
        f"{row['mean_ms']:.1f}",
        " / ".join(f"{row[name]:.1f}" for name in ("p50_ms", "p90_ms", "p99_ms")),
        f"{row['bytes_up']:,.0f} + {row['bytes_down']:,.0f}",
        "yes" if row["beats"] else "no",
    ]


def _points(mean: float, half: float | None) -> str:
    if half is None or mean == half == 0:
        return MISSING
    return f"{mean:+.1f} ± {half:.1f}".replace("-", "−")


# -- pictures -------------------------------------------------------------------------------------


def picture_sizes(test: Dataset, rows: np.ndarray) -> dict[str, float]:
    """Mean bytes of these images as files: what sending pictures instead of features would take."""
    sizes: dict[str, float] = {}
    ways: dict[str, dict[str, Any]] = {
        "PNG": {"format": "PNG", "optimize": True},
        f"JPEG (quality {JPEG_QUALITY})": {"format": "JPEG", "quality": JPEG_QUALITY},
    }
    for name, how in ways.items():
        total = 0
        for row in rows:
            file = io.BytesIO()
            pixels = test.images[row]
            Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, **how)
            total += file.tell()
        sizes[name] = total / len(rows)
    return sizes


def about_pictures(sizes: Mapping[str, float], setup: Setup) -> str:
    """What pictures would take on that link: computed, not measured, and without any computing."""

    def said(name: str, size: float) -> str:
        milliseconds = 1000 * (2 * setup.delay_s + 8 * size / setup.bits_per_s)
        return f"as {name} {size:,.0f} bytes, {milliseconds:.1f} ms to and fro"

    return "the picture itself: " + "; ".join(itertools.starmap(said, sizes.items()))


# -- curves ---------------------------------------------------------------------------------------


def curves(rows: Sequence[Row], pictures: Mapping[str, float]) -> str:
    """An SVG: accuracy, latency and bytes over the threshold. Edge only is drawn at 0."""
    found = [(max(0.0, row["threshold"]), row) for row in rows]

    def line(label: str, style: str, *keys: str, factor: float = 1.0) -> Series:
        points = [(x, factor * sum(row[key] for key in keys)) for x, row in found]
        return Series(label, style, points)

    def level(label: str, style: str, height: float) -> Series:
        return Series(label, f"{style} dashed", [(0.0, height), (1.0, height)])

    accuracy = [
        line("device and server", "c0", "accuracy"),
        level("edge only", "c1", rows[0]["accuracy"]),
        level("cloud only", "c2", rows[-1]["accuracy"]),
    ]
    right = [row["accuracy"] for row in rows]
    latency = [
        line("99 of 100 within", "c3", "p99_ms"),
        line("9 of 10 within", "c1", "p90_ms"),
        line("half within", "c0", "p50_ms"),
        line("mean", "c2 dashed", "mean_ms"),
    ]
    size = [
        line("both ways", "c0", "bytes_up", "bytes_down"),
        line("up", "c1", "bytes_up"),
        *(level(f"as {name}", f"c{i}", each) for i, (name, each) in enumerate(pictures.items(), 2)),
    ]
    panels = {
        "accuracy": line_chart(
            accuracy,
            name="accuracy by threshold",
            x_label="threshold τ",
            x_range=(0.0, 1.0),
            y_range=(min(right) - 0.01, max(right) + 0.01),
            x_format=lambda x: f"{x:g}",
            y_format=percent,
            legend=True,
        )
    }
    for title, lines in (("latency, ms", latency), ("bytes an image, on the link", size)):
        highest = max(y for each in lines for _, y in each.points)
        panels[title] = line_chart(
            lines,
            name=f"{title} by threshold",
            x_label="threshold τ",
            x_range=(0.0, 1.0),
            y_range=(0.0, 1.05 * highest),
            x_format=lambda x: f"{x:g}",
            y_format=lambda y: f"{y:,.0f}",
            legend=True,
        )
    return standalone(side_by_side(panels))
