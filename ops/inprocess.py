"""A whole fleet in one process and thread, without a broker, on a clock of its own.

The state machines are those of the services; only what is between them is replaced. Nothing here
waits: time passes when nobody has anything left to do, and then as far as the next thing that is
due. The same fleet gives the same result every time, provided that precision and memory format are
not ``auto`` (those are chosen by timing).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from broker.drive import Effect, Machine, Subscribe
from broker.envelopes import Envelope
from broker.messages import Hello
from broker.topics import COORDINATOR, Address, Topics, matches
from coordinator.observer import Observer
from coordinator.service import build_core
from coordinator.settings import CoordinatorSettings
from coordinator.store import Checkpoint, Store
from edge_agent.core import AgentCore
from edge_agent.data import DeviceData
from edge_agent.learner import LearnerFactory
from edge_agent.service import software
from edge_agent.snapshots import Snapshot
from ops.errors import FleetFailed

BOOT = "inprocess"
MAX_TURNS = 10_000_000
LIMIT_S = 86_400.0


class VirtualClock:
    """Seconds since its start; stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class _Party:
    machine: Machine
    fixed: tuple[str, ...]
    filters: tuple[str, ...] = ()
    """Those of its last ``Subscribe``."""
    inbox: deque[Envelope] = field(default_factory=deque)

    def wants(self, topic: str) -> bool:
        return any(matches(pattern, topic) for pattern in (*self.fixed, *self.filters))


class Pump:
    """Carries messages between state machines in turns.

    In a turn every party, in the order in which they joined, does the first of these that it can:
    take one message, tick if that is due, one unit of work. What it says arrives after the turn,
    in order, at every party that subscribed to its topic; so several batches are on their way at
    once, as on a network. Nothing is lost, duplicated or copied. Retained messages are said to
    whoever subscribes later. A party that has finished takes part no more, and nobody's last will
    is said. ``watch`` sees every message once, when it is sent.
    """

    def __init__(
        self,
        topics: Topics,
        clock: VirtualClock,
        *,
        watch: Callable[[Envelope], None] | None = None,
    ) -> None:
        self._topics = topics
        self._clock = clock
        self._watch = watch
        self._parties: dict[str, _Party] = {}
        self._retained: dict[str, Envelope] = {}
        self._sent: list[Envelope] = []

    def join(self, name: str, machine: Machine, filters: Iterable[str]) -> None:
        """Connect a party subscribed to ``filters``: the coordinator, or the device ``name``."""
        assert name not in self._parties, name
        party = self._parties[name] = _Party(machine, tuple(filters))
        self._replay(party, party.fixed)
        self._carry_out(party, machine.connected())

    def turn(self) -> bool:
        """One turn; False if nobody had anything to do."""
        moved = [self._step(party) for party in self._parties.values()]
        sent, self._sent = self._sent, []
        for envelope in sent:
            self._deliver(envelope)
        return any(moved) or bool(sent)

    def run(
        self,
        *,
        until: Callable[[], bool] = lambda: False,
        limit_s: float = LIMIT_S,
        max_turns: int = MAX_TURNS,
    ) -> None:
        """Take turns until every party has finished, or ``until()`` is true.

        Raises:
            FleetFailed: nothing more can happen within ``limit_s`` seconds of the clock, or
                ``max_turns`` turns were not enough.
        """
        end = self._clock.now + limit_s
        for _ in range(max_turns):
            if until() or not self._unfinished():
                return
            if not self.turn():
                self._pass_time(end)
        raise FleetFailed(f"the fleet is not done after {max_turns} turns: {self._standing()}")

    def _step(self, party: _Party) -> bool:
        machine = party.machine
        if machine.finished:
            party.inbox.clear()
            return False
        due = machine.next_tick
        if party.inbox:
            effects = machine.receive(party.inbox.popleft())
        elif due is not None and self._clock.now >= due:
            effects = machine.tick()
        elif machine.has_work:
            effects = machine.work()
        else:
            return False
        self._carry_out(party, effects)
        return True

    def _carry_out(self, party: _Party, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Subscribe):
                party.filters = effect.filters
                self._replay(party, effect.filters)
            else:  # a deferred message is made here
                envelope = Envelope(effect.address, effect.message)
                if self._watch is not None:
                    self._watch(envelope)
                self._sent.append(envelope)

    def _deliver(self, envelope: Envelope) -> None:
        topic = self._topics.format(envelope.address)
        if envelope.address.retained:
            self._retained[topic] = envelope
        for party in self._candidates(envelope.address):
            if party.wants(topic) and not party.machine.finished:
                party.inbox.append(envelope)

    def _candidates(self, address: Address) -> Iterable[_Party]:
        """Who may have subscribed to an address, so that large fleets need not all be asked."""
        if address.scope != "device":
            return self._parties.values()
        name = COORDINATOR if address.direction == "up" else address.device or ""
        return [self._parties[name]] if name in self._parties else []

    def _replay(self, party: _Party, filters: Sequence[str]) -> None:
        party.inbox.extend(
            envelope
            for topic, envelope in self._retained.items()
            if any(matches(pattern, topic) for pattern in filters)
        )

    def _pass_time(self, end: float) -> None:
        machines = [party.machine for party in self._unfinished().values()]
        due = min((time for m in machines if (time := m.next_tick) is not None), default=None)
        if due is None or due > end:
            raise FleetFailed(f"nothing moves any more: {self._standing()}")
        self._clock.now = max(self._clock.now, due)

    def _unfinished(self) -> dict[str, _Party]:
        return {name: p for name, p in self._parties.items() if not p.machine.finished}

    def _standing(self) -> str:
        waiting = self._unfinished()
        names = ", ".join(list(waiting)[:5])
        more = f" and {len(waiting) - 5} more" if len(waiting) > 5 else ""
        return f"{names}{more} not finished at {self._clock.now:.0f} s of the fleet's clock"


