"""Whether a coordinator lives: the broker is there, and the threads of its machines go on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from broker.drive import Effect

SERVICE = "service"
"""What reads and sends for the machines."""
LOOK_S = 1.0
"""How often it is looked."""

Call = Callable[[Callable[[], Sequence[Effect]]], bool]
"""Has something called in a machine's thread; False if too much waits there."""


class Health(BaseModel):
    """What ``/healthz`` says. ``stalled_s``: since when each machine has not got anywhere."""

    model_config = ConfigDict(frozen=True)

    ok: bool
    problem: str | None = None
    broker_connected: bool = False
    stalled_s: dict[str, float] = {}


class Pulse:
    """Of one machine's thread: :meth:`stepped` is called there, the rest from anywhere.

    A thread that is asked to call back and does not, while it makes no other step either, is stuck
    in one; ``clock`` is monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._asked: float | None = None
        self._on_its_way = False
        self._stepped = clock()

    def stepped(self) -> None:
        """The machine has got something done."""
        self._stepped = self._clock()

    def ask(self, call: Call) -> None:
        """Have the thread call back, unless it still has to."""
        if self._asked is None:
            self._asked = self._clock()
        if not self._on_its_way:
            self._on_its_way = True
            self._on_its_way = call(self._answer)

    def _answer(self) -> Sequence[Effect]:
        self._on_its_way = False
        self._asked = None
        return ()

    @property
    def stalled_s(self) -> float:
        """For how long it should have got somewhere and has not."""
        asked = self._asked
        return 0.0 if asked is None else max(0.0, self._clock() - max(asked, self._stepped))


class Vitals:
    """What the service notes of itself, to be asked from any thread; names are its machines'."""

    def __init__(
        self, machines: Collection[str], *, bound_s: float, clock: Callable[[], float]
    ) -> None:
        self.pulses = {name: Pulse(clock) for name in machines}
        self._bound_s = bound_s
        self._clock = clock
        self._seen = clock()
        self._running = self._broker_connected = False

    def look(self, calls: Mapping[str, Call], *, broker_connected: bool) -> None:
        """In the service's event loop, every now and then: how the connection and machines are."""
        self._running, self._broker_connected = True, broker_connected
        self._seen = self._clock()
        for name, pulse in self.pulses.items():
            pulse.ask(calls[name])

    def stopped(self) -> None:
        """The service has ended."""
        self._running = False

    def health(self) -> Health:
        """Now."""
        stalled = {name: pulse.stalled_s for name, pulse in self.pulses.items()}
        stalled[SERVICE] = max(0.0, self._clock() - self._seen - LOOK_S)
        stuck = sorted(name for name, seconds in stalled.items() if seconds > self._bound_s)
        problem = None
        if not self._running:
            problem = "it is starting or stopping"
        elif stuck:
            problem = f"{' and '.join(stuck)}: nothing done for {stalled[stuck[0]]:.0f} s"
        elif not self._broker_connected:
            problem = "no connection to the broker"
        return Health(
            ok=problem is None,
            problem=problem,
            broker_connected=self._running and self._broker_connected,
            stalled_s={name: round(seconds, 3) for name, seconds in stalled.items()},
        )
