"""Panels in this project's style: numbers, curves, bars and tables over Prometheus.

Widths and heights are in cells of Grafana's grid, 24 of them across. A colour ladder (``levels``)
begins with the colour below its first bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import bargauge, common, dashboard, stat, table, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery as AnyQuery
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = options.DataSourceRef(type_val="prometheus", uid="${datasource}")

COUNT = "short"
PER_SECOND = "suffix:/s"
SECONDS = "s"
BYTES = "bytes"
BYTES_PER_SECOND = "Bps"
SHARE = "percentunit"
JOULES = "joule"
CELSIUS = "celsius"

REPORT_STEP = "30s"
"""Devices report each minute: ``$__rate_interval`` is 4 of these and so sees a report of each."""

COLORS = {
    "whole network": {"whole network": "text"},
    "{{answered_by}}": {"exit": "green", "server": "blue", "fallback": "orange"},
    "{{outcome}}": {
        "answered": "green",
        "closed": "green",
        "extended": "orange",
        "abandoned": "red",
    },
    "{{state}}": {"online": "green", "offline": "red"},
}
"""Legend → colours of the names that it can give, the same on all dashboards."""

MISSED_SCRAPES_MS = 20_000
"""A gap as short as this is a scrape or two that failed, and is drawn over."""

Levels = Sequence[tuple[float | None, str]]
GOOD: Levels = ((None, "green"),)
PLAIN: Levels = ((None, "text"),)


@dataclass(frozen=True, slots=True)
class Curve:
    """An expression, and the name of what it gives: a legend with ``{{label}}``."""

    expr: str
    legend: str


def falling(warn: float, bad: float) -> Levels:
    """Green from ``warn`` up, red below ``bad``, orange between."""
    return ((None, "red"), (bad, "orange"), (warn, "green"))


def rising(warn: float, bad: float) -> Levels:
    """Green below ``warn``, red from ``bad`` up, orange between."""
    return ((None, "green"), (warn, "orange"), (bad, "red"))


def number(
    title: str,
    description: str,
    curve: Curve,
    *,
    unit: str = COUNT,
    levels: Levels = PLAIN,
    decimals: int | None = None,
    words: Mapping[str, str] | None = None,
    named: bool = False,
    width: int = 4,
) -> stat.Panel:
    """The last value, with its recent course behind it.

    ``words`` say it in place of the digits; ``named`` shows the legend, not the value.
    """
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(_queries([curve]))
        .span(width)
        .height(4)
        .unit(unit)
        .thresholds(_ladder(levels))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(options.BigValueGraphMode.NONE if named else options.BigValueGraphMode.AREA)
        .text_mode(options.BigValueTextMode.NAME if named else options.BigValueTextMode.VALUE)
    )
    if words is not None:
        panel.mappings([_in_words(words)])
    return panel if decimals is None else panel.decimals(decimals)


def graph(
    title: str,
    description: str,
    *curves: Curve,
    unit: str = COUNT,
    stacked: bool = False,
    low: float | None = 0,
    high: float | None = None,
    logarithmic: bool = False,
    levels: Levels = (),
    many: bool = False,
    absent: str = "",
    width: int = 8,
) -> timeseries.Panel:
    """Curves over time; ``levels`` are drawn as lines. ``many``: of which most stay at 0.

    ``absent`` is shown, not "No data", where there may well be no series: it says why.
    """
    stacking = options.StackingMode.NORMAL if stacked else options.StackingMode.NONE
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(_queries(curves))
        .span(width)
        .height(8)
        .unit(unit)
        .line_width(1 if stacked else 2)
        .fill_opacity(25 if stacked else 0)
        .show_points(options.VisibilityMode.NEVER)
        .span_nulls(MISSED_SCRAPES_MS)
        .stacking(common.StackingConfig().mode(stacking).group("A"))
        .legend(_legend(many=many))
        .tooltip(
            common.VizTooltipOptions()
            .mode(options.TooltipDisplayMode.MULTI)
            .sort(options.SortOrder.DESCENDING)
        )
    )
    for curve in curves:
        for name, color in COLORS.get(curve.legend, {}).items():
            fixed = {"mode": "fixed", "fixedColor": color}
            panel.override_by_name(name, [model.DynamicConfigValue(id_val="color", value=fixed)])
    if many:
        panel.axis_soft_max(0.1)
    if absent:
        panel.no_value(absent)
    if low is not None:
        panel.min(low)
    if high is not None:
        panel.max(high)
    if logarithmic:
        panel.scale_distribution(
            common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10)
        )
    if levels:
        panel.thresholds(_ladder(levels)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED)
        )
    return panel


def bars(
    title: str,
    description: str,
    curve: Curve,
    *,
    unit: str = COUNT,
    high: float | None = None,
    levels: Levels = GOOD,
    width: int = 8,
) -> bargauge.Panel:
    """One bar for each series, of its last value."""
    panel = (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(_queries([curve], instant=True))
        .span(width)
        .height(8)
        .unit(unit)
        .min(0)
        .thresholds(_ladder(levels))
        .orientation(options.VizOrientation.HORIZONTAL)
        .display_mode(options.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    return panel if high is None else panel.max(high)


def rows(
    title: str,
    description: str,
    key: str,
    columns: Mapping[str, tuple[str, str]],
    *,
    link: str = "",
) -> table.Panel:
    """A row for each value of the label ``key``.

    ``columns`` has an expression and a unit for each heading. A value of ``key`` leads to ``link``,
    in which ``${__value.text}`` stands for it.
    """
    curves = [Curve(expr, heading) for heading, (expr, _) in columns.items()]
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(_queries(curves, instant=True, form=PromQueryFormat.TABLE))
        .span(24)
        .height(9)
        .filterable(filterable=True)
        .min_width(80)
    )
    names = {f"Value #{_ref(number)}": heading for number, heading in enumerate(columns)}
    merge = model.DataTransformerConfig(id_val="merge", options={})
    panel.with_transformation(merge).with_transformation(
        model.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": {"Time": True},
                "renameByName": names,
                "indexByName": {key: 0},
            },
        )
    )
    for heading, (_, unit) in columns.items():
        panel.override_by_name(heading, [model.DynamicConfigValue(id_val="unit", value=unit)])
    if link:
        to_row = [{"title": f"{key} ${{__value.text}}", "url": link}]
        panel.override_by_name(key, [model.DynamicConfigValue(id_val="links", value=to_row)])
    return panel


def _queries(
    curves: Sequence[Curve],
    *,
    instant: bool = False,
    form: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> list[Builder[AnyQuery]]:
    queries: list[Builder[AnyQuery]] = []
    for position, curve in enumerate(curves):
        query = Dataquery().ref_id(_ref(position)).datasource(SOURCE).expr(curve.expr)
        query.legend_format(curve.legend).format(form)
        # What is chosen by $device_class or $device comes from devices.
        if "$device" in curve.expr:
            query.interval(REPORT_STEP)
        queries.append(query.instant() if instant else query.range())
    return queries


def _legend(*, many: bool) -> common.VizLegendOptions:
    legend = common.VizLegendOptions().show_legend(show_legend=True)
    if not many:
        return legend.display_mode(options.LegendDisplayMode.LIST).placement(
            options.LegendPlacement.BOTTOM
        )
    return (
        legend.display_mode(options.LegendDisplayMode.TABLE)
        .placement(options.LegendPlacement.RIGHT)
        .calcs(["max"])
        .sort_by("Max")
        .sort_desc(sort_desc=True)
    )


def _in_words(words: Mapping[str, str]) -> model.ValueMap:
    results = {
        value: model.ValueMappingResult(text=text, index=index)
        for index, (value, text) in enumerate(words.items())
    }
    return model.ValueMap(options=results)


def _ref(number: int) -> str:
    return chr(ord("A") + number)


def _ladder(levels: Levels) -> dashboard.ThresholdsConfig:
    steps = [model.Threshold(value=bound, color=color) for bound, color in levels]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)