class MemorySnapshots:
    """A device's ``SnapshotStore`` that lives as long as its process."""

    def __init__(self) -> None:
        self._kept: tuple[str, int, int, Snapshot] | None = None

    def save(self, run: str, cut: int, version: int, snapshot: Snapshot) -> None:
        """Replace the kept snapshot."""
        self._kept = (run, cut, version, snapshot)

    def load(self, run: str, cut: int) -> tuple[int, Snapshot] | None:
        """Version and snapshot kept for this run and cut, if there is one."""
        if self._kept is None or self._kept[:2] != (run, cut):
            return None
        return self._kept[2:]


class FleetInProcess:
    """A coordinator and its devices (name → cut layer and images) on one :class:`Pump`.

    ``settings`` say where the coordinator keeps its checkpoints, and also on what and how the
    devices compute. Raises what ``build_core`` raises.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        devices: Mapping[str, tuple[int, DeviceData]],
        *,
        observer: Observer | None = None,
        watch: Callable[[Envelope], None] | None = None,
    ) -> None:
        topics = Topics(settings.fleet)
        self.clock = VirtualClock()
        self.pump = Pump(topics, self.clock, watch=watch)
        self._settings = settings
        core = build_core(
            settings,
            observer=observer or Observer(),
            traffic=dict,
            boot=BOOT,
            clock=self.clock,
        )
        self.pump.join(COORDINATOR, core, topics.coordinator_filters())
        self._agents: dict[str, AgentCore] = {}
        for name, (cut, data) in devices.items():
            self._agents[name] = self._agent(topics, name, cut, data)
            self.pump.join(name, self._agents[name], topics.device_filters(name))

    def run(self, *, limit_s: float = LIMIT_S) -> Checkpoint:
        """Run to the end; the last closed round.

        Raises :class:`FleetFailed` if a device was refused, or as :meth:`Pump.run` does.
        """
        self.pump.run(until=lambda: bool(self._problems()), limit_s=limit_s)
        for name, problem in self._problems().items():
            raise FleetFailed(f"{name}: {problem}")
        store = Store(self._settings.state_dir)
        checkpoint = store.latest() if store.current() is not None else None
        assert checkpoint is not None, "build_core saves version 0"
        return checkpoint

    def _problems(self) -> dict[str, str]:
        return {name: core.problem for name, core in self._agents.items() if core.problem}

    def _agent(self, topics: Topics, name: str, cut: int, data: DeviceData) -> AgentCore:
        factory = LearnerFactory(
            networks=(self._settings.network.name,),
            device=self._settings.device,
            precision=self._settings.precision,
            memory_format=self._settings.memory_format,
        )
        hello = Hello(
            boot=BOOT,
            software=software(),
            samples=len(data.train_rows),
            test_samples=len(data.test_rows),
            dataset=data.train.name,
            classes=len(data.train.classes),
            image=data.image,
            cut=cut,
        )
        return AgentCore(
            topics,
            name,
            hello,
            data,
            uplink=lambda: 0.0,
            build=factory.build,
            measure=factory.measure,
            snapshots=MemorySnapshots(),
            clock=self.clock,
        )
