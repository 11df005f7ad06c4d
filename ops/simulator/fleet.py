"""A whole fleet, simulated: coordinator, broker, devices, and what may happen to them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from broker.drive import Machine
from broker.envelopes import Envelope
from broker.messages import Network
from broker.topics import COORDINATOR, Topics
from broker.training_messages import Report
from coordinator.checkpoint import Checkpoint
from coordinator.core import CoordinatorCore
from coordinator.observer import Observer, Observers
from coordinator.service import Parts, torch_parts
from coordinator.settings import CoordinatorSettings
from coordinator.store import Store
from edge_agent.core import AgentCore
from ops.errors import FleetFailed
from ops.simulator.books import Attempt, Books, Witnesses, audit
from ops.simulator.broker import Broker
from ops.simulator.charging import FREE, ServerCost, charged
from ops.simulator.lifecycle import Lifecycle
from ops.simulator.link import IDEAL, LinkProfile
from ops.simulator.pair import CoordinatorPair
from ops.simulator.process import Process
from ops.simulator.program import Meter
from ops.simulator.programs import AgentProgram, CoordinatorProgram, Device
from ops.simulator.sender import Wire
from ops.simulator.stub import DIGITS
from ops.simulator.stub_server import real_sizes, stub_parts
from ops.simulator.watch import Stretch
from ops.simulator.world import LIMIT_S, World
from tensors.by_reference import encode_by_reference

Watch = Callable[[Envelope], None]


class SimulatedFleet:
    """A coordinator, a broker and ``devices`` in one thread, on a clock of their own.

    ``settings`` are the coordinator's, and say where it keeps its checkpoints and, where learning
    is real, on what and how the devices compute. Learning is stubbed unless ``learning="real"``;
    then every device has data, and precision and memory format must not be ``auto``, which is
    chosen by timing. With ``sizes="real"`` messages of stubs take as long as those of network and
    codecs in the settings would; what is sent is in fp32 then, unless the codec follows a budget.

    With ``by_reference`` messages are neither serialised nor tensors copied where the codec loses
    nothing, and everything else is as without: model, books, sizes and times. It is for fleets in
    which nothing happens to messages, or to processes that have some under way.

    What dies of an error (a full disk, say) is started again after ``restart_s`` seconds, if that
    is given; else :meth:`run` raises. Nothing happens before :meth:`run`.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        devices: Sequence[Device],
        *,
        seed: int = 0,
        learning: Literal["stub", "real"] = "stub",
        sizes: Literal["stub", "real"] = "stub",
        by_reference: bool = False,
        server: ServerCost = FREE,
        coordinator_link: LinkProfile = IDEAL,
        restart_s: float | None = None,
        observer: Observer | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.learning = learning
        self.witnesses = Witnesses()
        self.world = World(seed)
        self.broker = Broker(self.world, Topics(settings.fleet), max_queued=settings.queue_chunks)
        self.faults = self.broker.faults
        self.faults.by_reference = by_reference
        self._by_reference = by_reference
        self.reports: dict[tuple[str, Attempt], Report] = {}
        self.stretches = {device.name: Stretch() for device in devices}
        self.on_store: Callable[[str], None] = _nothing
        """Told what the coordinator's store does; see ``programs.StoreEvent``."""
        self.poisoned: Callable[[str, int], bool] = _sound
        """Whether the features of this device's batch are not finite."""
        wire: Wire | None = None
        if learning == "stub":
            stand_in: dict[str, Any] = {
                "network": settings.network.model_copy(update={"classes": DIGITS}),
                "label_skew": "none",  # stubs' labels are names
            }
            if sizes == "real":
                wire = real_sizes(settings, self._cut_of)
                if settings.bytes_per_sample is None and not settings.follow_link:
                    stand_in |= {"codec": "fp32", "gradient_codec": None}
            settings = settings.model_copy(update=stand_in)
        self.settings = settings
        self._server = server
        self._restart_s = restart_s
        self._watch = watch
        self._triggers: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._started = False
        self._failed: dict[str, Process] = {}
        self._unfinished = dict.fromkeys([COORDINATOR, *(device.name for device in devices)])
        observers = [self.witnesses, *([] if observer is None else [observer])]
        program = CoordinatorProgram(
            settings,
            self._parts,
            observer=Observers(*observers),
            tell=self._tell,
            stepped=self._stepped,
        )
        self.coordinator = Process(
            self.world,
            self.broker,
            program,
            coordinator_link,
            wire=wire,
            by_reference=by_reference,
            watch=self._see,
            ended=self._ended,
        )
        self.programs = {
            device.name: self._program(device, number) for number, device in enumerate(devices)
        }
        self.agents = {
            device.name: Process(
                self.world,
                self.broker,
                self.programs[device.name],
                device.link,
                wire=wire,
                by_reference=by_reference,
                watch=self._see,
                ended=self._ended,
            )
            for device in devices
        }
        assert len(self.agents) == len(devices), "two devices of the same name"

    # -- running ----------------------------------------------------------------------------------

    @property
    def processes(self) -> list[Process]:
        """The coordinator, then the devices."""
        return [self.coordinator, *self.agents.values()]

    @property
    def core(self) -> CoordinatorCore:
        """The coordinator's machine, which must be alive."""
        machine = self.coordinator.machine
        assert isinstance(machine, CoordinatorPair), "the coordinator is not running"
        return machine.core

    def agent(self, name: str) -> AgentCore:
        """A device's machine, which must be alive."""
        machine = self.agents[name].machine
        assert isinstance(machine, AgentCore), f"{name} is not running"
        return machine

    @property
    def done(self) -> bool:
        """Whether coordinator and devices have all finished."""
        return not self._unfinished

    def run(
        self,
        until: Callable[[], bool] | None = None,
        *,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Go on until ``until()``, by default until the fleet is done.

        Raises :class:`FleetFailed` if that does not come within ``limit_s`` of virtual time, or a
        process died of an error and nobody restarts it.
        """
        self._start()
        wanted = until or (lambda: self.done)
        if not self.world.run(until=lambda: wanted() or bool(self._failed), limit_s=limit_s):
            raise FleetFailed(f"nothing moves any more: {self._standing()}")
        for name, process in self._failed.items():
            if not wanted():
                raise FleetFailed(f"{name}: {process.failure}") from process.failure

    def when(self, happens: Callable[[], bool], action: Callable[[], None]) -> None:
        """Do ``action`` once, after the first step of any process after which ``happens()``."""
        self._triggers.append((happens, action))

    # -- to look at -------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """The last closed round, from the coordinator's disk."""
        store = Store(self.settings.state_dir)
        checkpoint = store.latest() if store.current() is not None else None
        assert checkpoint is not None, "build_core saves version 0"
        return checkpoint

    def books(self) -> Books:
        """Everybody's accounts, compared; see ``Books.check``."""
        stub = self.settings if self.learning == "stub" else None
        return audit(self.checkpoint(), self.reports, self.witnesses, stub=stub)

    def digest(self) -> str:
        """SHA-256 of the last model, names and momentum included."""
        model = self.checkpoint().model
        digest = hashlib.sha256()
        for part in (model.state, model.momentum, model.velocity):
            for name in sorted(part):
                digest.update(name.encode() + b"\0" + part[name].tobytes())
        return digest.hexdigest()

    # -- inside -----------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        self.coordinator.start()
        for name, process in self.agents.items():
            Lifecycle(self.world, process, self.programs[name].device).begin()

    def _parts(self, meter: Meter) -> Parts:
        settings = self.settings
        if self.learning == "stub":
            parts = stub_parts(self.witnesses.new, settings)
        else:
            parts = torch_parts(settings)
        return Parts(
            parts.shapes,
            parts.first,
            lambda: charged(parts.new_engine(), meter, self._server, blocks=len(parts.shapes) + 1),
            parts.network,
            parts.evaluator,
            parts.channels_last,
            encode_by_reference if self._by_reference else parts.encode,
        )

    def _program(self, device: Device, number: int) -> AgentProgram:
        settings, network = self.settings, self.settings.network
        assert (device.data is not None) == (self.learning == "real"), device.name
        return AgentProgram(
            settings.fleet,
            device,
            number,
            _image(network),
            compute={
                "compute": settings.device,
                "precision": settings.precision,
                "memory_format": settings.memory_format,
                "networks": (settings.network.name,),
            },
            stay=settings.stay,
            encode=encode_by_reference if self._by_reference else None,
            poisoned=self._is_poisoned,
            stepped=self._stepped,
        )

    def _cut_of(self, name: str) -> int | None:
        return self.programs[name].cut if name in self.programs else None

    def _see(self, envelope: Envelope) -> None:
        message, device = envelope.message, envelope.address.device
        if isinstance(message, Report) and message.inference is None and device is not None:
            self.reports[device, (message.round, message.attempt)] = message
        if self._watch is not None:
            self._watch(envelope)

    def _stepped(self, name: str, machine: Machine, started: float, seconds: float) -> None:
        del started
        if isinstance(machine, AgentCore):
            life = self.agents[name].tally.lives
            self.stretches[name].stepped(life, machine.phase, self.world.now, seconds)
        due = [trigger for trigger in self._triggers if trigger[0]()]
        for trigger in due:
            self._triggers.remove(trigger)
            self.world.after(0.0, trigger[1])

    # Both may be replaced at any time, so they are looked up when they are needed.
    def _tell(self, event: str) -> None:
        self.on_store(event)

    def _is_poisoned(self, device: str, batch: int) -> bool:
        return self.poisoned(device, batch)

    def _ended(self, process: Process) -> None:
        if process.failure is None:
            self._unfinished.pop(process.name, None)
        elif self._restart_s is None:
            self._failed[process.name] = process
        else:
            self.world.after(self._restart_s, lambda: self._restart(process))

    def _restart(self, process: Process) -> None:
        if not process.alive:
            process.start()

    def _standing(self) -> str:
        waiting = [process.name for process in self.processes if not process.over]
        more = f" and {len(waiting) - 5} more" if len(waiting) > 5 else ""
        return f"{', '.join(waiting[:5])}{more} not finished at {self.world.now:.0f} s"


def _nothing(event: str) -> None:
    del event


def _sound(device: str, batch: int) -> bool:
    del device, batch
    return False


def _image(network: Network) -> tuple[int, int, int]:
    return network.channels, network.size, network.size
