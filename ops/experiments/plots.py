"""Curves of an experiment: accuracy of the full network, and of each cut's exit, over samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from ops.charts import Series, legend_below, line_chart, share_range, standalone
from ops.experiments.one_run import Record
from ops.experiments.tables import Results, cuts_of
from ops.units import percent

STYLES = 9


def curves(results: Results, pick: Callable[[Record], float | None], name: str) -> str:
    """An SVG: one line for each arm, the mean over its seeds, after each round."""
    series = []
    for index, (arm, runs) in enumerate(results.items()):
        histories = [result["history"] for result in runs.values()]
        points = []
        for records in zip(*histories, strict=False):
            values = [value for record in records if (value := pick(record)) is not None]
            if values:
                points.append((float(records[0]["round"]), statistics.fmean(values)))
        if points:
            style = f"c{index % STYLES}" + (" dashed" if index >= STYLES else "")
            series.append(Series(arm, style, points))
    last = max((points[0] for line in series for points in line.points), default=1.0)
    chart = line_chart(
        series,
        name=name,
        x_label="round",
        x_range=(1, last),
        y_range=share_range(y for line in series for _, y in line.points),
        x_format=lambda x: f"{x:.0f}",
        y_format=percent,
        whole_x=True,
    )
    return standalone(legend_below(chart, series))


def all_plots(results: Results) -> dict[str, str]:
    """File name → SVG."""
    plots = {"full.svg": curves(results, lambda record: record.get("full"), "Full network")}
    for cut in cuts_of(results):
        plots[f"exit-{cut}.svg"] = curves(results, _exit(cut), f"Exit at cut {cut}")
    return plots


def _exit(cut: int) -> Callable[[Record], float | None]:
    return lambda record: record.get("exits", {}).get(str(cut))
