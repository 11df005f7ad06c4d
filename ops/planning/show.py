"""A plan for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ops.units import MISSING, byte_size, milliseconds, percent, seconds


def show(plan: Mapping[str, Any], console: Console) -> None:
    """Print it."""
    console.print(_classes(plan))
    console.print(_facts(plan))
    if "check" in plan:
        console.print(_check(plan["check"]))
    for warning in plan["warnings"]:
        console.print(f"[yellow]note:[/yellow] {escape(warning)}")
    advice = plan["advice"]
    how = advice["strategy"]
    if advice["aggregation"] == "buffered":
        how += ", without a barrier (buffered)"
    console.print(f"\n[bold]advice: {how}[/bold]")
    for reason in advice["reasons"]:
        console.print(f"- {escape(reason)}")
    for helps in advice["helps"]:
        console.print(f"- {helps['change']}: rounds of {seconds(helps['round_s'])}")
    console.print("\n[bold]settings[/bold]")
    print(toml(plan), end="")


def toml(plan: Mapping[str, Any]) -> str:
    """The settings to paste: the coordinator's, and for each class those of its agents."""
    settings = dict(plan["settings"])
    network = settings.pop("network")
    lines = ["# coordinator.toml", "[coordinator]"]
    lines += [f"{key} = {_value(value)}" for key, value in settings.items()]
    lines += ["", "[coordinator.network]"]
    lines += [f"{key} = {_value(value)}" for key, value in network.items()]
    for entry in plan["classes"]:
        cuts = entry["cuts"]
        lines.append("")
        if len(cuts) == 1:
            lines.append(f"# agent.toml of class {entry['name']}")
            lines += ["# [agent]", f"# cut = {next(iter(cuts))}"]
        else:
            lines.append(f"# agents of class {entry['name']}: {_cuts(cuts)}; each device: --json")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _classes(plan: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"{plan['devices']} devices, profile {escape(plan['profile'])}, seed {plan['seed']}"
    )
    for column in ("class", "cut"):
        table.add_column(column)
    for column in ("devices", "a batch", "median of a round", "slowest", "memory"):
        table.add_column(column, justify="right")
    for column in ("up a month", "down a month"):
        table.add_column(column, justify="right")
    for entry in plan["classes"]:
        table.add_row(
            escape(entry["name"]),
            _cuts(entry["cuts"]),
            str(entry["devices"]),
            milliseconds(entry["step_ms"]),
            f"{seconds(entry['median_s'])}, {percent(entry['share_of_round'])}",
            seconds(entry["slowest_s"]),
            f"{entry['memory_mb']:,.0f} of {entry['memory_limit_mb']:,.0f} MiB",
            byte_size(entry["month_up_bytes"]),
            byte_size(entry["month_down_bytes"]),
        )
    return table


def _facts(plan: Mapping[str, Any]) -> Table:
    table = Table(show_header=False)
    server = plan["server"]
    round_s = plan["round_s"]
    predicted = "none would close" if round_s is None else seconds(round_s)
    table.add_row("predicted round", predicted)
    table.add_row("bottleneck", escape(plan["bottleneck"]))
    memory = f"{server['memory_mb']:,.0f} MiB"
    table.add_row("server", f"busy {percent(server['load'])}, {memory} with the strategy as set")
    month = plan["month_bytes"]
    table.add_row(
        f"bytes a month, {plan['rounds_per_day']:g} rounds a day",
        f"fleet {byte_size(month['fleet_up'])} up, {byte_size(month['fleet_down'])} down; "
        f"a device at most {byte_size(month['most_of_a_device'])}",
    )
    if plan["skew"] is not None:
        skew = plan["skew"]
        table.add_row(
            "labels",
            f"{skew['level']}: distance {skew['distance']:.2f}, {skew['by_chance']:.2f} by chance",
        )
    for entry in plan["compared"]:
        table.add_row(
            escape(entry["how"]),
            f"{seconds(entry['round_s'])} a round, server busy {percent(entry['server_load'])}, "
            f"cuts {_cuts(entry['cuts'])}",
        )
    return table


def _check(check: Mapping[str, Any]) -> Table:
    table = Table(title="predicted and simulated seconds of a round")
    for column in ("predicted", "simulated, all on", "error", "simulated with failures"):
        table.add_column(column, justify="right")
    error, failing = check["error"], check["with_failures_s"]
    table.add_row(
        _round(check["predicted_s"]),
        _round(check["simulated_s"]),
        MISSING if error is None else f"{100 * error:+.1f} %",
        MISSING if failing is None else _round(failing),
    )
    return table


def _round(duration: float | None) -> str:
    return "none closes" if duration is None else f"{duration:.2f}"


def _cuts(cuts: Mapping[str, int]) -> str:
    if len(cuts) == 1:
        return next(iter(cuts))
    return ", ".join(f"{cut} ({count})" for cut, count in cuts.items())
