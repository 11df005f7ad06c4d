"""Bytes by direction, role and device, counted where they cross the coordinator's link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from broker.topics import SYSTEM, Address

ROLES = {
    "activations": "activation",
    "gradients": "gradient",
    "parameters": "parameter",
    "features": "feature",
    "prediction": "prediction",
}
"""Kind of message → role; every other kind is ``control``."""

BROKER_FIGURES = {
    f"{SYSTEM}broker/publish/messages/dropped": "messages_dropped",
    f"{SYSTEM}broker/clients/connected": "clients",
    f"{SYSTEM}broker/store/messages/count": "stored_messages",
    f"{SYSTEM}broker/store/messages/bytes": "stored_bytes",
}
"""Topic of Mosquitto's → what is kept of it."""

Key = tuple[str, str, str]


class Traffic:
    """A ``LinkObserver`` that counts application payload; ``up`` is towards the coordinator.

    Keys are (direction, role, device); a broadcast has the device ``cut-{layer}`` or ``all``. What
    the broker says of itself is kept, too.
    """

    def __init__(self, on_drop: Callable[[str], None]) -> None:
        self.bytes: Counter[Key] = Counter()
        self.broker: dict[str, int] = {}
        """Values of ``BROKER_FIGURES``, as far as the broker says them."""
        self.overruns: Callable[[], int] = lambda: 0
        """Messages of QoS 0 that the link dropped, because they came too fast."""
        self.blame: Callable[[str, str | None], None] = lambda _reason, _device: None
        """Told why a message was dropped, and whose it was."""
        self._on_drop = on_drop

    def sent(self, address: Address, size: int) -> None:
        """Count what went down."""
        self.bytes["down", ROLES.get(address.kind, "control"), _party(address)] += size

    def received(self, address: Address, size: int) -> None:
        """Count what came up."""
        self.bytes["up", ROLES.get(address.kind, "control"), _party(address)] += size

    def dropped(self, reason: str, device: str | None) -> None:
        """Pass a dropped message on to the counters."""
        self._on_drop(reason)
        self.blame(reason, device)

    def system(self, topic: str, payload: bytes) -> None:
        """Note a figure of the broker; what is none is left out."""
        name = BROKER_FIGURES.get(topic)
        if name is not None and len(payload) < 20 and payload.isdigit():
            self.broker[name] = int(payload)

    def totals(self) -> dict[str, int]:
        """A copy, with keys ``direction/role/device``."""
        return {"/".join(key): size for key, size in list(self.bytes.items())}


def _party(address: Address) -> str:
    if address.device is not None:
        return address.device
    return f"cut-{address.layer}" if address.scope == "cut" else "all"


class TrafficLog:
    """Bytes over the whole run: those of earlier lives of the coordinator, and this one's."""

    def __init__(self, before: Mapping[str, int], now: Callable[[], dict[str, int]]) -> None:
        self._before = before
        self._now = now
        self._marked = self._by_role()

    def totals(self) -> dict[str, int]:
        """By ``direction/role/device``."""
        total = Counter(self._before)
        total.update(self._now())
        return dict(total)

    def since_mark(self) -> dict[str, int]:
        """By ``direction/role`` since the last call, or the start."""
        now = self._by_role()
        since = {role: size - self._marked.get(role, 0) for role, size in now.items()}
        self._marked = now
        return since

    def _by_role(self) -> dict[str, int]:
        roles: Counter[str] = Counter()
        for key, size in self.totals().items():
            roles[key.rpartition("/")[0]] += size
        return dict(roles)
