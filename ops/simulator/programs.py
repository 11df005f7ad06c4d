"""The two programs of a fleet, as the services build them, with everything outside replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from broker.drive import Machine
from broker.envelopes import Envelope
from broker.link import LinkObserver
from broker.messages import Assignment, Measurement
from broker.topics import COORDINATOR, Topics
from broker.transport import Will
from coordinator.checkpoint import Checkpoint
from coordinator.observer import Observer
from coordinator.service import Parts, build_core
from coordinator.service import last_will as coordinator_will
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from coordinator.traffic import Traffic
from edge_agent.core import AgentCore
from edge_agent.data import DeviceData
from edge_agent.errors import AgentError
from edge_agent.holding import SnapshotStore
from edge_agent.learner import LearnerFactory
from edge_agent.learning import Learner
from edge_agent.readings import LinkMeters
from edge_agent.service import build_agent, introduce, last_will
from edge_agent.settings import AgentSettings
from ops.simulator.charging import FREE_STEP, ChargedLearner, DeviceCost
from ops.simulator.hostile import Attack, HostileLearner
from ops.simulator.link import IDEAL, LinkProfile
from ops.simulator.pair import CoordinatorPair
from ops.simulator.program import Life, Meter
from ops.simulator.stub import Disk, StubData, StubLearner, measurement
from tensors.codecs import Encode

RUN = "simulated"
StoreEvent = Callable[[str], None]
"""Told ``save:before``, ``save:after`` and so on; may raise ``Killed`` or ``StoreError``."""
Stepped = Callable[[str, Machine, float, float], None]
"""Told the process, its machine, when the step began and how long it takes."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a simulated fleet; ``data`` only where learning is real.

    ``cost`` is for each block of its half. It is switched on at ``start_s``. It is on for ``on_s``
    seconds and then off for ``off_s``, and over again, if ``off_s`` is given; and it fails, on
    average every ``failure_s`` seconds, for ``repair_s``.
    """

    name: str
    cut: int | Literal["auto"] = 2
    link: LinkProfile = IDEAL
    cost: DeviceCost = FREE_STEP
    memory_mb: float = 1024.0
    samples: int = 64
    test_samples: int = 0
    data: DeviceData | None = None
    snapshots: SnapshotStore | None = None
    """Where it keeps its own learning; without it on a disk that is simulated too."""
    start_s: float = 0.0
    on_s: float = 3600.0
    off_s: float = 0.0
    failure_s: float = 0.0
    repair_s: float = 60.0
    settings: dict[str, Any] = field(default_factory=dict)
    """More settings of its agent."""
    attack: Attack | None = None
    """What it does to the others, where learning is real."""


class WatchedStore(Store):
    """The store on disk, which says what it is about to do and has done."""

    def __init__(self, root: Path, *, keep: int, tell: StoreEvent) -> None:
        self._tell = tell
        super().__init__(root, keep=keep)

    def create(self, run: str, settings: dict[str, Any], first: Checkpoint) -> None:
        """See ``Store``, as for the others."""
        self._tell("create:before")
        super().create(run, settings, first)
        self._tell("create:after")

    def announce(self, round_number: int, attempt: int) -> None:
        """An attempt is written down."""
        self._tell("announce:before")
        super().announce(round_number, attempt)
        self._tell("announce:after")

    def save(self, checkpoint: Checkpoint) -> None:
        """A round is written down."""
        self._tell("save:before")
        super().save(checkpoint)
        self._tell("save:after")

    def save_result(self, result: dict[str, Any]) -> None:
        """The run's result is written down."""
        self._tell("result:before")
        super().save_result(result)
        self._tell("result:after")


class CoordinatorProgram:
    """The coordinator; ``parts`` are made anew for each life, with its meter."""

    name = COORDINATOR

    def __init__(
        self,
        settings: CoordinatorSettings,
        parts: Callable[[Meter], Parts],
        *,
        observer: Observer,
        tell: StoreEvent,
        stepped: Stepped,
    ) -> None:
        self.filters = Topics(settings.fleet).coordinator_filters()
        self.traffic = Traffic(observer.message_dropped)
        self._settings = settings
        self._parts = parts
        self._observer = observer
        self._tell = tell
        self._stepped = stepped

    def build(self, life: Life) -> Machine:
        """Raises what ``build_core`` raises."""
        self.traffic = Traffic(self._observer.message_dropped)
        settings = self._settings
        core = build_core(
            settings,
            observer=self._observer,
            traffic=self.traffic.totals,
            boot=life.boot,
            clock=life.clock,
            parts=self._parts(life.meter),
            store=WatchedStore(settings.state_dir, keep=settings.keep_checkpoints, tell=self._tell),
            name=lambda: RUN,
        )
        return CoordinatorPair(core, life.clock)

    def will(self, life: Life) -> Will:
        """As the service's."""
        return coordinator_will(self._settings, life.boot)

    def goodbye(self, machine: Machine) -> Envelope | None:
        """As the service's."""
        assert isinstance(machine, CoordinatorPair)
        return machine.core.goodbye()

    def observer(self) -> LinkObserver:
        """Counts bytes."""
        return _Later(lambda: self.traffic)

    def stepped(self, machine: Machine, started: float, seconds: float) -> None:
        """Pass it on."""
        self._stepped(self.name, machine, started, seconds)


