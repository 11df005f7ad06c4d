"""A fleet's status as people read it: a few lines and a table that fit 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from coordinator.status import DeviceStatus, FleetStatus, RoundStatus
from ops.fleet_order import Order, ordered
from ops.fleet_rates import DeviceRates, Rates
from ops.units import MISSING, amount, percent, seconds, short_size

LATE_S = 90.0
"""A device that is online and has not been heard of for so long stands out."""
MOST_NAMED = 5
"""So many of the devices that broke rules are named above the table."""


def show(
    status: FleetStatus, console: Console, *, order: Order, rates: Rates | None = None
) -> None:
    """Print all of it."""
    console.print(page(status, order=order, rates=rates))


def page(
    status: FleetStatus,
    *,
    order: Order,
    rates: Rates | None = None,
    rows: int | None = None,
    note: str | None = None,
) -> RenderableType:
    """With ``rates`` samples and bytes are per second, else totals; at most ``rows`` devices."""
    shown = ordered(status.devices, order, rates)[:rows]
    parts: list[RenderableType] = [Text(line, overflow="fold") for line in _lines(status, rates)]
    if not status.health.ok:
        parts.append(Text(f"problem: {status.health.problem}", style="bold red"))
    if note is not None:
        parts.append(Text(note, style="bold red"))
    parts.append(_table(shown, rates))
    hidden = status.known - len(shown)
    if hidden:
        parts.append(Text(f"and {hidden} more", style="dim"))
    return Group(*parts)


def lines_around(status: FleetStatus, *, width: int) -> int:
    """How many lines a page has besides its devices, in a terminal of this width."""
    return 4 + sum(1 + len(line) // max(1, width) for line in _lines(status, None))


def _lines(status: FleetStatus, rates: Rates | None) -> list[str]:
    pinned = ", pinned" if status.serving.pinned else ""
    held = f", {status.quarantined} in quarantine" if status.quarantined else ""
    facts = (
        f"{status.online} of {status.known} devices online{held}",
        f"version {status.serving.version} serves{pinned}",
        f"broker {'connected' if status.health.broker_connected else 'away'}",
        f"up {seconds(status.uptime_s)}",
    )
    lines = [
        f"fleet {status.fleet}, run {status.run}, {status.phase}, version {status.version}",
        "; ".join(facts),
    ]
    if status.round is not None:
        lines += _round(status.round, status.rounds)
    if status.closed is not None and status.closed.server_accuracy is not None:
        scores = [f"full network {percent(status.closed.server_accuracy)}"]
        if status.closed.exit_accuracy:
            scores.append(f"exits {_by_cut(status.closed.exit_accuracy, percent)}")
        lines.append(f"after round {status.closed.number}: {', '.join(scores)}")
    lines += _breaches(status.devices)
    answers = status.predictions if rates is None else rates.predictions
    per = "" if rates is None else "/s"
    if any(status.predictions.values()):
        parts = ", ".join(f"{who} {amount(images)}" for who, images in answers.items())
        lines.append(f"images answered{per}: {parts}")
    flows = status.bytes if rates is None else rates.bytes
    return lines + [line for direction in ("up", "down") for line in _flow(direction, flows, per)]


def _round(current: RoundStatus, rounds: int) -> list[str]:
    again = f", attempt {current.attempt + 1}" if current.attempt else ""
    facts = [
        f"round {current.number} of {rounds}{again}",
        f"{current.batches:,} of {current.quota:,} batches",
        f"{current.finished} of {current.participants} devices done",
        seconds(current.seconds),
    ]
    if current.deadline_s is not None:
        facts.append(f"{seconds(max(0.0, current.deadline_s))} left")
    losses = _by_cut(current.loss, "{:.2f}".format)
    return [", ".join(facts), *([f"whole network's loss {losses}"] if losses else [])]


def _breaches(devices: Sequence[DeviceStatus]) -> list[str]:
    """Who broke rules, in one line, if any did: those in quarantine first, then by how often."""
    found = sorted(
        (device for device in devices if device.breaches or device.quarantine_s),
        key=lambda device: (not device.quarantine_s, -device.breaches, device.name),
    )
    parts = [
        f"{device.name} {device.breaches:,}{f' ({_held(device)})' if device.quarantine_s else ''}"
        for device in found[:MOST_NAMED]
    ]
    if len(found) > MOST_NAMED:
        parts.append(f"{len(found) - MOST_NAMED} more")
    return [f"breaches: {', '.join(parts)}"] if parts else []


def _held(device: DeviceStatus) -> str:
    return f"held {_ago(device.quarantine_s)}"


def _by_cut(values: Mapping[str, float], text: Callable[[float], str]) -> str:
    return "  ".join(f"{cut}: {text(value)}" for cut, value in values.items())


def _flow(direction: str, flows: Mapping[str, float], per: str) -> list[str]:
    """Bytes that go this way by role, in one line, if any do."""
    sizes = {
        role.partition("/")[2]: size
        for role, size in flows.items()
        if role.startswith(f"{direction}/")
    }
    parts = ", ".join(f"{role} {short_size(size)}" for role, size in sizes.items())
    return [f"bytes {direction}{per}: {parts}"] if parts else []


def _table(devices: list[DeviceStatus], rates: Rates | None) -> Table:
    per = "" if rates is None else "/s"
    table = Table(
        Column("device", no_wrap=True, overflow="ellipsis", ratio=1, min_width=8),
        *(
            Column(name, justify="right", no_wrap=True)
            for name in ("cut", "state", "heard", f"samples{per}", "loss", "exits")
        ),
        Column(f"up{per}", justify="right", no_wrap=True),
        Column(f"down{per}", justify="right", no_wrap=True),
        box=None,
        pad_edge=False,
        expand=True,
        header_style="bold",
    )
    for device in devices:
        table.add_row(*_cells(device, rates), style=_style(device))
    return table


def _cells(device: DeviceStatus, rates: Rates | None) -> list[str]:
    if rates is None:
        samples = device.samples + device.open_samples
        of = DeviceRates(samples, device.bytes_up, device.bytes_down)
    else:
        of = rates.of(device.name)
    return [
        device.name,
        _cut(device),
        _held(device) if device.quarantine_s else device.state,
        _ago(device.heard_s),
        amount(of.samples),
        MISSING if device.exit_loss is None else f"{device.exit_loss:.2f}",
        _exits(device.predictions),
        MISSING if of.up is None else short_size(of.up),
        MISSING if of.down is None else short_size(of.down),
    ]


def _cut(device: DeviceStatus) -> str:
    cut = MISSING if device.cut is None else str(device.cut)
    return f"{cut} lite" if device.frozen else cut


def _exits(predictions: Mapping[str, int]) -> str:
    """The share of a device's answers that its exit gave, because it was sure."""
    answers = sum(predictions.values())
    return f"{100 * predictions.get('exit', 0) / answers:.0f} %" if answers else MISSING


def _style(device: DeviceStatus) -> str:
    if device.quarantine_s:
        return "red"
    if device.state == "offline":
        return "dim"
    return "yellow" if device.heard_s is None or device.heard_s > LATE_S else ""


def _ago(duration: float | None) -> str:
    """Whole units, few characters: 42 s, 7 min, 3 h."""
    if duration is None:
        return MISSING
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if duration >= length:
            return f"{duration / length:.0f} {unit}"
    return f"{duration:.0f} s"
