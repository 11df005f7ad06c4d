"""A fleet's roster as people read it, and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from coordinator.identity.fleet import Fleet, Listed, count
from coordinator.identity.roster import Claim
from coordinator.identity.standing import Expiry
from coordinator.updates.book import RolloutBook
from ops.units import MISSING

EVENTS = 10
MOST_COLUMNS = 500
_STYLES = {"ending": "yellow", "ended": "red", "awaited": "yellow", "revoked": "dim"}


def show_devices(fleet: Fleet, *, as_json: bool) -> None:
    """Print the devices."""
    devices, software = fleet.members(), _Software(fleet)
    if as_json:
        found = [_device(device) | software.of(device.member.name) for device in devices]
        print(json.dumps(found, indent=2))
        return
    table = _table("device", "certificate", "ends", "class", "serial", "software")
    for device in devices:
        member = device.member
        cells = (member.device_class, member.serial or MISSING, software.told(member.name))
        ends = _when(device.ends)[:10]
        style = _STYLES.get(device.condition, "")
        table.add_row(member.name, device.condition, ends, *cells, style=style)
    _console().print(table)


def show_status(fleet: Fleet, expiry: Expiry, *, as_json: bool) -> None:
    """Print what ends when, whose software is not the wanted one, and the last events."""
    members, claims = fleet.members(), fleet.roster.claims()
    devices, software = count(members), _Software(fleet)
    behind = [name for name in (listed.member.name for listed in members) if software.differs(name)]
    events = fleet.roster.events(EVENTS)
    if as_json:
        found = {
            "fleet": fleet.settings.name,
            "broker": fleet.settings.broker_url,
            "certificates": dict(expiry.certificates),
            "revocation_lists": dict(expiry.lists),
            "devices": devices,
            "tokens": [asdict(claim) for claim in claims],
            "software_differs": [{"device": name, **software.of(name)} for name in behind],
            "events": [asdict(event) for event in events],
        }
        print(json.dumps(found, indent=2))
        return
    console = _console()
    known = ", ".join(f"{number} {condition}" for condition, number in devices.items() if number)
    console.print(f"fleet {fleet.settings.name} at {fleet.settings.broker_url}: {known or 'empty'}")
    table = _table("ends", "what")
    for name, ends in sorted(expiry.certificates.items(), key=lambda item: item[1]):
        table.add_row(_when(ends), f"certificate of {name}")
    for name, ends in expiry.lists.items():
        table.add_row(_when(ends), f"revocation list, {name}")
    for claim in claims:
        table.add_row(_when(claim.ends), _token(claim), style="dim" if _is_over(claim) else "")
    console.print(table)
    if behind:
        other = _table("other software than wanted", "", "")
        for name in behind:
            other.add_row(name, software.told(name), software.of(name)["update_detail"] or "")
        console.print(other)
    happened = _table("last events", "", "")
    for event in events:
        happened.add_row(_when(event.time), f"{event.subject} {event.kind}", event.detail)
    console.print(happened)


class _Software:
    """What devices run, and what they should."""

    def __init__(self, fleet: Fleet) -> None:
        book = RolloutBook(fleet.roster, clock=time.time)
        self._reported, self._wanted = book.reported(), book.wanted()

    def of(self, device: str) -> dict[str, str | None]:
        """For JSON."""
        reported, wanted = self._reported.get(device), self._wanted.get(device)
        return {
            "version": None if reported is None else reported.version,
            "wanted_version": None if wanted is None else wanted.version,
            "update": None if reported is None else reported.state,
            "update_detail": None if reported is None else reported.detail,
        }

    def differs(self, device: str) -> bool:
        """Whether it should run another version than it says."""
        about = self.of(device)
        return about["wanted_version"] not in (None, about["version"])

    def told(self, device: str) -> str:
        """For a table: a version, and where another one is wanted which, and how that goes."""
        about = self.of(device)
        version = about["version"] or MISSING
        if not self.differs(device):
            return version
        return f"{version}, wanted {about['wanted_version']} ({about['update'] or 'not heard of'})"


def _device(device: Listed) -> dict[str, Any]:
    return asdict(device.member) | {"certificate": device.condition, "ends": device.ends}


def _token(claim: Claim) -> str:
    revoked = ", revoked" if claim.revoked is not None else ""
    return f"token claim.{claim.id}, {claim.used} of {claim.uses} used{revoked}"


def _is_over(claim: Claim) -> bool:
    return claim.revoked is not None or claim.used >= claim.uses or claim.ends <= time.time()


def _console() -> Console:
    """In a pipe nothing is cut off: a reader looks for whole names."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = MOST_COLUMNS
    return console


def _table(*names: str) -> Table:
    columns: Sequence[Column] = [Column(name, no_wrap=True) for name in names]
    return Table(*columns, box=None, pad_edge=False, header_style="bold")


def _when(moment: float | None) -> str:
    if moment is None:
        return MISSING
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%MZ}"