class AgentProgram:
    """One device's agent. ``disk`` outlives it; ``poisoned`` says which batches are not finite.

    ``encode`` is how it encodes features, if not as its learner does.
    """

    def __init__(
        self,
        fleet: str,
        device: Device,
        number: int,
        image: tuple[int, int, int],
        *,
        compute: dict[str, Any],
        stay: bool,
        poisoned: Callable[[str, int], bool],
        stepped: Stepped,
        encode: Encode | None = None,
    ) -> None:
        self.encode = encode
        self.name = device.name
        self.device = device
        self.filters = Topics(fleet).device_filters(device.name)
        self.disk = Disk()
        self.cut: int | None = None
        """Its cut layer as last assigned."""
        self._image = image
        self._stub = StubData(number, device.samples, device.test_samples)
        self._settings = AgentSettings(
            **{
                "fleet": fleet,
                "device": device.name,
                "cut": device.cut,
                "exit_when_finished": not stay,
                **compute,
                **device.settings,
            }
        )
        self._poisoned = poisoned
        self._stepped = stepped

    def build(self, life: Life) -> Machine:
        """Build an agent as the service does, but for its learner and its data."""
        data, settings = self.device.data, self._settings
        if data is not None:
            hello = introduce(settings, data, life.boot)
        else:
            cut = None if settings.cut == "auto" else settings.cut
            hello = self._stub.hello(life.boot, cut, self._image)
        return build_agent(
            settings,
            hello,
            data or self._stub,
            self.device.snapshots or self.disk,
            uplink=life.uplink,
            clock=life.clock,
            learners=_Learners(self, life.meter),
        )

    def will(self, life: Life) -> Will:
        """As the service's."""
        return last_will(self._settings, life.boot)

    def goodbye(self, machine: Machine) -> Envelope | None:
        """As the service's; raises ``AgentError`` as it does if the device was refused."""
        assert isinstance(machine, AgentCore)
        if machine.problem is not None:
            raise AgentError(machine.problem)
        return machine.goodbye()

    def observer(self) -> LinkObserver:
        """Nobody."""
        return LinkMeters()

    def stepped(self, machine: Machine, started: float, seconds: float) -> None:
        """Pass it on."""
        self._stepped(self.name, machine, started, seconds)

    def learner(self, assignment: Assignment) -> Learner:
        """A stub's, or torch's for a device with data."""
        assert assignment.cut is not None
        self.cut = assignment.cut
        if self.device.data is None:
            return StubLearner(assignment.cut, lambda batch: self._poisoned(self.name, batch))
        settings = self._settings
        factory = LearnerFactory(
            networks=settings.networks,
            device=settings.compute,
            precision=settings.precision,
            memory_format=settings.memory_format,
        )
        return factory.build(assignment)


class _Learners:
    """``edge_agent.learning.Learners`` that charge their time."""

    programs: ClassVar[None] = None

    def __init__(self, program: AgentProgram, meter: Meter) -> None:
        self._program = program
        self._meter = meter

    def build(self, assignment: Assignment) -> Learner:
        assert assignment.cut is not None
        program = self._program
        about = assignment.cut, self._meter, program.device.cost, program.encode
        if program.device.attack is None:
            return ChargedLearner(program.learner(assignment), *about)
        hostile = HostileLearner(program.learner(assignment), *about)
        hostile.attack = program.device.attack
        return hostile

    def measure(self, assignment: Assignment) -> Measurement:
        device = self._program.device
        block_s = (device.cost.forward_s + device.cost.backward_s) * self._meter.slowness
        self._meter.spend(device.cost.forward_s + device.cost.backward_s)
        return measurement(assignment.batch_size, block_s, device.memory_mb)


class _Later:
    """A ``LinkObserver`` that is looked up when it is told something."""

    def __init__(self, current: Callable[[], LinkObserver]) -> None:
        self._current = current

    def sent(self, address: Any, size: int) -> None:
        self._current().sent(address, size)

    def received(self, address: Any, size: int) -> None:
        self._current().received(address, size)

    def dropped(self, reason: str, device: str | None) -> None:
        self._current().dropped(reason, device)
