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
from collections.abc import Callable, Mapping

import numpy as np

from broker.drive import Effect, Subscribe
from broker.envelopes import Envelope, up
from broker.errors import MessageError
from broker.logs import LogLevel
from broker.messages import (
    Assignment,
    Command,
    Coordinator,
    Hello,
    Manifest,
    Parameters,
    Program,
    Request,
)
from broker.serving_messages import Prediction, Serving
from broker.topics import Topics
from broker.training_messages import Gradients, LastFeatures, Receipt, Round
from edge_agent.asking import Question
from edge_agent.attempt import Attempt
from edge_agent.errors import AssignmentError
from edge_agent.meters import Meters
from edge_agent.phases import Phase
from edge_agent.predictor import InferenceRun
from edge_agent.preparation import Preparation
from edge_agent.presence import Counterpart, Presence
from edge_agent.telemetry import Reporter
from edge_agent.workplace import Workplace
from tensors.errors import TensorsError

log = logging.getLogger("splitfleet.agent")


OnVersion = Callable[[Assignment, int, Mapping[str, np.ndarray]], None]
"""Called with the assignment, whose cut it is for, a version and its parameters."""

_ANSWERING = (Phase.ANSWERING, Phase.REPORTING)


class AgentCore:
    """One device's part in a fleet.

    ``clock`` is monotonic, in seconds. ``reporter`` knows how often and what it tells of itself.
    With ``stay`` it waits for the next run when one is over.
    """

    def __init__(
        self,
        topics: Topics,
        device: str,
        hello: Hello,
        preparation: Preparation,
        *,
        reporter: Reporter,
        clock: Callable[[], float],
        stay: bool = False,
    ) -> None:
        self._topics = topics
        self._device = device
        self._hello = hello
        self._preparation = preparation
        self._clock = clock
        self._stay = stay
        self.reporter = reporter
        self.reporter.add(self._meter)
        self._presence = Presence(device, hello.boot, reporter=reporter, clock=clock)
        self._assignment: Assignment | None = None
        self._round: Round | None = None
        self._serving: Serving | None = None
        self._manifest: Manifest | None = None
        self._place: Workplace | None = None
        self._question = Question(clock)
        self.phase = Phase.JOINING
        self.problem: str | None = None
        self.on_version: OnVersion | None = None
        """Told of every version of the parameters it comes to hold, from then on."""
        self.on_log_level: Callable[[LogLevel | None], None] | None = None
        """Told which level the log shall have; None is that of the device's own settings."""

    # -- events -----------------------------------------------------------------------------------

    def connected(self) -> list[Effect]:
        """The broker is there (again): introduce ourselves.

        What may be lost is said again when the coordinator is known to be there.
        """
        self._presence.connect()
        out: list[Effect] = [self._status(), up(self._device, self._hello)]
        if not self._question.open and self._assignment is None:
            self._question.ask(up(self._device, self._hello))
        return out

    def disconnected(self) -> list[Effect]:
        """The broker is gone: without feedback training goes on, else nothing new is made."""
        self._presence.disconnect()
        return self._interrupted()

    def receive(self, envelope: Envelope) -> list[Effect]:
        """A message from the coordinator."""
        message = envelope.message
        match message:
            case Assignment():
                return self._assigned(message)
            case Round():
                known, self._round = self._round == message, message
                # What it asks because of this one it says again by itself: no more is due to that.
                return [] if known and self._question.open else self._advance()
            case Gradients() | LastFeatures():
                self._of_batch(message)
            case Receipt():
                return self._receipt(message)
            case Parameters():
                return self._parameters(message)
            case Program():
                return self._program(message)
            case Manifest():
                self._manifest = message
            case Prediction() if self._inference is not None:
                self._inference.answer(message)
            case Serving():
                return self._served(message)
            case Coordinator():
                return self._coordinator(message)
            case Command():
                self._order(message)
        return []

    def tick(self) -> list[Effect]:
        """Time has passed: heartbeat, repeated questions, overdue gradients and answers."""
        now = self._clock()
        out: list[Effect] = []
        if self.attempt is not None:
            self.attempt.tick()
        if self._inference is not None:
            self._inference.tick()
        if now >= self._presence.due:
            out.append(self._status())
            if self.phase in (Phase.JOINING, Phase.WAITING):
                # A coordinator without memory may know of this device by nothing else.
                out.append(up(self._device, self._hello))
        if now >= self.reporter.due:
            out += self._tell()
        return out + self._question.tick()

    @property
    def next_tick(self) -> float:
        """When :meth:`tick` has something to do, on the clock."""
        times = [self._presence.due, self.reporter.due, self._question.due, self._preparation.due]
        times.append(None if self.attempt is None else self.attempt.deadline)
        times.append(None if self._inference is None else self._inference.deadline)
        return min(time for time in times if time is not None)

    @property
    def finished(self) -> bool:
        """Whether this device's part is over: refused, or the run ended and it shall not stay."""
        return self.problem is not None or (self.phase is Phase.FINISHED and not self._stay)

    @property
    def attempt(self) -> Attempt | None:
        """The attempt under way."""
        return None if self._place is None else self._place.attempt

    def goodbye(self) -> Envelope:
        """The last status, when the device leaves on purpose."""
        return self._presence.goodbye()

    def telemetry(self) -> Envelope:
        """What it has counted until now; also to be sent before it leaves."""
        cut = None if self._assignment is None else self._assignment.cut
        return self._presence.report(cut)

    @property
    def place(self) -> dict[str, str | int]:
        """Device, run and round, for lines of a log; may be asked for in any thread."""
        announced = self._round
        if announced is None:
            return {"device": self._device}
        return {"device": self._device, "run": announced.run, "round": announced.round}

    @property
    def has_work(self) -> bool:
        """Whether :meth:`work` would do something now."""
        if self._preparation.probing:
            return self._preparation.ready
        if self._inference is not None:
            return self._inference.done or self._inference.has_work
        attempt = self.attempt
        if attempt is None or self.phase is not Phase.TRAINING:
            return False
        return (
            attempt.complete
            or attempt.can_classify
            or attempt.can_learn
            or attempt.can_produce(online=self._presence.online)
        )

    def work(self) -> list[Effect]:
        """One unit of computing: a gradient, a new batch, the upload, or test images."""
        if self._preparation.probing:
            return self._measure()
        if self._inference is not None:
            return self._infer(self._inference)
        place, attempt = self._place, self.attempt
        assert place is not None
        assert attempt is not None
        if attempt.complete:
            self._become(Phase.FINISHING)
            return self._ask(place.upload())
        if attempt.can_classify:  # others may wait for the step that its gradient makes
            return list[Effect](attempt.classify())
        if attempt.can_produce(online=self._presence.online):
            return list[Effect](attempt.produce(online=self._presence.online))
        if attempt.can_learn:
            attempt.learn()
        return []

    @property
    def _inference(self) -> InferenceRun | None:
        return None if self._place is None else self._place.inference

    # -- transitions ------------------------------------------------------------------------------

    def _assigned(self, assignment: Assignment) -> list[Effect]:
        self._answered(Phase.JOINING)
        if self._assignment is not None and assignment.run == self._assignment.run:
            # Credits follow the size of the fleet and come with every receipt.
            same = assignment.model_copy(update={"credits": self._assignment.credits})
            if same == self._assignment:
                return []
        # What was counted belongs to the cut it was counted with; the next begins at 0.
        out = self._tell() if self._assignment is not None else []
        before, self._assignment = self._assignment, assignment
        if self._serving is not None and self._serving.run != assignment.run:
            self._serving = None
        if self._place is not None:
            out += self._place.leave()
            self._place.stop_answering()
        out += self._tell()
        self._place = None
        self._preparation.stop()
        self._question.close()
        out += self._become(Phase.JOINING)
        if assignment.cut is None:
            return [*out, up(self._device, self._preparation.probe(assignment))]
        out.append(Subscribe(self._topics.cut_filters(assignment.cut)))
        if before is None or before.run != assignment.run or before.cut != assignment.cut:
            self._manifest = None
        return out + self._take_up(assignment)

    def _take_up(self, assignment: Assignment) -> list[Effect]:
        """Begin to work under an assignment; if that takes a program, with this."""
        programs = self._preparation.programs
        if programs is not None and not programs.has_program(assignment):
            self._become(Phase.FETCHING)
            return self._ask(up(self._device, Request(what="program")))
        try:
            self._place = self._preparation.workplace(assignment)
        except (AssignmentError, TensorsError) as exc:
            return self._cannot(exc)
        self._hand_over()
        return self._advance()

    def _program(self, message: Program) -> list[Effect]:
        programs, wanted = self._preparation.programs, self._assignment
        if programs is None or wanted is None or self._place is not None:
            return []
        if (message.run, message.cut) != (wanted.run, wanted.cut):
            return []
        self._answered(Phase.FETCHING)
        try:
            programs.take(message)
        except AssignmentError as exc:
            return self._cannot(exc)
        return self._become(Phase.JOINING) + self._take_up(wanted)

    def _measure(self) -> list[Effect]:
        try:
            measurement = self._preparation.measure()
        except (AssignmentError, TensorsError) as exc:
            return self._cannot(exc)
        self._hello = self._hello.model_copy(update={"measurement": measurement})
        return self._ask(up(self._device, self._hello))

    def _cannot(self, reason: Exception) -> list[Effect]:
        self.problem = str(reason)
        self._become(Phase.FINISHED)
        return [self._status()]

    def _of_batch(self, message: Gradients | LastFeatures) -> None:
        attempt = self.attempt
        if attempt is None or message.stamp != attempt.stamp:
            return
        if isinstance(message, LastFeatures):
            attempt.features(message)
        else:
            attempt.gradient(message)

    def _coordinator(self, message: Coordinator) -> list[Effect]:
        match self._presence.hear(message, assigned=self._assignment is not None):
            case Counterpart.GONE:
                return self._interrupted()
            case Counterpart.KNOWN:
                return self._unanswered()  # it may not have been there when that was said before
        out: list[Effect] = [self._status(), up(self._device, self._hello)]
        if self._assignment is not None:
            out += self._tell()  # this coordinator counts from here on
        if self._place is not None and self.attempt is not None and not self.attempt.barrier:
            # No announcement need end this attempt, but the coordinator has forgotten it.
            out += [*self._place.leave(), *self._become(Phase.WAITING), *self._advance()]
        return out

    def _advance(self) -> list[Effect]:
        """Do what the assignment and the announced round call for."""
        announced, place = self._round, self._place
        if place is None or announced is None or self._assignment is None:
            return []
        answering = announced.phase == "inference" and self.phase in _ANSWERING
        if announced.run != self._assignment.run or answering or place.stays(announced):
            return []
        out = list[Effect](place.follow(announced))
        place.stop_answering()
        if announced.phase == "finished":
            return out + self._become(Phase.FINISHED)
        serving = self._serving
        if announced.phase == "gathering" or (announced.phase == "inference" and serving is None):
            return out + self._become(Phase.WAITING)
        if place.holding.version != announced.version:
            self._become(Phase.FETCHING)
            wanted = Request(what="parameters", version=announced.version)
            return out + self._ask(up(self._device, wanted))
        if announced.phase == "inference":
            assert serving is not None
            place.start_answering(announced, serving)
            self._question.close()
            return out + self._become(Phase.ANSWERING)
        self._become(Phase.ENTERING)
        return out + self._ask(place.join(announced))

    def _served(self, serving: Serving) -> list[Effect]:
        """How images are answered; what is measured at the end of a run may have waited for it."""
        if self._assignment is not None and serving.run != self._assignment.run:
            return []
        self._serving = serving
        announced = self._round
        if announced is None or announced.phase != "inference" or self.phase is not Phase.WAITING:
            return []
        return self._advance()

    def _parameters(self, message: Parameters) -> list[Effect]:
        place, announced, attempt = self._place, self._round, self.attempt
        if place is None:
            return []
        if announced is not None:
            outdated = announced.run == message.run and message.version < announced.version
            barrier = announced.barrier if attempt is None else attempt.barrier
            if outdated or (not barrier and self.phase is not Phase.FETCHING):
                return []
        state = place.holding.read(message, self._manifest)
        if state is None:
            return []
        out: list[Effect] = []
        if attempt is not None:
            out += place.leave(late=message.version > attempt.version)
            out += self._become(Phase.WAITING)
        if not place.holding.take(message.version, state):
            return out
        self._hand_over()
        self._answered(Phase.FETCHING)
        return out + self._advance()

    def _receipt(self, receipt: Receipt) -> list[Effect]:
        place, announced = self._place, self._round
        if place is None or announced is None:
            return []
        if place.attempt is not None:
            if not place.finish(receipt):
                return []
            return [*place.leave(), *self._become(Phase.WAITING), *self._advance()]
        # Without a barrier a device that had nothing to do is given another leg when there is one.
        idle = self.phase is Phase.WAITING and not announced.barrier
        if not (self.phase is Phase.ENTERING or idle) or not place.admits(announced, receipt):
            return []
        try:
            entered = place.enter(announced, receipt)
        except MessageError as exc:
            log.warning("cannot enter the round: %s", exc)
            return []
        return self._become(Phase.TRAINING if entered else Phase.WAITING)

    def _infer(self, inference: InferenceRun) -> list[Effect]:
        if not inference.done:
            features = inference.work()
            return [] if features is None else [up(self._device, features)]
        assert self._place is not None
        assert self._round is not None
        self._become(Phase.REPORTING)
        asked = self._ask(self._place.end_answering(self._round))
        return [*self._tell(), *asked]

    def _hand_over(self) -> None:
        held = None if self._place is None else self._place.held
        if self.on_version is not None and self._assignment is not None and held is not None:
            self.on_version(self._assignment, *held)

    # -- small parts ------------------------------------------------------------------------------

    def _order(self, command: Command) -> None:
        if command.command == "stop":
            self.problem = command.reason or "the coordinator stopped this device"
            self._become(Phase.FINISHED)
        elif command.command == "log_level" and self.on_log_level is not None:
            self.on_log_level(command.level)

    def _interrupted(self) -> list[Effect]:
        if self.attempt is not None:
            self.attempt.interrupted()
        return []

    def _unanswered(self) -> list[Effect]:
        """What may have been lost, or its answer, with a connection: ours or the coordinator's."""
        out = list[Effect](self.attempt.unanswered() if self.attempt is not None else [])
        return out + self._question.open

    def _tell(self) -> list[Effect]:
        report = self.telemetry()
        return [report] if self._presence.connected else []

    def _meter(self, meters: Meters) -> None:
        self._preparation.meter(meters)
        if self._place is not None:
            self._place.meter(meters)

    def _ask(self, envelope: Envelope) -> list[Effect]:
        return list[Effect](self._question.ask(envelope))

    def _answered(self, phase: Phase) -> None:
        if self.phase is phase:
            self._question.close()

    def _become(self, phase: Phase) -> list[Effect]:
        changed, self.phase = phase is not self.phase, phase
        if phase in (Phase.WAITING, Phase.TRAINING, Phase.FINISHED):
            self._question.close()
        return [self._status()] if changed and phase is not Phase.FETCHING else []

    def _status(self) -> Envelope:
        return self._presence.status(self.phase)
