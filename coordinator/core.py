"""The coordinator's state machine: messages and time in, messages out. No sockets, no waiting.

What devices are and ask for is answered here; the rounds are those of ``coordinator.run``.
The service loop calls :meth:`CoordinatorCore.receive` and :meth:`CoordinatorCore.tick` from one
worker thread and sends what they return, in order. The store is a parameter, so that a simulator
can keep checkpoints in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from broker.envelopes import Envelope, down, to_all
from broker.messages import (
    Command,
    Coordinator,
    Hello,
    Parameters,
    Program,
    Request,
    Status,
    Telemetry,
)
from broker.training_messages import Activations, DeviceParameters, FeatureGradients, Report
from coordinator.aggregation import Model
from coordinator.checkpoint import Checkpoint
from coordinator.defences.guard import QUARANTINED, RATE_LIMITED, Guard
from coordinator.errors import DeviceRefused
from coordinator.evaluation import Evaluator
from coordinator.health import Health
from coordinator.log_levels import LogLevels, order, orders
from coordinator.observer import Observer
from coordinator.placement import Placement
from coordinator.registry import Device, Registry
from coordinator.run import Run
from coordinator.run_records import Keeper, RunRecords
from coordinator.serving import AnsweringMachine, Answers
from coordinator.serving_version import ServingVersion
from coordinator.settings import CoordinatorSettings
from coordinator.snapshot import Process, fleet_status
from coordinator.status import FleetStatus, ServingStatus
from coordinator.telemetry import TelemetryLedger
from coordinator.training import RoundInProgress

log = logging.getLogger("splitfleet.coordinator")


class CoordinatorCore:
    """One run of one fleet, from the first hello to the result.

    It trains; what devices offload is answered by :attr:`answering`.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        run: str,
        checkpoint: Checkpoint,
        *,
        new_round: Callable[[Model, float], RoundInProgress],
        answers: Answers,
        evaluator: Evaluator | None,
        placement: Placement,
        store: Keeper,
        observer: Observer,
        traffic: Callable[[], dict[str, int]],
        boot: str,
        clock: Callable[[], float],
    ) -> None:
        self.versions = answers.versions
        self.guard = Guard(settings, devices=settings.max_devices, observer=observer, clock=clock)
        """Also to be asked before a packet is taken in."""
        self.frame_limits = placement.frame_limits(checkpoint.model.state)
        """What has to be put together for messages that may come."""
        self._settings = settings
        self._clock = clock
        self._process = Process(settings.fleet, boot, clock())
        self._placement = placement
        self._observer = observer
        self._boot = boot
        self._ledger = TelemetryLedger(cuts=len(placement.shapes), clock=clock)
        self._log_levels = LogLevels()
        self._registry = Registry(settings.max_devices)
        self._registry.restore(checkpoint.registry)
        observer.devices(self._registry.by_state())
        self._serving = ServingVersion(
            settings, run, answers.versions, evaluator, observer, placement.classifier
        )
        self._run = Run(
            settings,
            run,
            checkpoint,
            registry=self._registry,
            new_round=new_round,
            serving=self._serving,
            records=RunRecords(
                settings,
                run,
                checkpoint,
                registry=self._registry,
                evaluator=evaluator,
                store=store,
                observer=observer,
                traffic=traffic,
                clock=clock,
            ),
            placement=placement,
            observer=observer,
            clock=clock,
        )
        self.answering = AnsweringMachine(
            settings,
            run,
            answers,
            placement.shapes,
            find=self._registry.find,
            observer=observer,
            clock=clock,
        )
        """The machine that answers images; to be driven beside this one."""

    # -- events -----------------------------------------------------------------------------------

    def connected(self) -> list[Envelope]:
        """The broker is there (again), maybe without its retained messages: say them all."""
        self._observer.connection(up=True)
        out = [to_all(Coordinator(state="online", boot=self._boot))]
        out += [
            self._run.assignment(device)
            for device in self._registry.devices.values()
            if device.hello
        ]
        return out + self._run.connected()

    def disconnected(self) -> list[Envelope]:
        """The broker is gone: everything waits, deadlines too."""
        self._observer.connection(up=False)
        self._run.disconnected()
        return []

    @property
    def has_work(self) -> bool:
        """Whether batches wait to be trained on together; all else is done when a message comes."""
        return self._run.has_work

    @property
    def finished(self) -> bool:
        """Whether the run is over and nothing more shall be answered."""
        return self._run.finished and not self._settings.stay

    def work(self) -> list[Envelope]:
        """Train on what has come together; see :attr:`has_work`."""
        return self._run.work() + self._run.advance()

    def receive(self, envelope: Envelope) -> list[Envelope]:
        """A message; its device is who the topic says, which the broker enforces."""
        device, message = envelope.address.device, envelope.message
        assert device is not None
        known = self._registry.get(device)
        if known is None:
            self._observer.message_dropped(
                "retired" if self._registry.is_retired(device) else "fleet_full"
            )
            return []
        if self.guard.is_held(device) and not isinstance(message, Status):
            self._observer.message_dropped(QUARANTINED)
            return self._part_with() + self._run.advance()
        if not (isinstance(message, Status) and message.state == "offline"):  # the broker's words
            known.heard = self._clock()
        match message:
            case Activations():
                out = self._run.activations(known, message)
            case FeatureGradients():
                out = self._run.gradients(known, message)
            case DeviceParameters():
                out = self._run.parameters(known, message)
            case Status():
                self._registry.status(device, message)
                self._observer.devices(self._registry.by_state())
                out = []
            case Hello():
                out = self._hello(known, message)
            case Request():
                out = self._affordable(device, self._request(known, message))
            case Telemetry():
                self._telemetry(known, message)
                out = []
            case Report():
                out = self._report(known, message)
            case _:
                self._observer.message_dropped("unexpected_topic")
                return []
        return out + self._part_with() + self._run.advance()

    def _part_with(self) -> list[Envelope]:
        """Let devices go whose quarantine has begun, and have those back whose has ended."""
        begun, ended = self.guard.changes()
        self._registry.quarantined |= set(begun)
        self._registry.quarantined -= set(ended)
        return [said for device in begun for said in self._run.expel(device)]

    def tick(self) -> list[Envelope]:
        """Time has passed: deadlines, and receipts that wait for company."""
        return self._part_with() + self._run.tick() + self._run.advance()

    @property
    def next_tick(self) -> float | None:
        """When :meth:`tick` has something to do, on the clock; None if nothing is due."""
        due = (self._run.next_tick, self.guard.due)
        return min((time for time in due if time is not None), default=None)

    def pin(self, version: int | None) -> list[Envelope]:
        """Answer images with this version, or with None the last closed round's."""
        return self._serving.pin(version)

    def follow(self, levels: LogLevels) -> list[Envelope]:
        """Tell devices which level somebody has chosen for their logs."""
        before, self._log_levels = self._log_levels, levels
        return orders(before, levels)

    def retire(self, names: frozenset[str]) -> list[Envelope]:
        """Know these devices no more; those that are not among them may come again."""
        self._registry.retire(names)
        self._ledger.forget(names)
        self._observer.retired(names)
        self._observer.devices(self._registry.by_state())
        return self._run.advance()

    @property
    def place(self) -> dict[str, str | int]:
        """Run and round, for lines of a log; may be asked for in any thread."""
        return {"run": self._run.name, "round": self._run.number}

    def goodbye(self) -> Envelope:
        """The last status, when the coordinator leaves on purpose."""
        return to_all(Coordinator(state="offline", boot=self._boot))

    def status(self, health: Health) -> FleetStatus:
        """The fleet now; may be asked for in any thread."""
        versions = self.versions
        return fleet_status(
            self._process,
            self._run.standing(),
            list(self._registry.devices.values()),
            ServingStatus(
                version=versions.serving.number,
                pinned=versions.pinned is not None,
                waiting_images=self.answering.waiting.images,
            ),
            health,
            self.guard,
            self._clock(),
        )

    # -- what devices say -------------------------------------------------------------------------

    def _hello(self, device: Device, hello: Hello) -> list[Envelope]:
        first = device.hello is None or device.cut is None
        try:
            cut = self._placement.cut_of(device.cut, hello, self._registry.training_cuts)
        except DeviceRefused as exc:
            about = {"device": device.name}
            log.warning("device %s cannot take part: %s", device.name, exc, extra=about)
            device.hello = device.cut = None
            return [down(device.name, Command(command="stop", reason=str(exc)))]
        device.hello = hello
        if first or device.cut != cut:
            place = cut or "to be measured"
            about = {"device": device.name}
            log.info("device %s joins, cut layer %s", device.name, place, extra=about)
        device.cut = cut
        out = [self._run.assignment(device)]
        if cut is not None:
            out += self._run.published.news(cut)
        level = self._log_levels.of(device.name)
        return out if level is None else [*out, down(device.name, order(level))]

    def _request(self, device: Device, request: Request) -> list[Envelope]:
        if request.what == "parameters" and device.cut is not None:
            published = self._run.published
            if request.version != published.version:
                serving = self._serving.answer(device.name, device.cut, request.version)
                if serving:
                    return serving
            return published.answer(device.name, device.cut)
        if request.what == "program" and device.cut is not None:
            return self._placement.programs.answer(device.name, device.cut)
        if request.what == "join" and request.run is not None:
            return self._run.join(device, (request.run, request.round, request.attempt))
        return []

    def _affordable(self, device: str, answers: list[Envelope]) -> list[Envelope]:
        """Without the parameters and programs that are more than it may ask for."""
        out = []
        for answer in answers:
            match answer.message:
                case Parameters(state=asked) | Program(graph=asked) if asked is not None:
                    if not self.guard.answers(device, len(asked)):
                        self._observer.message_dropped(RATE_LIMITED)
                        continue
            out.append(answer)
        return out

    def _telemetry(self, device: Device, report: Telemetry) -> None:
        gain = self._ledger.enter(device.name, report)
        if gain is None:
            self._observer.message_dropped("redelivered")
            return
        for fault in sorted(gain.faults):
            self._observer.message_dropped(fault)
        device.device_class = gain.device_class
        for (metric, label), images in gain.counters.items():
            if metric == "predictions":
                device.predictions[label] += int(images)
        self._observer.telemetry(gain)

    def _report(self, device: Device, report: Report) -> list[Envelope]:
        if report.run != self._run.name:
            return []
        self._observer.device_report(device.name, device.cut or 0, report)
        if report.inference is not None:
            if report.inference.version == self._run.published.version:
                device.inference = report.inference
        else:
            device.report = report
            self._run.report(device, report)
        return []
