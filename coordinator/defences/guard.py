"""How much a device may send, and what becomes of one that does not keep to the rules.

Messages are counted as packets, before they are put together, so that what is too much costs no
memory. Breaches are counted for each device; with too many of them in a while it is in quarantine
for a while, twice as long each time.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from broker.topics import Address
from coordinator.defences.settings import DefenceSettings
from coordinator.observer import Observer

log = logging.getLogger("splitfleet.coordinator")

LINK_BREACHES = frozenset({"corrupt", "invalid", "malformed", "oversized", "reassembly_full"})
"""Reasons of dropped messages that only their sender can be the cause of."""
NO_BREACH = frozenset(
    {
        "diverged",
        "late",
        "not_computable",
        "outlier_loss",
        "quarantined",
        "unanswered",
        "wrong_version",
    }
)
"""Reasons of refused batches that may befall a device that does as it is told."""
ROSTER_KINDS = frozenset({"enrol", "renew", "software"})
"""Messages for which the roster's file is locked, and often written."""
RATE_LIMITED, QUARANTINED = "rate_limited", "quarantined"


@dataclass(slots=True)
class Bucket:
    """A token bucket: in any time T no more than ``rate`` · (``burst_s`` + T), and it starts full.

    A rate of 0 is no limit.
    """

    rate: float
    burst_s: float
    _left: float = field(default=-1.0)
    _seen: float = field(default=0.0)

    def take(self, amount: float, now: float) -> bool:
        """Whether so much may pass now; then it is taken."""
        if not self.rate:
            return True
        full = self.rate * self.burst_s
        gained = self.rate * (now - self._seen)
        self._left = full if self._left < 0 else min(full, self._left + gained)
        self._seen = now
        if amount > self._left:
            return False
        self._left -= amount
        return True


@dataclass(slots=True)
class _Record:
    """What is known of a device."""

    packets: Bucket
    size: Bucket
    roster: Bucket
    answers: Bucket
    breaches: deque[float] = field(default_factory=deque)
    """When they were, those within the window."""
    total: int = 0
    times: int = 0
    """How often in a row it was in quarantine."""
    until: float = 0.0
    slowed: float = float("-inf")
    """When it was last held to be over its rate."""


class Guard:
    """Lets messages pass, counts breaches, and keeps devices in quarantine. For any thread."""

    def __init__(
        self,
        settings: DefenceSettings,
        *,
        devices: int,
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._devices = devices
        self._observer = observer
        self._clock = clock
        self._lock = threading.RLock()
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._held: dict[str, float] = {}
        self._begun: list[str] = []

    def admit(self, address: Address, size: int) -> str | None:
        """Why a packet of so many bytes shall be dropped; None if it shall not.

        What a device in quarantine says of being there still passes, within its rate.
        """
        if address.device is None:
            return None
        with self._lock:
            now, record = self._clock(), self._record(address.device)
            if record.until > now and address.kind != "status":
                return QUARANTINED
            usual = record.packets.take(1, now) and record.size.take(size, now)
            if usual and (address.kind not in ROSTER_KINDS or record.roster.take(1, now)):
                return None
            if now >= record.slowed + 1.0:  # a breach for each second of it
                record.slowed = now
                self.breach(address.device, RATE_LIMITED)
            return RATE_LIMITED

    def answers(self, device: str, size: int) -> bool:
        """Whether a device that asks may have so many bytes now; then they are taken.

        An answer that is larger than what it may have at once takes all of that.
        """
        settings = self._settings
        most = settings.device_answer_bytes_per_s * settings.device_burst_s
        with self._lock:
            return self._record(device).answers.take(min(size, most), self._clock())

    def dropped(self, reason: str, device: str | None) -> None:
        """The link has dropped a message."""
        if device is not None and reason in LINK_BREACHES:
            self.breach(device, reason)

    def refused(self, device: str, reason: str) -> None:
        """A batch was not trained on."""
        if reason not in NO_BREACH:
            self.breach(device, reason)

    def breach(self, device: str, reason: str) -> None:
        """A device broke a rule."""
        self._observer.breach(reason)
        settings = self._settings
        with self._lock:
            now, record = self._clock(), self._record(device)
            record.total += 1
            record.breaches.append(now)
            while record.breaches[0] <= now - settings.breach_window_s:
                record.breaches.popleft()
            if record.until > now or len(record.breaches) < settings.breach_limit:
                return
            if not settings.quarantine_s or "." in device:  # a claim, which many share
                record.breaches.clear()
                return
            self._hold(device, record, now, reason)

    def is_held(self, device: str) -> bool:
        """Whether it is in quarantine."""
        return self.remaining(device) > 0

    def remaining(self, device: str) -> float:
        """Seconds that it is still in quarantine."""
        with self._lock:
            return max(0.0, self._held.get(device, 0.0) - self._clock())

    def breaches(self, device: str) -> int:
        """How often it broke a rule since it was first heard of, as far as that is remembered."""
        with self._lock:
            record = self._records.get(device)
            return 0 if record is None else record.total

    # -- what the machine has to do ---------------------------------------------------------------

    @property
    def due(self) -> float | None:
        """When :meth:`changes` has something, on the clock."""
        with self._lock:
            return self._clock() if self._begun else min(self._held.values(), default=None)

    def changes(self) -> tuple[list[str], list[str]]:
        """Devices whose quarantine has begun, and whose has ended, since the last call."""
        with self._lock:
            now = self._clock()
            begun, self._begun = self._begun, []
            ended = [device for device, until in self._held.items() if until <= now]
            for device in ended:
                del self._held[device]
                log.info("%s is out of quarantine", device, extra={"device": device})
            if begun or ended:
                self._observer.quarantined(len(self._held))
            return begun, ended

    # -- inside -----------------------------------------------------------------------------------

    def _hold(self, device: str, record: _Record, now: float, reason: str) -> None:
        settings = self._settings
        if now > record.until + settings.quarantine_max_s:
            record.times = 0
        seconds = min(settings.quarantine_max_s, settings.quarantine_s * 2.0**record.times)
        record.times = min(record.times + 1, 64)
        record.until = self._held[device] = now + seconds
        self._begun.append(device)
        log.warning(
            "%s is in quarantine for %.0f s: it broke rules %d times within %.0f s, last: %s",
            device,
            seconds,
            len(record.breaches),
            settings.breach_window_s,
            reason,
            extra={"device": device, "reason": reason},
        )
        record.breaches.clear()

    def _record(self, device: str) -> _Record:
        record = self._records.get(device)
        if record is None:
            settings = self._settings
            record = self._records[device] = _Record(
                Bucket(settings.device_packets_per_s, settings.device_burst_s),
                Bucket(settings.device_bytes_per_s, settings.device_burst_s),
                Bucket(settings.device_roster_messages_per_s, settings.device_burst_s),
                Bucket(settings.device_answer_bytes_per_s, settings.device_burst_s),
            )
            while len(self._records) > self._devices:
                self._forget_one()
        self._records.move_to_end(device)
        return record

    def _forget_one(self) -> None:
        """Forget who was heard of longest ago, and is not in quarantine if there is such a one."""
        free = (device for device in self._records if device not in self._held)
        device = next(free, None) or next(iter(self._records))
        del self._records[device]
