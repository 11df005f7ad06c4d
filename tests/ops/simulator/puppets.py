"""Machines that say what they are given to say, as processes on a simulated broker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from broker.drive import Effect, Machine
from broker.envelopes import Envelope, up
from broker.link import LinkObserver, single_frame
from broker.messages import Request, Status
from broker.topics import COORDINATOR, Topics
from broker.transport import Will
from edge_agent.readings import LinkMeters
from ops.simulator import IDEAL, Broker, LinkProfile, Process, World
from ops.simulator.program import Life

TOPICS = Topics("fleet")


class Puppet:
    """A machine. ``said`` is what it was told, with the time; it says ``greeting`` first."""

    def __init__(self, process: PuppetProgram, life: Life) -> None:
        self._program = process
        self._life = life
        self.finished = self.has_work = False
        self.next_tick: float | None = None

    def connected(self) -> Sequence[Effect]:
        self._program.events.append((self._life.clock(), "connected"))
        return self._program.greeting

    def disconnected(self) -> Sequence[Effect]:
        self._program.events.append((self._life.clock(), "disconnected"))
        return []

    def receive(self, envelope: Envelope) -> Sequence[Effect]:
        self._life.meter.spend(self._program.cost_s)
        self._program.heard.append((self._life.clock(), envelope.message))
        return self._program.answers.get(type(envelope.message), [])

    def tick(self) -> Sequence[Effect]:
        if self._program.crash is not None:
            raise self._program.crash
        self._program.ticks.append(self._life.clock())
        self.next_tick = None
        return self._program.on_tick

    def work(self) -> Sequence[Effect]:
        return []


class PuppetProgram:
    """What makes puppets, and what they all have seen; it outlives them as a disk does."""

    def __init__(self, name: str, greeting: Sequence[Effect] = ()) -> None:
        self.name = name
        self.filters = (
            TOPICS.coordinator_filters() if name == COORDINATOR else TOPICS.device_filters(name)
        )
        self.greeting = greeting
        self.answers: dict[type, list[Effect]] = {}
        self.on_tick: Sequence[Effect] = []
        self.cost_s = 0.0
        self.crash: BaseException | None = None
        """Raised in the next tick."""
        self.heard: list[tuple[float, Any]] = []
        self.events: list[tuple[float, str]] = []
        self.ticks: list[float] = []
        self.machines: list[Puppet] = []
        self.will_delay_s = 0

    def build(self, life: Life) -> Machine:
        self.machines.append(Puppet(self, life))
        return self.machines[-1]

    def will(self, life: Life) -> Will:
        if self.name == COORDINATOR:
            return Will(TOPICS.all("coordinator"), b"", delay_s=10**6)
        status = Status(state="offline", connection=life.boot)
        topic = TOPICS.up(self.name, "status")
        return Will(topic, single_frame(status), retain=True, delay_s=self.will_delay_s)

    def goodbye(self, machine: Machine) -> Envelope | None:
        return None

    def observer(self) -> LinkObserver:
        return LinkMeters()

    def stepped(self, machine: Machine, started: float, seconds: float) -> None:
        pass

    @property
    def messages(self) -> list[Any]:
        return [message for _, message in self.heard]


class Stage:
    """A world, a broker, the coordinator and device ``d1`` as puppets."""

    def __init__(
        self,
        *,
        device: LinkProfile = IDEAL,
        coordinator: LinkProfile = IDEAL,
        seed: int = 0,
        max_queued: int = 1000,
    ) -> None:
        self.world = World(seed)
        self.broker = Broker(self.world, TOPICS, max_queued=max_queued)
        self.server = PuppetProgram(COORDINATOR)
        self.device = PuppetProgram("d1")
        self.server_process = Process(self.world, self.broker, self.server, coordinator)
        self.device_process = Process(self.world, self.broker, self.device, device)

    def start(self) -> None:
        self.server_process.start()
        self.device_process.start()
        self.run(1.0)

    def run(self, seconds: float) -> None:
        self.world.wait(seconds)

    def say(self, *effects: Effect) -> None:
        """The device says something, in one step, as soon as it can."""
        self.device.on_tick = effects
        self.device.machines[-1].next_tick = self.device_process.clock()
        self.device_process._look()


def request(number: int, padding: int = 0) -> Envelope:
    return up("d1", Request(what="probe", version=number, padding=bytes(padding)))
