"""What all dashboards have in common: variables, links to each other, marks of alerts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

from ops.dashboards.panels import SOURCE
from ops.dashboards.promql import series

TAG = "splitfleet"
BY_PLACE = "splitfleet_prediction_requests_total"
"""Has every cut layer and device class that has reported."""
BY_DEVICE = "splitfleet_predictions_total"
"""Has every device that is shown by name."""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading, from left to right, 24 cells across."""

    title: str
    panels: Sequence[Builder[model.Panel]]


def page(
    name: str,
    title: str,
    description: str,
    rows: Sequence[Row],
    *,
    variables: Sequence[dashboard.QueryVariable],
) -> model.Dashboard:
    """The dashboard at ``/d/splitfleet-NAME``; ``variables`` are those beside the coordinator."""
    made = (
        dashboard.Dashboard(f"splitfleet: {title}")
        .uid(uid(name))
        .description(description)
        .tags([TAG])
        .version(1)
        .readonly()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .annotation(_alerts())
        .link(_others())
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )
    for variable in (_coordinator(), *variables):
        made.with_variable(variable)
    for row in rows:
        made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            made.with_panel(panel)
    built = made.build()
    for number, placed in enumerate(built.panels or [], start=1):
        placed.id_val = number
    return built


def uid(name: str) -> str:
    """What Grafana and links know a dashboard by."""
    return f"{TAG}-{name}"


def link_to(name: str, *chosen: str) -> str:
    """The address of a dashboard: same coordinator, same time, and ``chosen``: ``var-x=y``."""
    kept = ("${datasource:queryparam}", "${coordinator:queryparam}", "${__url_time_range}")
    return f"/d/{uid(name)}?{'&'.join((*kept, *chosen))}"


def cut() -> dashboard.QueryVariable:
    """``$cut``: one cut layer, several, or all."""
    return _several("cut", "Cut layer")


def device_class() -> dashboard.QueryVariable:
    """``$device_class``: one class of devices, several, or all."""
    return _several("device_class", "Device class")


def device() -> dashboard.QueryVariable:
    """``$device``: one of those that are shown by name; ``other`` is the rest together."""
    return _query("device", "Device", f"label_values({series(BY_DEVICE)}, device)")


def _coordinator() -> dashboard.QueryVariable:
    return _query("coordinator", "Coordinator", "label_values(splitfleet_round, instance)")


def _several(label: str, title: str) -> dashboard.QueryVariable:
    everything = model.VariableOption(selected=True, text=["All"], value=["$__all"])
    return (
        _query(label, title, f"label_values({series(BY_PLACE)}, {label})")
        .multi(multi=True)
        .include_all(include_all=True)
        .all_value(".*")
        .current(everything)
    )


def _query(name: str, title: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(title)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .definition(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.NATURAL_ASC)
    )


def _alerts() -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name("Alerts")
        .datasource(SOURCE)
        .enable(enable=True)
        .hide(hide=False)
        .icon_color("red")
        .expr(series("ALERTS", 'alertstate="firing"', 'alertname=~"Splitfleet.*"'))
        .title_format("{{alertname}}")
        .tag_keys("severity")
        .step("15s")
    )


def _others() -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink("splitfleet")
        .type(model.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(as_dropdown=False)
        .include_vars(include_vars=True)
        .keep_time(keep_time=True)
    )
