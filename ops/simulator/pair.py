"""The two machines of a coordinator as one, for a process that does one step after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from broker.drive import Effect, Machine
from broker.envelopes import Envelope
from coordinator.core import CoordinatorCore
from coordinator.serving import ANSWERING, route


class CoordinatorPair:
    """What ``coordinator.service`` drives in two threads.

    An answer that is due comes before a training step that could be made.
    """

    def __init__(self, core: CoordinatorCore, clock: Callable[[], float]) -> None:
        self.core = core
        self._clock = clock
        self._machines: tuple[Machine, ...] = (core.answering, core)

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.core.finished

    @property
    def has_work(self) -> bool:
        """Of either."""
        return any(machine.has_work for machine in self._machines)

    @property
    def next_tick(self) -> float | None:
        """The earlier one."""
        due = [machine.next_tick for machine in self._machines]
        return min((time for time in due if time is not None), default=None)

    def connected(self) -> Sequence[Effect]:
        """Both learn it."""
        return [effect for machine in self._machines for effect in machine.connected()]

    def disconnected(self) -> Sequence[Effect]:
        """Both learn it."""
        return [effect for machine in self._machines for effect in machine.disconnected()]

    def receive(self, envelope: Envelope) -> Sequence[Effect]:
        """By whoever it is for."""
        answering = ANSWERING in route(envelope.address)
        return (self.core.answering if answering else self.core).receive(envelope)

    def tick(self) -> Sequence[Effect]:
        """Of those that are due."""
        effects: list[Effect] = []
        for machine in self._machines:
            due = machine.next_tick
            if due is not None and self._clock() >= due:
                effects += machine.tick()
        return effects

    def work(self) -> Sequence[Effect]:
        """A unit of the first that has some."""
        for machine in self._machines:
            if machine.has_work:
                return machine.work()
        return ()
