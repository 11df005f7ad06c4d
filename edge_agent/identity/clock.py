"""The floor of a clock: a time that is certainly past, for devices whose clock stops with them.

Without a battery a clock starts in 1970, or where it stopped, and no certificate is valid then. Of
what a device has, this is certain: it is later than the release of this software, than the day
its certificates begin, and than the last time that it was told by the coordinator, or had itself
while a broker whose certificate held by it accepted the connection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from edge_agent.disk import write_file
from edge_agent.errors import IdentityError, StateError
from edge_agent.identity.folder import IdentityFolder
from edge_agent.identity.keys import certificates_from_pem, valid_from

log = logging.getLogger("splitfleet.identity")

RELEASED = 1_767_225_600.0
"""2026-01-01: this software is not older."""
_LATEST = 4_102_444_800.0
"""2100-01-01: what says that it is later has lost its mind, or wants a device to."""
_COARSE_S = 60.0
"""The kept floor is not rewritten for less."""


class ClockFloor:
    """The time of day, never before what is certain; seconds since 1970."""

    def __init__(self, folder: IdentityFolder, *, wall: Callable[[], float] = time.time) -> None:
        self._file = folder.clock_file
        self._wall = wall
        self._kept = _kept(self._file)
        known = (folder.device_file, folder.return_file, folder.claim_file, folder.ca_file)
        self.floor = max(RELEASED, self._kept, *(_begins(path) for path in known))

    def now(self) -> float:
        """The system's clock, or the floor if that is later."""
        return max(self._wall(), self.floor)

    def confirm(self, now: float | None = None) -> None:
        """Raise the floor to ``now``, told by the coordinator, or to the clock, which held.

        It is kept for the next start; a disk that will not have it is only complained of.
        """
        certain = self._wall() if now is None else now
        if certain < _LATEST:
            self.floor = max(self.floor, certain)
        if self.floor < self._kept + _COARSE_S:
            return
        try:
            write_file(self._file, f"{self.floor:.0f}\n".encode())
        except StateError as exc:
            log.warning("the clock's floor is not kept: %s", exc)
        else:
            self._kept = self.floor

    def set_system_clock(self) -> bool:
        """Set the machine's clock to the floor if it is before it; says whether it was.

        Raises :class:`IdentityError` if this process may not.
        """
        if self._wall() >= self.floor:
            return False
        try:
            time.clock_settime(time.CLOCK_REALTIME, self.floor)
        except OSError as exc:
            raise IdentityError(
                f"cannot set the clock: {exc.strerror}; run this as root, as in ExecStartPre=+"
            ) from exc
        return True


def _kept(path: Path) -> float:
    try:
        kept = float(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0.0
    return kept if 0 <= kept < _LATEST else 0.0


def _begins(path: Path) -> float:
    """When the certificates of a file begin; 0 for none: who needs them will complain."""
    try:
        return max(valid_from(one) for one in certificates_from_pem(path.read_bytes()))
    except (OSError, ValueError):
        return 0.0
