"""The device's state machine: messages and time in, messages and work out. No I/O, no torch.

``broker.drive`` calls :meth:`AgentCore.receive` and :meth:`AgentCore.tick`, and
:meth:`AgentCore.work` as long as :attr:`AgentCore.has_work`; each returns what to send.

    joining ─assignment→ waiting ─round→ fetching ─parameters→ entering ─receipt→ training
                            ↑                                                        │ quota done
                            └───────────────── final receipt ── finishing ←──────────┘
    waiting ─round(inference)→ fetching → answering → reporting ─round(finished)→ finished
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from broker.drive import Effect, Subscribe
from broker.envelopes import Envelope, up
from broker.errors import MessageError
from broker.messages import (
    Assignment,
    Command,
    Coordinator,
    DeviceParameters,
    Gradients,
    Hello,
    Manifest,
    Measurement,
    Parameters,
    Prediction,
    Receipt,
    Report,
    Request,
    Round,
    Status,
)
from broker.topics import Topics
from edge_agent.attempt import Attempt, Learner
from edge_agent.data import DeviceData
from edge_agent.encoding import ActivationEncoder
from edge_agent.errors import AssignmentError
from edge_agent.holding import Holding, SnapshotStore
from edge_agent.predictor import InferenceRun, Policy
from tensors.codecs import parse_codec
from tensors.errors import TensorsError

log = logging.getLogger("splitfleet.agent")

FIRST_RETRY_S = 2.0
LAST_RETRY_S = 30.0
PROBE_BYTES = 256 << 10
PROBE_WAIT_S = 20.0


class Phase(StrEnum):
    """What the device is doing; published in its status."""

    JOINING = "joining"
    WAITING = "waiting"
    FETCHING = "fetching"
    ENTERING = "entering"
    TRAINING = "training"
    FINISHING = "finishing"
    ANSWERING = "answering"
    REPORTING = "reporting"
    FINISHED = "finished"


_ANSWERING = (Phase.ANSWERING, Phase.REPORTING)


@dataclass(slots=True)
class _Question:
    """Something that is said again until it is answered."""

    envelopes: list[Envelope]
    due: float
    wait: float


class AgentCore:
    """One device's part in a fleet.

    ``build`` makes the learner an assignment asks for, ``measure`` times the device for cut
    ``auto``; both may raise :class:`AssignmentError`. ``uplink`` is the speed to the broker in
    bytes per second, 0 as long as it is unknown. ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self,
        topics: Topics,
        device: str,
        hello: Hello,
        data: DeviceData,
        *,
        uplink: Callable[[], float],
        build: Callable[[Assignment], Learner],
        measure: Callable[[Assignment], Measurement],
        snapshots: SnapshotStore,
        clock: Callable[[], float],
        heartbeat_s: float = 30.0,
        stay: bool = False,
    ) -> None:
        self._topics = topics
        self._uplink = uplink
        self._device = device
        self._hello = hello
        self._data = data
        self._build = build
        self._measure = measure
        self._snapshots = snapshots
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._stay = stay
        self._connection = hello.boot
        self._coordinator_boot: str | None = None
        self._coordinator_online = True
        self._connected = False
        self._assignment: Assignment | None = None
        self._learner: Learner | None = None
        self._encoder: ActivationEncoder | None = None
        self._round: Round | None = None
        self._manifest: Manifest | None = None
        self._holding: Holding | None = None
        self._attempt: Attempt | None = None
        self._settled: tuple[str, int, int] | None = None
        self._inference: InferenceRun | None = None
        self._measure_by: float | None = None
        self._question: _Question | None = None
        self._next_heartbeat = clock() + heartbeat_s
        self.phase = Phase.JOINING
        self.problem: str | None = None

    # -- events -----------------------------------------------------------------------------------

    def connected(self) -> list[Effect]:
        """The broker is there (again): introduce ourselves and say again what may be lost."""
        self._connected = True
        out: list[Effect] = [self._status(), up(self._device, self._hello)]
        out += self._unanswered()
        if self._question is None and self._assignment is None:
            self._ask(up(self._device, self._hello))
        return out

    def disconnected(self) -> list[Effect]:
        """The broker is gone: nothing new is produced until it is back."""
        self._connected = False
        return []

    def receive(self, envelope: Envelope) -> list[Effect]:
        """A message from the coordinator."""
        message = envelope.message
        match message:
            case Assignment():
                return self._assigned(message)
            case Round():
                return self._announced(message)
            case Gradients():
                if self._attempt is not None and message.stamp == self._attempt.stamp:
                    self._attempt.gradient(message)
            case Receipt():
                return self._receipt(message)
            case Parameters():
                return self._parameters(message)
            case Manifest():
                self._manifest = message
            case Prediction() if self._inference is not None:
                self._inference.answer(message)
            case Coordinator():
                return self._coordinator(message)
            case Command(command="stop"):
                self.problem = message.reason or "the coordinator stopped this device"
                self._become(Phase.FINISHED)
        return []

    def tick(self) -> list[Effect]:
        """Time has passed: heartbeat, repeated questions, overdue gradients and answers."""
        now = self._clock()
        out: list[Effect] = []
        if self._attempt is not None:
            self._attempt.tick()
        if self._inference is not None:
            self._inference.tick()
        if now >= self._next_heartbeat:
            out.append(self._status())
        question = self._question
        if question is not None and now >= question.due:
            question.wait = min(2 * question.wait, LAST_RETRY_S)
            question.due = now + question.wait
            out += question.envelopes
        return out

    @property
    def next_tick(self) -> float:
        """When :meth:`tick` has something to do, on the clock."""
        times = [self._next_heartbeat]
        if self._question is not None:
            times.append(self._question.due)
        if self._measure_by is not None and self._clock() < self._measure_by:
            times.append(self._measure_by)
        if self._attempt is not None and self._attempt.deadline is not None:
            times.append(self._attempt.deadline)
        if self._inference is not None and self._inference.deadline is not None:
            times.append(self._inference.deadline)
        return min(times)

    @property
    def finished(self) -> bool:
        """Whether this device's part is over: refused, or the run ended and it shall not stay."""
        return self.problem is not None or (self.phase is Phase.FINISHED and not self._stay)

    def goodbye(self) -> Envelope:
        """The last status, when the device leaves on purpose."""
        return up(self._device, Status(state="offline", connection=self._connection))

    @property
    def has_work(self) -> bool:
        """Whether :meth:`work` would do something now."""
        if self._measure_by is not None:
            return self._uplink() > 0 or self._clock() >= self._measure_by
        if self._inference is not None:
            return self._inference.done or self._inference.has_work
        if self._attempt is None or self.phase is not Phase.TRAINING:
            return False
        return self._attempt.complete or self._attempt.can_learn or self._may_produce(self._attempt)

    def work(self) -> list[Effect]:
        """One unit of computing: a gradient, a new batch, the upload, or test images."""
        if self._measure_by is not None:
            return self._measured()
        if self._inference is not None:
            return self._infer()
        assert self._attempt is not None
        if self._attempt.complete:
            return self._upload()
        if self._may_produce(self._attempt):
            return list[Effect](self._attempt.produce())
        self._attempt.learn()
        return []

    def _may_produce(self, attempt: Attempt) -> bool:
        return self._connected and self._coordinator_online and attempt.can_produce

    # -- transitions ------------------------------------------------------------------------------

    def _assigned(self, assignment: Assignment) -> list[Effect]:
        self._answered(Phase.JOINING)
        if self._assignment is not None and assignment.run == self._assignment.run:
            # Credits follow the size of the fleet and come with every receipt.
            same = assignment.model_copy(update={"credits": self._assignment.credits})
            if same == self._assignment:
                return []
        before, self._assignment = self._assignment, assignment
        self._attempt = self._inference = self._holding = self._settled = None
        self._question = self._measure_by = None
        out = self._become(Phase.JOINING)
        if assignment.cut is None:
            self._measure_by = self._clock() + PROBE_WAIT_S
            return [*out, up(self._device, Request(what="probe", padding=bytes(PROBE_BYTES)))]
        out.append(Subscribe(self._topics.cut_filters(assignment.cut)))
        if before is None or before.run != assignment.run or before.cut != assignment.cut:
            self._manifest = None
        try:
            parse_codec(assignment.parameter_codec)
            self._encoder = ActivationEncoder(assignment, uplink=self._uplink)
            self._learner = self._build(assignment)
        except (AssignmentError, TensorsError) as exc:
            self.problem = str(exc)
            self._become(Phase.FINISHED)
            return [self._status()]
        self._holding = Holding(assignment, self._learner, self._snapshots)
        return out + self._advance()

    def _measured(self) -> list[Effect]:
        self._measure_by = None
        assert self._assignment is not None
        try:
            measurement = self._measure(self._assignment)
        except (AssignmentError, TensorsError) as exc:
            self.problem = str(exc)
            self._become(Phase.FINISHED)
            return [self._status()]
        measurement = measurement.model_copy(update={"uplink_bytes_per_s": self._uplink()})
        self._hello = self._hello.model_copy(update={"measurement": measurement})
        return self._ask(up(self._device, self._hello))

    def _announced(self, announced: Round) -> list[Effect]:
        self._round = announced
        return self._advance()

    def _coordinator(self, message: Coordinator) -> list[Effect]:
        was_online, self._coordinator_online = self._coordinator_online, message.state == "online"
        if not self._coordinator_online:
            return []
        if message.boot == self._coordinator_boot:
            return [] if was_online else self._unanswered()
        stranger = self._coordinator_boot is not None or self._assignment is None
        self._coordinator_boot = message.boot
        return [self._status(), up(self._device, self._hello)] if stranger else []

    def _advance(self) -> list[Effect]:
        """Do what the assignment and the announced round call for."""
        announced, assignment = self._round, self._assignment
        if assignment is None or assignment.cut is None or announced is None:
            return []
        settled = announced.phase == "training" and announced.stamp == self._settled
        answering = announced.phase == "inference" and self.phase in _ANSWERING
        if announced.run != assignment.run or settled or answering:
            return []
        out = self._end_attempt()
        if announced.phase == "finished":
            self._inference = None
            return out + self._become(Phase.FINISHED)
        if announced.phase == "gathering":
            return out + self._become(Phase.WAITING)
        if self._holding is None or self._holding.version != announced.version:
            self._become(Phase.FETCHING)
            return out + self._ask(
                up(self._device, Request(what="parameters", version=announced.version))
            )
        if announced.phase == "inference":
            return out + self._start_inference(announced, assignment)
        self._become(Phase.ENTERING)
        run, number, attempt = announced.stamp
        return out + self._ask(
            up(self._device, Request(what="join", run=run, round=number, attempt=attempt))
        )

    def _parameters(self, message: Parameters) -> list[Effect]:
        holding, announced = self._holding, self._round
        if holding is None:
            return []
        if (
            announced is not None
            and announced.run == message.run
            and message.version < announced.version
        ):
            return []
        state = holding.read(message, self._manifest)
        if state is None:
            return []
        out = self._end_attempt()
        if not holding.take(message.version, state):
            return out
        self._answered(Phase.FETCHING)
        return out + self._advance()

    def _receipt(self, receipt: Receipt) -> list[Effect]:
        if self.phase is Phase.ENTERING and receipt.complete and self._round is not None:
            if receipt.stamp != self._round.stamp or self._assignment is None:
                return []
            if not receipt.participant:
                self._settled = receipt.stamp
                return self._become(Phase.WAITING)
            assert self._learner is not None
            assert self._encoder is not None
            try:
                self._attempt = Attempt(
                    self._device,
                    self._assignment,
                    self._round,
                    receipt,
                    self._learner,
                    self._data.stream(self._assignment, self._device),
                    encoder=self._encoder,
                    clock=self._clock,
                )
            except MessageError as exc:
                log.warning("cannot enter the round: %s", exc)
                return []
            self._settled = receipt.stamp
            return self._become(Phase.TRAINING)
        if self._attempt is None or receipt.stamp != self._attempt.stamp:
            return []
        try:
            self._attempt.receipt(receipt)
        except MessageError as exc:
            log.warning("a receipt makes no sense: %s", exc)
            return []
        if not receipt.final:
            return []
        self._answered(Phase.FINISHING)
        return [*self._end_attempt(), *self._become(Phase.WAITING)]

    def _upload(self) -> list[Effect]:
        attempt, holding = self._attempt, self._holding
        assert attempt is not None
        assert holding is not None
        run, number, tried = attempt.stamp
        state, base = holding.upload()
        self._become(Phase.FINISHING)
        return self._ask(
            up(
                self._device,
                DeviceParameters(
                    run=run,
                    round=number,
                    attempt=tried,
                    version=attempt.version,
                    produced=attempt.produced,
                    base=base,
                    state=state,
                ),
            )
        )

    def _start_inference(self, announced: Round, assignment: Assignment) -> list[Effect]:
        assert self._learner is not None
        self._question = None
        self._inference = InferenceRun(
            self._learner.predictor(),
            parse_codec(assignment.activation_codec),
            self._data.test_batches(assignment.batch_size),
            Policy(
                rule=assignment.exit_rule,
                threshold=assignment.threshold,
                timeout_s=assignment.offload_timeout_s,
            ),
            version=announced.version,
            clock=self._clock,
        )
        return self._become(Phase.ANSWERING)

    def _infer(self) -> list[Effect]:
        assert self._inference is not None
        if not self._inference.done:
            features = self._inference.work()
            return [] if features is None else [up(self._device, features)]
        assert self._round is not None
        run, number, attempt = self._round.stamp
        report = Report(run=run, round=number, attempt=attempt, inference=self._inference.result())
        self._inference = None
        self._become(Phase.REPORTING)
        return self._ask(up(self._device, report))

    # -- small parts ------------------------------------------------------------------------------

    def _end_attempt(self) -> list[Effect]:
        """The attempt is over, with its final receipt or because the fleet moved on."""
        if self._attempt is None:
            return []
        report, self._attempt = self._attempt.report(), None
        return [up(self._device, report)]

    def _ask(self, *envelopes: Envelope) -> list[Effect]:
        self._question = _Question(list(envelopes), self._clock() + FIRST_RETRY_S, FIRST_RETRY_S)
        return list(envelopes)

    def _unanswered(self) -> list[Effect]:
        """What may have been lost, or its answer, with a connection: ours or the coordinator's."""
        out = list[Effect](self._attempt.unanswered() if self._attempt is not None else [])
        return out + (self._question.envelopes if self._question is not None else [])

    def _answered(self, phase: Phase) -> None:
        if self.phase is phase:
            self._question = None

    def _become(self, phase: Phase) -> list[Effect]:
        changed, self.phase = phase is not self.phase, phase
        if phase in (Phase.WAITING, Phase.TRAINING, Phase.FINISHED):
            self._question = None
        return [self._status()] if changed and phase is not Phase.FETCHING else []

    def _status(self) -> Envelope:
        self._next_heartbeat = self._clock() + self._heartbeat_s
        return up(
            self._device,
            Status(state="online", connection=self._connection, phase=self.phase.value),
        )
