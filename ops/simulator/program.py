"""What a simulated process runs, and what its computing costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from broker.drive import Machine
from broker.envelopes import Envelope
from broker.link import LinkObserver
from broker.transport import Will


class Killed(BaseException):
    """Raised inside a machine's step: the process dies right there, its disk as it is then."""


class Meter:
    """What a step costs in virtual seconds; who computes charges it."""

    def __init__(self) -> None:
        self.slowness = 1.0
        self.spent = 0.0

    def spend(self, seconds: float) -> None:
        """The step under way takes so much longer, on a process that is not slowed."""
        self.spent += seconds * self.slowness


@dataclass(frozen=True, slots=True)
class Life:
    """What a machine is built with.

    ``uplink`` is the measured speed to the broker, 0 if unknown.
    """

    number: int
    """0 for the first life of a process."""
    clock: Callable[[], float]
    meter: Meter
    uplink: Callable[[], float]

    @property
    def boot(self) -> str:
        """The name of this life."""
        return f"life-{self.number}"


class Program(Protocol):
    """What a process runs."""

    @property
    def name(self) -> str: ...

    @property
    def filters(self) -> tuple[str, ...]:
        """What it is subscribed to from the start."""
        ...

    def build(self, life: Life) -> Machine:
        """A new machine; what it remembers of earlier lives is on its disk."""
        ...

    def will(self, life: Life) -> Will: ...

    def goodbye(self, machine: Machine) -> Envelope | None:
        """What a machine that has finished says last."""
        ...

    def observer(self) -> LinkObserver: ...

    def stepped(self, machine: Machine, started: float, seconds: float) -> None:
        """A step that began at ``started`` and takes so long has been computed."""
        ...


@dataclass(slots=True)
class Tally:
    """What a process has done, over all its lives, and the most that ever waited in it."""

    lives: int = 0
    steps: int = 0
    busy_s: float = 0.0
    connections: int = 0
    lost_qos0: int = 0
    most_inbox: int = 0
    most_arrived: int = 0
    most_outbox: int = 0
    received_bytes: int = 0
    unsent: int = 0
    """Messages it wanted to send without a connection."""
    sent_bytes: Counter[str] = field(default_factory=Counter)
    """On the wire, by kind of message."""
    failures: list[str] = field(default_factory=list)
