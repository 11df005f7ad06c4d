"""Curves of an experiment over images trained on: of the full network, and of each exit."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from ops.charts import Series, line_chart, share_range, standalone
from ops.experiments.one_run import Record
from ops.experiments.tables import Results, cuts_of
from ops.units import percent

STYLES = 9


def curves(results: Results, pick: Callable[[Record], float | None], name: str) -> str:
    """An SVG: one line for each arm, the mean over its seeds, at each point of its curve."""
    series = []
    for index, (arm, runs) in enumerate(results.items()):
        histories = [result["history"] for result in runs.values()]
        points, images = [], 0.0
        for records in zip(*histories, strict=False):
            images += statistics.fmean(record["samples"] for record in records)
            values = [value for record in records if (value := pick(record)) is not None]
            if values:
                points.append((images, statistics.fmean(values)))
        if points:
            style = f"c{index % STYLES}" + (" dashed" if index >= STYLES else "")
            series.append(Series(arm, style, points))
    last = max((points[0] for line in series for points in line.points), default=1.0)
    chart = line_chart(
        series,
        name=name,
        x_label="images trained on, in thousands",
        x_range=(0, last),
        y_range=share_range(y for line in series for _, y in line.points),
        x_format=lambda x: f"{x / 1000:g}",
        y_format=percent,
        legend=True,
    )
    return standalone(chart)


def offload_plot(result: Record) -> str:
    """An SVG: accuracy of device and server together against what is offloaded, for each exit."""
    rows = result["exits"]
    series = [
        Series(
            f"cut {row['cut']}",
            f"c{index % STYLES}",
            [(point["offload_rate"], point["accuracy"]) for point in row["curve"]],
        )
        for index, row in enumerate(rows)
    ]
    chart = line_chart(
        series,
        name="Accuracy by offload rate",
        x_label="offloaded, % of the images that judge",
        x_range=(0.0, 1.0),
        y_range=share_range(y for line in series for _, y in line.points),
        x_format=lambda x: f"{100 * x:g}",
        y_format=percent,
        legend=True,
    )
    return standalone(chart)


def all_plots(results: Results, reference: str) -> dict[str, str]:
    """File name → SVG; offloading is that of the reference with its first seed."""
    plots = {"full.svg": curves(results, lambda record: record.get("full"), "Full network")}
    for cut in cuts_of(results):
        plots[f"exit-{cut}.svg"] = curves(results, _exit(cut), f"Exit at cut {cut}")
    for _, result in sorted(results.get(reference, {}).items())[:1]:
        plots["offload.svg"] = offload_plot(result)
    return plots


def _exit(cut: int) -> Callable[[Record], float | None]:
    return lambda record: record.get("exits", {}).get(str(cut))
