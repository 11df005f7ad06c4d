"""The coordinator's state machine: messages and time in, messages out. No sockets, no waiting.

    gathering ─enough devices→ training ⟲ rounds ─last round→ inference ─all answered→ finished

The service loop calls :meth:`CoordinatorCore.receive` and :meth:`CoordinatorCore.tick` from one
worker thread and sends what they return, in order. The store is a parameter, so that a simulator
can keep checkpoints in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from broker.envelopes import Envelope, down, to_all
from broker.messages import (
    Activations,
    Command,
    Coordinator,
    DeviceParameters,
    Features,
    Hello,
    Report,
    Request,
    RunPhase,
    Status,
)
from coordinator import orders
from coordinator.aggregation import Model
from coordinator.answering import Answering
from coordinator.errors import DeviceRefused
from coordinator.evaluation import Evaluator, Responder
from coordinator.observer import Observer
from coordinator.placement import Placement
from coordinator.published import Published
from coordinator.registry import Device, Registry
from coordinator.results import device_results, round_scores
from coordinator.rounds import Verdict, judge, quorum_of
from coordinator.settings import CoordinatorSettings
from coordinator.store import Checkpoint
from coordinator.traffic import TrafficLog
from coordinator.training import RoundInProgress, note_report
from tensors.codecs import parse_codec

log = logging.getLogger("splitfleet.coordinator")


class Keeper(Protocol):
    """Where checkpoints go; ``coordinator.store.Store`` is the one on disk."""

    def announce(self, round_number: int, attempt: int) -> None: ...

    def announced(self) -> tuple[int, int]: ...

    def save(self, checkpoint: Checkpoint) -> None: ...

    def save_result(self, result: dict[str, Any]) -> None: ...


class CoordinatorCore:
    """One run of one fleet, from the first hello to the result."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        run: str,
        checkpoint: Checkpoint,
        *,
        new_round: Callable[[Model, float], RoundInProgress],
        responder: Responder,
        evaluator: Evaluator | None,
        placement: Placement,
        store: Keeper,
        observer: Observer,
        traffic: Callable[[], dict[str, int]],
        boot: str,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._run = run
        self._new_round = new_round
        self._responder = responder
        self._evaluator = evaluator
        self._placement = placement
        self._store = store
        self._observer = observer
        self._boot = boot
        self._clock = clock
        self._registry = Registry(settings.max_devices)
        self._registry.restore(checkpoint.registry)
        # An attempt announced before a crash is never announced again: its round gets a new one.
        self._number = max(checkpoint.round, store.announced()[0] - 1)
        self._returning_until = clock() + settings.return_wait_s if checkpoint.registry else None
        self._published = Published(
            run,
            checkpoint.version,
            checkpoint.model,
            set(checkpoint.trained_cuts),
            parse_codec(settings.parameter_codec),
            checkpoint.residual,
        )
        self._answering = Answering(
            responder, placement.shapes, batch_size=settings.batch_size, observer=observer
        )
        self._history = list(checkpoint.history)
        self._traffic = TrafficLog(checkpoint.traffic, traffic)
        self._round: RoundInProgress | None = None
        self._previous: RoundInProgress | None = None
        self._phase: RunPhase = "gathering"
        self._attempt = 0
        self._due: float | None = None
        responder.load(self._published.version, self._published.model.state)

    # -- events -----------------------------------------------------------------------------------

    def connected(self) -> list[Envelope]:
        """The broker is there (again), maybe without its retained messages: say them all."""
        out = [to_all(Coordinator(state="online", boot=self._boot))]
        out += [self._assign(device) for device in self._registry.devices.values() if device.hello]
        out += [self._published.manifest(cut) for cut in self._cuts()]
        out.append(self._announcement())
        return out + self._advance()

    def disconnected(self) -> list[Envelope]:
        """The broker is gone: everything waits."""
        return []

    @property
    def has_work(self) -> bool:
        """All computing here is done when a message calls for it."""
        return False

    @property
    def finished(self) -> bool:
        """Whether the run is over and nothing more shall be answered."""
        return self._phase == "finished" and not self._settings.stay

    def work(self) -> list[Envelope]:
        """Nothing, see :attr:`has_work`."""
        return []

    def receive(self, envelope: Envelope) -> list[Envelope]:
        """A message; its device is who the topic says, which the broker enforces."""
        device, message = envelope.address.device, envelope.message
        assert device is not None
        known = self._registry.get(device)
        if known is None:
            self._observer.message_dropped("fleet_full")
            return []
        match message:
            case Activations():
                out = self._activations(known, message)
            case DeviceParameters():
                out = self._device_parameters(known, message)
            case Features():
                prediction = self._answering.answer(known.cut, self._published.trained, message)
                out = [down(known.name, prediction)]
            case Status():
                self._registry.status(device, message)
                self._observer.devices(self._registry.by_state())
                out = []
            case Hello():
                out = self._hello(known, message)
            case Request():
                out = self._request(known, message)
            case Report():
                out = self._report(known, message)
            case _:
                self._observer.message_dropped("unexpected_topic")
                return []
        return out + self._advance()

    def tick(self) -> list[Envelope]:
        """Time has passed: deadlines, and receipts that wait for company."""
        out = [] if self._round is None else self._round.receipts()
        if self._returning_until is not None and self._clock() >= self._returning_until:
            self._returning_until = None
        return out + self._advance()

    @property
    def next_tick(self) -> float | None:
        """When :meth:`tick` has something to do, on the clock; None if nothing is due."""
        due = [time for time in (self._due, self._returning_until) if time is not None]
        if self._round is not None and self._round.receipts_due is not None:
            due.append(self._round.receipts_due)
        return min(due, default=None)

    def goodbye(self) -> Envelope:
        """The last status, when the coordinator leaves on purpose."""
        return to_all(Coordinator(state="offline", boot=self._boot))

    # -- what devices say -------------------------------------------------------------------------

    def _hello(self, device: Device, hello: Hello) -> list[Envelope]:
        first = device.hello is None or device.cut is None
        try:
            cut = self._placement.cut_of(device.cut, hello)
        except DeviceRefused as exc:
            log.warning("device %s cannot take part: %s", device.name, exc)
            device.hello = device.cut = None
            return [down(device.name, Command(command="stop", reason=str(exc)))]
        device.hello = hello
        if first or device.cut != cut:
            log.info("device %s joins, cut layer %s", device.name, cut or "to be measured")
        device.cut = cut
        if cut is None:
            return [self._assign(device)]
        return [self._assign(device), self._published.manifest(cut)]

    def _request(self, device: Device, request: Request) -> list[Envelope]:
        if request.what == "parameters" and device.cut is not None:
            return self._published.answer(device.name, device.cut)
        if request.what == "join" and request.run is not None:
            stamp = (request.run, request.round, request.attempt)
            if self._round is not None and stamp == self._round.stamp:
                return [self._round.join(device.name)]
            self._observer.message_dropped("stale_join")
            return [self._announcement()]
        return []

    def _activations(self, device: Device, message: Activations) -> list[Envelope]:
        current = self._round
        if current is None or message.stamp != current.stamp:
            reason = "stale_attempt" if message.run == self._run else "foreign_run"
            self._observer.batch_discarded(reason)
            return []
        return current.activations(device.name, message)

    def _device_parameters(self, device: Device, message: DeviceParameters) -> list[Envelope]:
        for candidate in (self._round, self._previous):
            if candidate is not None and message.stamp == candidate.stamp:
                return candidate.parameters(device.name, message)
        self._observer.message_dropped("stale_attempt")
        return []

    def _report(self, device: Device, report: Report) -> list[Envelope]:
        if report.run != self._run:
            return []
        self._observer.device_report(device.name, device.cut or 0, report)
        if report.inference is not None:
            if report.inference.version == self._published.version:
                device.inference = report.inference
            return []
        if self._round is not None and self._round.stamp == report.stamp:
            self._round.reports[device.name] = report
        for record in self._history[-1:]:
            if (record["round"], record["attempt"]) == report.stamp[1:]:
                note_report(record, device.name, report)
        return []

    # -- rounds -----------------------------------------------------------------------------------

    def _advance(self) -> list[Envelope]:
        """Open, close, extend or abandon a round, or end the run, if it is time."""
        if self._phase == "gathering":
            return self._gather()
        if self._phase == "inference":
            return self._await_answers()
        if self._phase != "training" or self._round is None:
            return []
        current = self._round
        verdict = judge(
            participants=len(current.participants),
            finished=current.finished,
            quorum=quorum_of(len(current.participants), self._settings.quorum),
            overdue=self._overdue(),
            extended=current.extended,
        )
        if verdict is Verdict.WAIT:
            return []
        if verdict is Verdict.EXTEND:
            current.extended = True
            self._due = self._clock() + self._settings.round_deadline_s
            self._observer.round_ended(self._number, "extended", {})
            log.warning("round %d is below quorum at its deadline: extended once", self._number)
            return []
        return self._end_round(current, closed=verdict is Verdict.CLOSE)

    def _gather(self) -> list[Envelope]:
        if self._number >= self._settings.rounds:
            return self._begin_inference()
        needed = self._settings.min_devices
        if self._number:
            needed = quorum_of(needed, self._settings.quorum)
        ready = self._registry.ready
        if len(ready) < needed:
            return []
        if self._returning_until is not None and len(ready) < len(self._registry.devices):
            return []  # after a restart the devices come back one by one
        self._returning_until = None
        return self._open_round(ready)

    def _open_round(self, ready: Sequence[Device]) -> list[Envelope]:
        settings = self._settings
        self._number += 1
        last_number, last_attempt = self._store.announced()
        self._attempt = last_attempt + 1 if last_number == self._number else 0
        self._store.announce(self._number, self._attempt)
        rate = orders.rate(settings, self._number)
        self._round = self._new_round(self._published.model, rate)
        self._round.open(
            (self._run, self._number, self._attempt),
            self._published.version,
            {
                device.name: (self._require_cut(device), orders.quota(self._settings, device))
                for device in ready
            },
        )
        self._set_phase("training")
        self._due = self._clock() + settings.round_deadline_s
        self._observer.round_opened(
            self._number,
            settings.rounds,
            self._attempt,
            sum(orders.quota(settings, device) for device in ready),
        )
        return [self._announcement()]

    def _end_round(self, current: RoundInProgress, *, closed: bool) -> list[Envelope]:
        self._previous, self._round, self._due = current, None, None
        if not closed:
            self._observer.round_ended(self._number, "abandoned", {})
            log.warning("round %d stayed below quorum: abandoned", self._number)
            self._set_phase("gathering")
            return self._advance() or [self._announcement()]
        self._published.replace(current.merge(), current.trained_cuts, self._cuts())
        record = current.record(self._clock())
        record["bytes"] = self._traffic.since_mark()
        record["round"], record["version"] = self._number, self._published.version
        record |= round_scores(self._published, self._evaluator)
        self._history.append(record)
        for name, (rounds, samples) in current.contributions().items():
            device = self._registry.devices[name]
            device.rounds += rounds
            device.samples += samples
        self._store.save(self._checkpoint())
        self._responder.load(self._published.version, self._published.model.state)
        self._observer.round_ended(self._number, "closed", record)
        self._set_phase("gathering")
        out: list[Envelope] = []
        for cut in self._cuts():
            out += [self._published.manifest(cut), self._published.broadcast(cut)]
        return out + (self._advance() or [self._announcement()])

    def _begin_inference(self) -> list[Envelope]:
        if not self._settings.inference:
            return self._finish()
        self._set_phase("inference")
        self._due = self._clock() + self._settings.inference_deadline_s
        return [self._announcement()]

    def _await_answers(self) -> list[Envelope]:
        waiting = [
            device
            for device in self._registry.ready
            if device.inference is None and device.hello and device.hello.test_samples
        ]
        if (waiting or not self._registry.ready) and not self._overdue():
            return []
        return self._finish()

    def _finish(self) -> list[Envelope]:
        self._due = None
        self._store.save_result(self._result())
        self._set_phase("finished")
        return [self._announcement()]

    def _result(self) -> dict[str, Any]:
        return {
            "run": self._run,
            "settings": self._settings.model_dump(mode="json"),
            "rounds": self._number,
            "version": self._published.version,
            "history": self._history,
            "traffic": self._traffic.totals(),
            "devices": device_results(
                self._registry, self._published, self._evaluator, self._settings
            ),
        }

    # -- small parts ------------------------------------------------------------------------------

    def _assign(self, device: Device) -> Envelope:
        grant = self._placement.credits(device.cut or 1, len(self._registry.devices))
        return orders.assignment(self._settings, self._run, device, grant)

    def _announcement(self) -> Envelope:
        stamp = (self._run, self._number, self._attempt)
        return orders.announcement(self._settings, stamp, self._phase, self._published.version)

    def _cuts(self) -> list[int]:
        return sorted({d.cut for d in self._registry.devices.values() if d.cut is not None})

    def _require_cut(self, device: Device) -> int:
        assert device.cut is not None
        return device.cut

    def _overdue(self) -> bool:
        return self._due is not None and self._clock() >= self._due

    def _set_phase(self, phase: RunPhase) -> None:
        if phase != self._phase:
            self._phase = phase
            self._observer.phase(phase)

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            version=self._published.version,
            round=self._number,
            model=self._published.model,
            trained_cuts=sorted(self._published.trained),
            history=self._history,
            registry=self._registry.dump(),
            traffic=self._traffic.totals(),
            residual=self._published.residual,
        )
