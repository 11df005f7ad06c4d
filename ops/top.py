"""``splitfleet top``: a fleet in a terminal, live."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live

from coordinator.status import FleetStatus
from ops.errors import CoordinatorSilent
from ops.fleet_order import Order
from ops.fleet_rates import Meter, Rates
from ops.fleet_table import lines_around, page, show

Read = Callable[[], FleetStatus]
"""Raises :class:`CoordinatorSilent`."""
Pressed = Callable[[float], bool]
"""Waits so many seconds; whether somebody pressed q meanwhile."""


def top(read: Read, *, order: Order, interval_s: float, once: bool, console: Console) -> None:
    """Show the fleet until q or Ctrl-C; only once if wanted so, or if this is no terminal.

    Raises :class:`CoordinatorSilent` if nobody answers at first; later that is shown, and asked on.
    """
    meter = Meter()
    meter.update(read())
    try:
        if once or not console.is_terminal:
            time.sleep(interval_s)
            status = read()
            show(status, console, order=order, rates=meter.update(status))
            return
        with _keyboard() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            watch(read, live, meter, order=order, interval_s=interval_s, pressed=pressed)
    except KeyboardInterrupt:
        return


def watch(
    read: Read,
    live: Live,
    meter: Meter,
    *,
    order: Order,
    interval_s: float,
    pressed: Pressed,
) -> None:
    """Draw the fleet again and again until ``pressed``."""
    status: FleetStatus | None = None
    rates, note = Rates(), None
    while True:
        try:
            status = read()
            rates, note = meter.update(status), None
        except CoordinatorSilent as exc:
            note = str(exc)
        if status is not None:
            width, height = live.console.size
            rows = max(1, height - lines_around(status, width=width) - (2 if note else 0))
            live.update(
                page(status, order=order, rates=rates, rows=rows, note=note),
                refresh=True,
            )
        if pressed(interval_s):
            return


@contextlib.contextmanager
def _keyboard() -> Iterator[Pressed]:
    """Keys as they are pressed, not echoed; without a keyboard only time passes."""
    if not sys.stdin.isatty():
        yield _never
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _never(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _pressed(seconds: float) -> bool:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        ready, _, _ = select.select([sys.stdin], [], [], left)
        if ready:
            typed = os.read(sys.stdin.fileno(), 64)
            if not typed or b"q" in typed.lower():
                return True
    return False
