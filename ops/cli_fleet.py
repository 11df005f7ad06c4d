"""The commands ``splitfleet status``, ``splitfleet top`` and ``splitfleet log-level``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.fleet_order import Order

if TYPE_CHECKING:
    from ops.http_place import Place

Url = Annotated[
    str, typer.Option(help="the coordinator's --metrics-host and --metrics-port: HOST:PORT or URL")
]
Sort = Annotated[Order, typer.Option(help="what devices are sorted by")]
LOCAL = "http://127.0.0.1:9464"


def register(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command()(status)
    app.command()(top)
    app.command("log-level")(log_level)


def status(
    *,
    url: Url = LOCAL,
    sort: Sort = Order.name,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Say how a fleet is: its run, its round and its devices."""
    from ops import fleet_status

    fleet_status.status(_place(url), order=sort, as_json=as_json)


def top(
    *,
    url: Url = LOCAL,
    sort: Sort = Order.name,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="seconds between two looks")
    ] = 2.0,
    once: Annotated[bool, typer.Option(help="print one table and end")] = False,
) -> None:
    """Watch a fleet live: devices, states, rates, losses, bytes; q or Ctrl-C ends it."""
    from functools import partial

    from rich.console import Console

    from ops import fleet_status
    from ops import top as watching

    read = partial(fleet_status.read, _place(url))
    watching.top(read, order=sort, interval_s=interval, once=once, console=Console())


def log_level(
    level: Annotated[
        str | None,
        typer.Argument(help="debug, info, warning, error, or default: that of the settings"),
    ] = None,
    *,
    state_dir: Annotated[Path, typer.Option(help="the coordinator's --state-dir")] = Path(
        "coordinator-state"
    ),
    device: Annotated[str | None, typer.Option(help="of this device's log")] = None,
    all_devices: Annotated[bool, typer.Option(help="of every device's log")] = False,
) -> None:
    """Change how much is logged while the fleet runs; without LEVEL say what was chosen.

    A running coordinator follows within a second and tells the devices; one that is started later
    at its start.
    """
    from ops import log_level as levels

    if level is None:
        levels.show(state_dir)
    else:
        levels.choose(state_dir, level, device=device, all_devices=all_devices)


def _place(url: str) -> Place:
    from ops.fleet_status import DEFAULT_PORT
    from ops.http_place import parse_place

    return parse_place(url, flag="--url", default_port=DEFAULT_PORT)
