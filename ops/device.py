"""What a device knows of itself: ``splitfleet device``."""

from __future__ import annotations

import json
import time
from pathlib import Path

from edge_agent.errors import IdentityError
from edge_agent.identity.clock import ClockFloor
from edge_agent.identity.folder import IdentityFolder
from edge_agent.identity.keys import common_name, issued_by, valid_until
from edge_agent.identity.names import read_board


def show_identity(folder: Path, *, as_json: bool) -> None:
    """Print a device's name, and how long it may stay and come back.

    Raises ``IdentityError`` for files that are missing, damaged or do not belong together.
    """
    identity = IdentityFolder(folder)
    certificate, back = identity.certificate(), identity.for_enrolment()
    authorities = identity.authorities()
    if certificate is not None and not any(issued_by(certificate, one) for one in authorities):
        raise IdentityError(
            f"{identity.device_file} is not signed by the authority in {identity.ca_file}, which "
            "is what the broker is known by: put files of one fleet together"
        )
    name = read_board().device_name("") if certificate is None else common_name(certificate)
    floor = ClockFloor(identity)
    ends = None if certificate is None else valid_until(certificate)
    facts = {
        "device": name,
        "enrolled": certificate is not None,
        "certificate_ends": ends,
        "ended": ends is not None and floor.now() >= ends,
        "enrols_as": back.name,
        "clock_floor": floor.floor,
    }
    if as_json:
        print(json.dumps(facts))
        return
    if ends is None:
        print(f"not enrolled yet; has the token {back.name}, its board says {name}")
    else:
        word = "ended" if facts["ended"] else "ends"
        print(f"{name}: the certificate {word} {_format(ends)}; comes back as {back.name}")


def show_clock(folder: Path, *, set_it: bool) -> None:
    """Print the clock's floor; with ``set_it`` set the system's clock to it if that is before.

    Raises ``IdentityError`` if this user may not set it.
    """
    floor = ClockFloor(IdentityFolder(folder))
    done = set_it and floor.set_system_clock()
    print(f"{_format(floor.floor)}{', and so is the clock now' if done else ''}")


def _format(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
